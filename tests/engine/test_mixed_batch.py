"""Batching does not change answers: every row of a mixed batch equals the same request alone and the naive loop."""

from dataclasses import replace

import pytest
import torch

from loraserve.engine.generation import Generation
from loraserve.engine.params import SamplingParams
from loraserve.engine.service import Service
from loraserve.lora.spec import parse_spec

PROMPTS = [[5, 6, 7], list(range(10, 60)), [70, 80, 90], list(range(200, 205)), [100, 200], [5, 6], list(range(30, 70))]
SPECS = ["base", "a", "b", "a:0.5+b:0.7", "b:0", "c", "a+c:-0.5"]
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


def collect(generation: Generation) -> list[int]:
    return [token_id for piece in generation for token_id in piece.token_ids]


def naive(service: Service, prompt: list[int], spec: str, count: int) -> list[int]:
    """Greedy decoding that recomputes the whole sequence for every token: no cache, no batch."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(service.logits(ids, parse_spec(spec))[-1].argmax()))
    return ids[len(prompt) :]


def test_mixed_adapter_batch_matches_each_request_alone(service: Service) -> None:
    asked = list(zip(PROMPTS, map(parse_spec, SPECS), strict=True))
    alone = [collect(service.generate(prompt, spec, GREEDY)) for prompt, spec in asked]
    steps_alone = service.stats()["steps_total"]
    watched = replace(GREEDY, logprobs=20)
    pieces = [list(g) for g in [service.generate(prompt, spec, watched) for prompt, spec in asked]]
    steps_mixed = service.stats()["steps_total"] - steps_alone
    assert steps_mixed < min(2 * 20, steps_alone / 3), "the requests must have shared their steps"
    assert [[i for piece in answer for i in piece.token_ids] for answer in pieces] == alone
    assert alone == [naive(service, p, s, 20) for p, s in zip(PROMPTS, SPECS, strict=True)]
    for (prompt, spec), answer, ids in zip(asked, pieces, alone, strict=True):
        exact = service.logits(prompt + ids[:-1], spec)[len(prompt) - 1 :].log_softmax(dim=-1)
        tokens = [token for piece in answer for token in piece.logprobs]
        for row, token in zip(exact, tokens, strict=True):
            assert len(token.top) == 20
            assert all(abs(row[other.token_id].item() - other.logprob) < 1e-4 for other in token.top)


def test_adapters_and_blends_change_the_answer(service: Service) -> None:
    prompt = PROMPTS[1]
    answers = {s: tuple(collect(service.generate(prompt, parse_spec(s), GREEDY))) for s in SPECS}
    assert answers["b:0"] == answers["base"]
    assert len(set(answers.values())) == len(SPECS) - 1


def test_early_end_late_join_and_cancellation_leave_the_others_alone(service: Service) -> None:
    long = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    short = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    alone = [collect(service.generate(PROMPTS[i], parse_spec(SPECS[i]), long)) for i in (0, 1, 2)]
    first = service.generate(PROMPTS[0], parse_spec(SPECS[0]), long)
    early = service.generate(PROMPTS[3], parse_spec(SPECS[3]), short)
    cancelled = service.generate(PROMPTS[4], parse_spec("c"), long)
    second = service.generate(PROMPTS[1], parse_spec(SPECS[1]), long)
    assert len(collect(early)) == 3
    next(cancelled)
    cancelled.cancel()
    late = service.generate(PROMPTS[2], parse_spec(SPECS[2]), long)
    assert [collect(first), collect(second), collect(late)] == alone
    assert list(cancelled) == []


def test_cancelled_request_frees_its_slot(base, registry) -> None:
    service = Service(base, registry, max_model_len=2048)
    service.start()
    try:
        forever = SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True)
        generation = service.generate([1, 2], (), forever)
        next(generation)
        generation.cancel()
        generation.cancel()
        service.logits([1])  # runs between two steps, after the cancellation
        assert service.stats()["requests_running"] == 0
        assert service.stats()["generated_tokens_total"] < 1000
    finally:
        service.stop()


def test_prompt_longer_than_a_step_is_computed_in_chunks(base, registry) -> None:
    service = Service(base, registry, max_model_len=1400, max_num_seqs=2)
    service.start()
    try:
        prompt = [(7 * i) % 500 + 10 for i in range(1300)]
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        assert collect(service.generate(prompt, parse_spec("b"), params)) == naive(service, prompt, "b", 8)
    finally:
        service.stop()


def test_seeded_request_gives_the_same_text_alone_and_among_15_others(service: Service) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, top_k=50, seed=11, ignore_eos=True)
    spec = parse_spec("b")
    alone = collect(service.generate(PROMPTS[1], spec, params))
    others = [SamplingParams(max_tokens=30, seed=seed, ignore_eos=True) for seed in range(15)]
    crowd = [service.generate([20 + i], parse_spec(SPECS[i % 7]), p) for i, p in enumerate(others)]
    among = collect(service.generate(PROMPTS[1], spec, params))
    for generation in crowd:
        collect(generation)
    assert among == alone
    again = collect(service.generate(PROMPTS[1], spec, SamplingParams(max_tokens=24, seed=12, ignore_eos=True)))
    assert again != alone


def test_base_rows_keep_their_exact_bits_beside_adapter_rows(base, registry) -> None:
    from loraserve.base.attention import PackedAttention
    from loraserve.lora.batch import LoraBatch
    from loraserve.lora.stack import AdapterStack

    ids = torch.arange(10, 22)
    attention = PackedAttention([5, 7])
    stack = AdapterStack([registry.load("a").weights, registry.load("b").weights])
    lora = LoraBatch.from_segments(stack, [(5, []), (7, [(0, 0.5), (1, 1.0)])], "cpu")
    with torch.inference_mode():
        plain = base.model(ids, attention.positions, attention)
        mixed = base.model(ids, attention.positions, attention, lora)
    assert torch.equal(plain[:5], mixed[:5])
    assert not torch.allclose(plain[5:], mixed[5:], atol=1e-3)
    assert LoraBatch.from_segments(stack, [(5, []), (7, [(0, 0.0)])], "cpu") is None


@pytest.mark.parametrize("count", [1, 40])
def test_more_requests_than_slots_are_all_answered(service: Service, count: int) -> None:
    generations = [service.generate([10 + i], parse_spec(SPECS[i % 7]), GREEDY) for i in range(count)]
    assert all(len(collect(g)) == 20 for g in generations)
