"""`loraserve merge` from the command line."""

import json
import stat
from pathlib import Path

import pytest
import torch

from loraserve import LLM, SamplingParams
from loraserve.base.checkpoint import read_checkpoint
from loraserve.base.load import Base
from loraserve.lora.merge import merged_weight
from loraserve.registry import Registry
from tests.cli.conftest import Cli, Shell


def test_the_merged_checkpoint_answers_as_base_and_adapter_did(
    cli: Cli, here: Path, base: Base, adapters_dir: Path
) -> None:
    result = cli("merge", "poet:0.5", "--out", "out/poet")
    assert result.exit_code == 0, result.stderr
    question = [{"role": "user", "content": "你是谁？"}]
    greedy = SamplingParams(max_tokens=8, temperature=0.0)
    with LLM(str(base.path), adapters_dir, device="cpu", dtype="float32") as llm:
        expected, alone = llm.chat(question, "poet:0.5", greedy).token_ids, llm.chat(question, None, greedy).token_ids
    with LLM(str(here / "out" / "poet"), adapters_dir, device="cpu", dtype="float32") as merged:
        assert merged.chat(question, None, greedy).token_ids == expected != alone


def test_it_says_what_was_written_and_how_close_it_is(cli: Cli, here: Path, base: Base) -> None:
    result = cli("merge", "pirate:0.7+head:0.3", "--out", "out/blend")
    report = json.loads((here / "out" / "blend" / "merge_report.json").read_text("utf-8"))
    tokens, same = report["parity"]["greedy_tokens"], report["parity"]["greedy_agreement"]
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    assert lines[0] == ["pirate:0.7+head:0.3", "merged into tiny"]
    assert ["written", "out/blend (Hugging Face directory, float16)"] in lines
    assert ["changed", "7 layers; lm_head is no longer tied to the embeddings"] in lines
    assert f"{round(tokens * same)} of {tokens} the same ({same:.1%})" in result.stdout
    assert f"unchanged, {base.fingerprint[:19]}" in result.stdout
    assert "\x1b" not in result.stdout
    assert "comparing the merged checkpoint" in result.stderr


@pytest.mark.parametrize("options", [[], ["--format", "minimind"]])
def test_a_pth_is_written_for_a_name_that_ends_so(
    cli: Cli, here: Path, base: Base, adapters_dir: Path, options: list[str]
) -> None:
    result = cli("merge", "pirate", "--out", "full_sft_64.pth", *options)
    assert result.exit_code == 0, result.stderr
    target = "model.layers.1.self_attn.q_proj"
    update = Registry(adapters_dir).load("pirate").weights[target]
    state = torch.load("full_sft_64.pth", weights_only=True)
    exact = merged_weight(read_checkpoint(base.path).tensors[f"{target}.weight"], [(update, 1.0)])
    assert torch.equal(state[f"{target}.weight"], exact)
    assert json.loads((here / "full_sft_64.merge_report.json").read_text("utf-8"))["adapter"] == "pirate"
    assert sorted(file.name for file in here.iterdir()) == ["full_sft_64.merge_report.json", "full_sft_64.pth"]


def test_a_merge_can_be_merged_into_again(cli: Cli, here: Path) -> None:
    assert cli("merge", "pirate", "--out", "once").exit_code == 0
    refused = cli("merge", "poet", "--out", "twice", "--base", "once")
    assert refused.exit_code == 1
    assert "--allow-base-mismatch" in refused.stderr
    allowed = cli("merge", "poet", "--out", "twice", "--base", "once", "--allow_base_mismatch")
    assert allowed.exit_code == 0, allowed.stderr
    assert (here / "twice" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (["pirat", "--out", "x"], 1, "no adapter named 'pirat'; did you mean 'pirate'?"),
        (["base", "--out", "x"], 2, "would change nothing"),
        (["pirate:lots", "--out", "x"], 2, "must be a number"),
        (["pirate"], 2, "missing option '--out'"),
        (["pirate", "--out", "x.pth", "--format", "hf"], 2, "--format hf needs a directory's name"),
        (["pirate", "--out", "x", "--format", "minimind"], 2, "needs a file name that ends in .pth"),
        (["pirate", "--out", "x", "--format", "gguf"], 2, "is not one of 'hf', 'minimind'"),
        (["head", "--out", "x.pth"], 1, "MiniMind ties lm_head to the embeddings"),
        (["pirate", "--out", "x", "--base", "nowhere"], 1, "no model named 'nowhere'"),
        (["pirate", "--out", "x", "--device", "cuda:99"], 2, "use --device cpu or auto"),
    ],
)
def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(
    cli: Cli, here: Path, line: list[str], code: int, says: str
) -> None:
    result = cli("merge", *line)
    assert result.exit_code == code
    assert says in result.stderr.splitlines()[-1]
    assert result.stdout == ""
    assert not list(here.iterdir())


def test_what_exists_is_not_overwritten(cli: Cli, here: Path) -> None:
    (here / "mine.pth").write_text("mine")
    result = cli("merge", "pirate", "--out", "mine.pth")
    assert result.exit_code == 1
    assert result.stderr.endswith("error: mine.pth exists already; choose another --out or remove it\n")
    assert (here / "mine.pth").read_text() == "mine"


@pytest.mark.parametrize("out", ["merged", "merged.pth"])
def test_a_full_disk_is_reported_and_leaves_nothing(shell: Shell, here: Path, out: str) -> None:
    result = shell("merge", "pirate", "--out", out, before="ulimit -f 48")
    assert result.returncode == 1
    assert f"error: {out} could not be written" in result.stderr
    assert "free some space" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(here.iterdir())


def test_everyone_may_read_what_was_merged(shell: Shell, here: Path) -> None:
    result = shell("merge", "pirate", "--out", "merged", before="umask 022")
    assert result.returncode == 0, result.stderr
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (here / "merged").iterdir()}
    assert set(modes.values()) == {0o644}, modes
    assert stat.S_IMODE((here / "merged").stat().st_mode) == 0o755
