"""Drafts change how many steps an answer takes, and nothing else."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from loraserve.base.load import Base, load_base
from loraserve.engine import runner
from loraserve.engine.params import SamplingParams
from loraserve.engine.service import Service
from loraserve.engine.speculation import LONGEST_REST, PromptLookup
from loraserve.kernels import build
from loraserve.lora.spec import parse_spec
from loraserve.registry import Registry
from tests.engine.test_mixed_batch import collect, naive

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=40, temperature=0.9, top_p=0.95, top_k=50, seed=5, ignore_eos=True)
PENALISED = replace(SAMPLED, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3)
PROMPT = list(range(10, 60))
SPECS = ["base", "b", "a:0.5+b:0.7"]

Ask = tuple[list[int], str, SamplingParams]


@contextmanager
def serving(base: Base, registry: Registry, **limits: object) -> Iterator[Service]:
    service = Service(base, registry, **{"max_model_len": 192, "max_num_seqs": 16, **limits})
    service.start()
    try:
        yield service
    finally:
        service.stop()


def answers(service: Service, asked: list[Ask]) -> list[list[tuple[int, object]]]:
    """Tokens and log-probabilities of requests at once."""
    generations = [service.generate(prompt, parse_spec(spec), params) for prompt, spec, params in asked]
    pieces = [list(generation) for generation in generations]
    return [
        [pair for p in own for pair in zip(p.token_ids, p.logprobs or [None] * len(p.token_ids), strict=True)]
        for own in pieces
    ]


def tokens_of(answer: list[tuple[int, object]]) -> list[int]:
    return [token_id for token_id, _ in answer]


@pytest.fixture
def foretold(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`foretold(texts, wrong_every)`: drafts go on as the texts do, but for every so manyth token."""

    def install(texts: list[list[int]], wrong_every: int = 1 << 30) -> None:
        def propose(self: PromptLookup, new: list[int], most: int) -> tuple[int, ...]:
            self._tokens += new
            at = len(self._tokens)
            text = next((text for text in texts if text[:at] == self._tokens), [])
            drafts = text[at : at + most] if at >= self._rest_until else []
            return tuple(t + 1 if (at + i) % wrong_every == 0 else t for i, t in enumerate(drafts))

        monkeypatch.setattr(PromptLookup, "propose", propose)

    return install


def check(base: Base, registry: Registry, asked: list[Ask], foretold: Callable[..., None], **limits: object) -> None:
    """The answers with drafts, right and wrong ones, are those without; log-probabilities to the last bit if asked."""
    with serving(base, registry, speculate=0, **limits) as service:
        wanted = answers(service, asked)
        plain_steps = service.stats()["steps_total"]
        assert service.stats()["drafted_tokens_total"] == 0
    foretold([p + tokens_of(answer) for (p, _, _), answer in zip(asked, wanted, strict=True)], wrong_every=7)
    with serving(base, registry, speculate=3, **limits) as service:
        got = answers(service, asked)
        stats = service.stats()
    assert [tokens_of(a) for a in got] == [tokens_of(a) for a in wanted]
    if limits.get("deterministic"):
        assert got == wanted
    for (_, one), (_, other) in zip(itertools.chain(*got), itertools.chain(*wanted), strict=True):
        assert one is None or one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert stats["generated_tokens_total"] == sum(map(len, wanted))
    assert 0 < stats["accepted_tokens_total"] < stats["drafted_tokens_total"], "some held and some did not"
    assert stats["steps_total"] < 0.8 * plain_steps


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED, replace(PENALISED, temperature=0.0, logprobs=3)])
@pytest.mark.parametrize("spec", SPECS)
def test_tokens_are_those_without_drafts(base, registry, foretold, spec: str, params: SamplingParams) -> None:
    check(base, registry, [(PROMPT, spec, params)], foretold)


def test_tokens_are_those_without_drafts_where_others_run(base, registry, foretold) -> None:
    asked = [(PROMPT, "base", SAMPLED), ([70, 80, 90], "b", replace(GREEDY, max_tokens=55, logprobs=2)),
             ([5, 6], "a+c:-0.5", replace(PENALISED, max_tokens=25))]  # fmt: skip
    check(base, registry, asked, foretold)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_deterministic_is_so_to_the_last_bit_with_drafts_too(tiny_base_dir, registry, foretold, dtype: str) -> None:
    base = load_base(str(tiny_base_dir), device="cpu", dtype=dtype)
    asked = [(PROMPT, "b", replace(SAMPLED, logprobs=5)), ([70, 80], "a:0.5+b:0.7", replace(GREEDY, logprobs=5))]
    check(base, registry, asked, foretold, deterministic=True)


def test_tokens_are_those_without_drafts_without_kernels(tiny_base_dir, registry, foretold, monkeypatch) -> None:
    monkeypatch.setenv("LORASERVE_KERNELS", "off")
    build.library.cache_clear()
    try:
        base = load_base(str(tiny_base_dir), device="cpu", dtype="float32")
        check(base, registry, [(PROMPT, "b", SAMPLED), ([5, 6], "base", GREEDY)], foretold)
        assert not base.model.model.fused
    finally:
        build.library.cache_clear()


def test_merged_adapters_are_drafted_for_as_well(base, registry, foretold) -> None:
    asked: list[Ask] = [(PROMPT, "b", GREEDY), ([5, 6], "base", GREEDY)]
    with serving(base, registry, speculate=0) as service:
        service.merge("b")
        wanted = [tokens_of(a) for a in answers(service, asked)]
    foretold([PROMPT + wanted[0]], wrong_every=7)
    with serving(base, registry, speculate=3) as service:
        service.merge("b")
        assert [tokens_of(a) for a in answers(service, asked)] == wanted
        assert service.stats()["accepted_tokens_total"] > 20


def test_text_that_repeats_itself_takes_fewer_steps_than_tokens(base, registry) -> None:
    repeats = replace(GREEDY, max_tokens=120, frequency_penalty=-2.0, repetition_penalty=0.5)
    with serving(base, registry, speculate=3) as service:
        (answer,) = answers(service, [(PROMPT, "b", repeats)])
        steps, stats = service.stats()["steps_total"], service.stats()
    assert len(answer) == 120
    assert steps < 60
    assert stats["accepted_tokens_total"] == 120 - steps
    with serving(base, registry, speculate=0) as service:
        assert answers(service, [(PROMPT, "b", repeats)]) == [answer]


@pytest.mark.parametrize("slots", [{}, {"prefix_memory": 1}], ids=["with a free slot", "in the same slot"])
def test_a_refused_draft_leaves_no_trace_in_the_cache(base, registry, foretold, slots: dict[str, int]) -> None:
    with serving(base, registry, max_num_seqs=2, **slots) as service:
        plain = naive(service, PROMPT, "b", 30)
        foretold([PROMPT + plain], wrong_every=2)
        running = service.generate(PROMPT, parse_spec("b"), replace(GREEDY, max_tokens=30))
        next(running)
        beside = collect(service.generate([*PROMPT, *plain[:3]], parse_spec("b"), replace(GREEDY, max_tokens=9)))
        assert beside == naive(service, [*PROMPT, *plain[:3]], "b", 9)
        collect(running)
        stats = service.stats()
        assert stats["drafted_tokens_total"] > stats["accepted_tokens_total"] > 0
        turn = [*PROMPT, *plain, 9, 8, 7]
        assert collect(service.generate(turn, parse_spec("b"), GREEDY)) == naive(service, turn, "b", 40)
        assert service.stats()["prefix_shared_tokens_total"] >= stats["prefix_shared_tokens_total"] + len(PROMPT) + 29


def test_stop_token_stop_string_and_max_tokens_end_an_answer_in_the_middle_of_its_drafts(
    base, registry, foretold
) -> None:
    with serving(base, registry, speculate=3) as service:
        plain = naive(service, PROMPT, "b", 12)
        foretold([PROMPT + plain])
        stopped = []
        for last in range(1, 9):
            cut = plain.index(plain[last]) + 1
            text = base.tokenizer.decode(plain[: last + 1])
            for params, count in (
                (replace(GREEDY, max_tokens=last), last),
                (replace(GREEDY, stop_token_ids=(plain[last],)), cut),
                (replace(GREEDY, stop=(text[-2:],)), None),
            ):
                generation = service.generate(PROMPT, parse_spec("b"), params)
                pieces = list(generation)
                ids = [token_id for piece in pieces for token_id in piece.token_ids]
                assert ids == plain[: len(ids)]
                assert generation.completion_tokens == len(ids)
                if count is None:
                    shown = "".join(piece.text for piece in pieces)
                    assert shown == text[: text.find(text[-2:])]
                    assert text.startswith(shown + text[-2:])
                else:
                    assert len(ids) == count
                stopped.append(pieces[-1].finish_reason)
                service.logits([1])  # after whatever the last step left to do
                assert service.stats()["requests_running"] == 0
        assert stopped == ["length", "stop", "stop"] * 8
        assert service.stats()["accepted_tokens_total"] > 20


def test_drafts_end_where_the_context_does(base, registry, foretold) -> None:
    with serving(base, registry, max_model_len=70) as service:
        plain = naive(service, PROMPT, "base", 20)
        foretold([[*PROMPT, *plain, *range(100, 200)]])
        assert collect(service.generate(PROMPT, (), replace(GREEDY, max_tokens=None))) == plain
        assert service.stats()["accepted_tokens_total"] > 10


def test_a_draft_that_is_not_finite_fails_nobody(base, registry, foretold, monkeypatch) -> None:
    sample = runner.sample

    def spoiled(logits, sequences, drafts):
        return [None if 500 in d else t for t, d in zip(sample(logits, sequences, drafts), drafts, strict=True)]

    monkeypatch.setattr(runner, "sample", spoiled)
    with serving(base, registry) as service:
        plain = naive(service, PROMPT, "b", 12)
        assert 500 not in plain
        foretold([[*PROMPT, *plain[:3], 500]])
        cleared = []
        cache = service._engine._runner._cache
        clear = cache.clear
        monkeypatch.setattr(cache, "clear", lambda *what: (cleared.append(what), clear(*what)))
        assert collect(service.generate(PROMPT, parse_spec("b"), replace(GREEDY, max_tokens=12))) == plain
    # The last token and its drafts, to be computed again; and once more after a rest, when the bad one is the first.
    assert [what[1:] for what in cleared] == [(len(PROMPT), 4), (len(PROMPT) + 2, 2)]


@pytest.mark.parametrize(("count", "some"), [(3, True), (4, False)])
def test_drafts_fill_a_step_up_to_the_rows_that_cost_nothing(base, registry, foretold, count: int, some: bool) -> None:
    with serving(base, registry) as service:
        prompts = [[100 + i, 5, 6] for i in range(count)]
        wanted = [naive(service, prompt, "base", 30) for prompt in prompts]
        foretold([p + a for p, a in zip(prompts, wanted, strict=True)])
        asked = [service.generate(prompt, (), replace(GREEDY, max_tokens=30)) for prompt in prompts]
        service.logits([1])
        assert [collect(generation) for generation in asked] == wanted
        assert (service.stats()["drafted_tokens_total"] > 10) == some


def test_models_with_experts_draft_nothing(moe, registry) -> None:
    with serving(moe, registry, speculate=3) as service:
        repeats = replace(GREEDY, frequency_penalty=-2.0)
        assert len(collect(service.generate([5, 6, 7], (), repeats))) == 40
        assert service.stats()["drafted_tokens_total"] == 0
        assert service.stats()["steps_total"] == 40


def test_lookup_goes_on_from_the_latest_occurrence_and_round() -> None:
    def first(tokens: list[int], most: int = 3) -> tuple[int, ...]:
        return PromptLookup().propose(tokens, most)

    assert first([0, 1, 2, 3, 9, 5, 8, 1, 2, 3, 7, 0, 1, 2, 3]) == (9, 5), "two to begin with"
    assert first([0, 1, 2, 3, 9, 5, 0, 1, 2, 3, 7, 6, 0, 1, 2, 3]) == (7, 6)
    assert first([0, 1, 2, 3, 9, 5, 0, 1, 2, 3, 7, 6, 0, 1, 2, 3], most=1) == (7,)
    assert first([1, 2, 3, 4]) == ()
    assert first([1, 2, 3, 9, 1, 2, 3]) == ()
    assert first([6, 6, 6, 6, 6]) == (6, 6)
    assert first([1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]) == (4, 1)


def test_lookup_of_tokens_that_come_one_by_one_is_that_of_all_at_once() -> None:
    text = [(i * i) % 11 for i in range(80)]
    lookup = PromptLookup()
    for end in range(1, len(text) + 1):
        assert lookup.propose([text[end - 1]], 3) == PromptLookup().propose(text[:end], 3)
        assert lookup.num_tokens == end


def test_drafts_grow_while_they_hold_and_rest_longer_each_time_they_do_not() -> None:
    lookup = PromptLookup()
    drafts = lookup.propose([1, 2] * 5, 9)
    lengths = []
    for _ in range(3):
        lengths.append(len(drafts))
        lookup.learn(len(drafts), len(drafts))
        drafts = lookup.propose([1, 2], 9)
    assert lengths == [2, 3, 4]
    lookup.learn(len(drafts), 2)
    assert len(lookup.propose([1, 2], 9)) == 2
    rests, going_on = [], itertools.cycle([1, 2])
    for _ in range(9):
        lookup.learn(1, 0)
        rest = 0
        while not (drafts := lookup.propose([next(going_on)], 9)):
            rest += 1
        assert len(drafts) == 1
        rests.append(rest)
    assert rests[:4] == [1, 2, 4, 8]
    assert rests[-1] == LONGEST_REST
    lookup.learn(1, 1)
    lookup.learn(1, 0)
    assert not lookup.propose([next(going_on)], 9)
    assert lookup.propose([next(going_on)], 9)
