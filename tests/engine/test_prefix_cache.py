"""What was computed once is not computed again, and no answer changes by that."""

import pytest

from loraserve.engine.params import SamplingParams
from loraserve.engine.service import Service
from loraserve.lora.config import LoraConfig
from loraserve.lora.spec import parse_spec
from tests.engine.test_mixed_batch import collect, naive

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SYSTEM = list(range(10, 80))


def ask(service: Service, prompt: list[int], spec: str) -> list[int]:
    return collect(service.generate(prompt, parse_spec(spec), GREEDY))


@pytest.mark.parametrize("spec", ["base", "b", "a:0.5+b:0.7"])
def test_turns_and_shared_system_prompts_are_answered_as_if_computed_anew(service: Service, spec: str) -> None:
    first = ask(service, [*SYSTEM, 3, 4], spec)
    shared = service.stats()["prefix_shared_tokens_total"]
    turns = [[*SYSTEM, 3, 4, *first, 9, 8, 7], [*SYSTEM, 5, 5, 5]]
    answers = [ask(service, turn, spec) for turn in turns]
    assert service.stats()["prefix_shared_tokens_total"] - shared == len(SYSTEM) + 2 + len(first) - 1 + len(SYSTEM)
    assert answers == [naive(service, turn, spec, 12) for turn in turns]


def test_other_adapters_at_once_never_read_each_others_values(service: Service) -> None:
    specs = ["base", "a", "b", "c", "b:0.5", "a+b"]
    prompt = [*SYSTEM, 3]
    for _ in range(2):  # the second time, every prefix is there
        generations = [service.generate(prompt, parse_spec(spec), GREEDY) for spec in specs]
        answers = [collect(generation) for generation in generations]
        assert answers == [naive(service, prompt, spec, 12) for spec in specs]
    assert service.stats()["prefix_shared_tokens_total"] >= len(specs) * len(SYSTEM)
    assert len({tuple(answer) for answer in answers}) == len(specs)


def test_retrained_adapter_of_the_same_name_reads_no_old_values(base, registry, random_adapter) -> None:
    service = Service(base, registry, max_model_len=192, max_num_seqs=4)
    service.start()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    try:
        for seed in (70, 71):
            adapter = random_adapter(base.shapes, ["q_proj", "v_proj"], 3, seed)
            registry.publish("again", adapter, config, {"base_fingerprint": base.fingerprint})
            shared = service.stats()["prefix_shared_tokens_total"]
            answer = ask(service, [*SYSTEM, 3], "again")
            assert service.stats()["prefix_shared_tokens_total"] == shared
            assert answer == naive(service, [*SYSTEM, 3], "again", 12)
        ask(service, [*SYSTEM, 3], "again")
        assert service.stats()["prefix_shared_tokens_total"] > shared, "the new one's own values are shared"
    finally:
        service.stop()
        registry.remove("again")


def test_memory_bounds_what_is_kept(base, registry) -> None:
    service = Service(base, registry, max_model_len=192, max_num_seqs=1, prefix_memory=1)  # no slot beyond the one
    service.start()
    try:
        ask(service, [*SYSTEM, 3], "base")
        ask(service, list(range(200, 250)), "base")
        shared = service.stats()["prefix_shared_tokens_total"]
        ask(service, [*SYSTEM, 3], "base")
        assert service.stats()["prefix_shared_tokens_total"] == shared
        assert service.stats()["prefix_slots_held"] == 1
    finally:
        service.stop()


def test_cancelled_and_stopped_answers_leave_their_prefix(service: Service) -> None:
    generation = service.generate([*SYSTEM, 6], (), SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True))
    next(generation)
    generation.cancel()
    service.logits([1])  # runs between two steps, after the cancellation
    shared = service.stats()["prefix_shared_tokens_total"]
    assert ask(service, [*SYSTEM, 6, 1], "base") == naive(service, [*SYSTEM, 6, 1], "base", 12)
    assert service.stats()["prefix_shared_tokens_total"] - shared == len(SYSTEM) + 1
