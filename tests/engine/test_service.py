"""What is refused before anything is queued, what a crash does, and that a republished adapter is noticed."""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from loraserve.engine.generation import Generation
from loraserve.engine.llm import LLM
from loraserve.engine.params import SamplingParams
from loraserve.engine.scheduler import Chunk
from loraserve.engine.service import Service
from loraserve.errors import AdapterNotFound, ContextLengthExceeded, InvalidRequest, NotFinite, NotReady, QueueFull
from loraserve.lora.adapter import Adapter, LoraWeight
from loraserve.lora.config import LoraConfig
from loraserve.lora.spec import parse_spec
from loraserve.registry import Registry

ENDLESS = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)


def test_bad_requests_are_refused_and_the_next_good_one_is_answered(service: Service) -> None:
    with pytest.raises(AdapterNotFound, match="did you mean 'a'"):
        service.generate([1], parse_spec("aa"), ENDLESS)
    with pytest.raises(ContextLengthExceeded, match="192"):
        service.generate([1], (), SamplingParams(max_tokens=10_000_000))
    with pytest.raises(ContextLengthExceeded) as caught:
        service.generate([1] * 192, (), SamplingParams())
    assert caught.value.param == "messages"
    with pytest.raises(InvalidRequest, match="token ids outside"):
        service.generate([10**6], (), ENDLESS)
    with pytest.raises(InvalidRequest, match="empty"):
        service.generate([], (), ENDLESS)
    assert list(service.generate([1], (), SamplingParams(max_tokens=2)))


def test_full_queue_is_refused_and_drains(base, registry) -> None:
    service = Service(base, registry, max_model_len=192, max_num_seqs=2, max_queue=3)
    service.start()
    try:
        taken = [service.generate([5], (), ENDLESS) for _ in range(5)]
        with pytest.raises(QueueFull):
            service.generate([5], (), ENDLESS)
        for generation in taken:
            generation.cancel()
        assert list(service.generate([5], (), SamplingParams(max_tokens=2, ignore_eos=True)))
    finally:
        service.stop()


def test_crash_of_a_step_fails_every_waiter_and_ends_readiness(base, registry, monkeypatch) -> None:
    service = Service(base, registry, max_model_len=192, max_num_seqs=2)
    service.start()
    generations = [service.generate([5], (), ENDLESS) for _ in range(3)]
    next(generations[0])

    def crash(chunks: object, meanwhile: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(service._engine._runner, "run", crash)
    for generation in generations:
        with pytest.raises(NotReady, match="out of memory"):
            list(generation)
    assert not service.ready
    with pytest.raises(NotReady):
        service.generate([5], (), ENDLESS)


def test_a_reader_is_woken_for_the_first_and_the_last_token_and_as_often_as_is_left_between(
    service, monkeypatch
) -> None:
    def pieces(wake_ups: float) -> list[list[int]]:
        monkeypatch.setattr("loraserve.engine.worker.WAKE_UPS", wake_ups)
        return [piece.token_ids for piece in service.generate([5], (), ENDLESS)]

    first, *rest = pieces(0.001)
    assert len(first) == 1 and [len(piece) for piece in rest] == [149], "one wait of 1000 s, ended by the last token"
    often = pieces(1e9)
    assert len(often) > 10
    assert [token for piece in often for token in piece] == [*first, *rest[0]]


def test_what_a_reader_was_not_woken_for_comes_before_the_error(base, registry, monkeypatch) -> None:
    monkeypatch.setattr("loraserve.engine.worker.WAKE_UPS", 0.001)
    service = Service(base, registry, max_model_len=2048)
    service.start()
    generation = service.generate([5], (), SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True))
    assert len(next(generation).token_ids) == 1
    while service.stats()["generated_tokens_total"] < 10:
        time.sleep(0.001)
    service.stop()
    assert len(next(generation).token_ids) >= 9
    with pytest.raises(NotReady, match="stopped"):
        next(generation)


def test_nobody_waits_for_a_token_while_a_prompt_is_read(base, registry, monkeypatch) -> None:
    """Else a token that is there would come after a neighbour's long prompt."""
    monkeypatch.setattr("loraserve.engine.worker.WAKE_UPS", 0.001)
    service = Service(base, registry, max_model_len=2048, speculate=0)
    service.start()
    reading: list[tuple[int, int]] = []
    run = service._engine._runner.run

    def watched(chunks: list[Chunk], meanwhile: Callable[[], None]) -> object:
        if any(chunk.count > 1 for chunk in chunks):
            meanwhile()
            reading.append((len(first._sequence.output_token_ids), first._outbox.qsize()))
        return run(chunks, meanwhile)

    first = service.generate([5], (), SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True))
    assert len(next(first).token_ids) == 1
    while len(first._sequence.output_token_ids) < 10:
        time.sleep(0.001)
    assert first._outbox.empty()
    monkeypatch.setattr(service._engine._runner, "run", watched)
    second = service.generate([5, 6, 7, 8], (), SamplingParams(max_tokens=1, temperature=0.0))
    assert len(list(second)) == 1
    service.stop()
    assert reading and reading[0][0] >= 10 and reading[0][1] == reading[0][0] - 1, "all but the one that was read"


def test_readers_are_woken_when_the_model_computes_and_before_whoever_else_asks_the_engine(
    base, registry, monkeypatch
) -> None:
    """Before, each of them would take the interpreter from the engine; and none waits for a call that computes."""
    monkeypatch.setattr("loraserve.engine.worker.WAKE_UPS", 1e9)
    service = Service(base, registry, max_model_len=2048, speculate=0)
    service.start()
    runner, seen = service._engine._runner, []
    prepared, model = runner._lora_batch, runner._model.forward
    generation = service.generate([5], (), SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True))
    next(generation)
    outbox = generation._outbox

    def preparing(chunks: list[Chunk]) -> object:
        seen.append(("prepares", len(service._worker._ready)))
        return prepared(chunks)

    def computing(*args: object, **kwargs: object) -> object:
        seen.append(("computes", len(service._worker._ready)))
        return model(*args, **kwargs)

    runner._lora_batch, runner._model.forward = preparing, computing
    try:
        while len(seen) < 10:
            time.sleep(0.001)
        steps = seen[2:10]
        assert service._worker.call(lambda: len(service._worker._ready)) == 0
    finally:
        del runner._lora_batch, runner._model.forward
        service.stop()
    assert set(steps) == {("prepares", 1), ("computes", 0)} and not outbox.empty()


def test_an_answer_that_a_stop_string_ended_is_not_failed_by_what_comes_after_it(service) -> None:
    generation = service.generate([5], (), SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    text = "".join(piece.text for piece in generation)
    stop = text[len(text) // 2 :][:2]
    ended = service.generate([5], (), SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, stop=(stop,)))
    while ended._outbox.qsize() < 20:
        time.sleep(0.001)
    ended._outbox.put(NotReady("the engine crashed"))
    (piece,) = ended
    assert piece.finish_reason == "stop" and piece.text == text[: text.index(stop)]


def test_stopping_fails_what_is_in_flight(base, registry) -> None:
    service = Service(base, registry, max_model_len=2048)
    service.start()
    generation = service.generate([5], (), SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True))
    next(generation)
    service.stop()
    with pytest.raises(NotReady, match="stopped"):
        list(generation)
    assert not service.ready


@pytest.fixture
def overflowing(base, registry, random_adapter, tmp_path) -> Registry:
    """The shared registry's adapter `b`, and one whose numbers are finite and whose products are not."""
    mine = Registry(tmp_path, base.shapes, base.fingerprint)
    shutil.copytree(registry.get("b").path, tmp_path / "b")
    sound = random_adapter(base.shapes, ["down_proj"], 2, 9)
    weights = {t: LoraWeight(w.A * 1e18, w.B * 1e30, w.scaling) for t, w in sound.weights.items()}
    config = LoraConfig(r=2, lora_alpha=4, target_modules=sorted(weights))
    mine.publish("huge", Adapter(weights), config, {"base_fingerprint": base.fingerprint})
    return mine


@pytest.mark.parametrize("cancelled", [False, True])
def test_request_that_overflows_fails_alone_and_leaves_a_clean_slot(base, overflowing, cancelled) -> None:
    service = Service(base, overflowing, max_model_len=2048, max_num_seqs=2)
    service.start()
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)

    def collect(generation: Generation) -> list[int]:
        return [i for piece in generation for i in piece.token_ids]

    try:
        asked = ([7, 8], parse_spec("b")), (list(range(10, 210)), ())
        alone = [collect(service.generate(*request, params)) for request in asked]
        # `huge` takes the first slot; a prompt of several steps can be cancelled before its first token.
        huge = service.generate([11] * 1500, parse_spec("huge"), params)
        beside = service.generate(*asked[0], params)
        if cancelled:
            huge.cancel()
        else:
            with pytest.raises(NotFinite, match="float32"):
                list(huge)
        assert collect(beside) == alone[0]
        both = [service.generate(*request, params) for request in asked]
        assert [collect(generation) for generation in both] == alone
        shared = service.stats()["prefix_shared_tokens_total"]
        with pytest.raises(NotFinite, match="float32"):
            list(service.generate([11] * 1500, parse_spec("huge"), params))
        assert service.stats()["prefix_shared_tokens_total"] == shared, "values that nobody has seen serve nobody"
        assert service.ready
    finally:
        service.stop()


def test_blend_larger_than_the_memory_for_adapters_is_refused_for_good(base, registry) -> None:
    service = Service(base, registry, adapter_memory=registry.load("b").num_bytes)
    with pytest.raises(InvalidRequest, match="blend fewer, or raise --adapter-memory"):
        service.adapters.resolve(parse_spec("b+a"))
    assert service.adapters.resolve(parse_spec("a"))[0][0].name == "a", "and nothing of it stays behind"


def test_one_call_may_name_more_adapters_than_fit_at_once(tiny_base_dir, registry) -> None:
    adapters, sampling = ["a", "b", "c", "b", "a", "c"], SamplingParams(max_tokens=20, temperature=0.0)
    limits = {"dtype": "float32", "device": "cpu", "max_model_len": 192}
    with LLM(str(tiny_base_dir), registry.root, **limits) as llm:
        wanted = llm.generate(["hello"] * 6, adapters, sampling)
    size = registry.load("b").num_bytes
    with LLM(str(tiny_base_dir), registry.root, adapter_memory=size, **limits) as llm:
        assert llm.generate(["hello"] * 6, adapters, sampling) == wanted
    assert [answer.adapter for answer in wanted] == adapters


def test_adapter_wanted_by_many_threads_is_loaded_once(base, registry, monkeypatch) -> None:
    service = Service(base, registry, max_model_len=192)
    loads: list[str] = []
    load = Registry.load

    def slow(self: Registry, name: str) -> Adapter:
        loads.append(name)
        time.sleep(0.2)
        return load(self, name)

    monkeypatch.setattr(Registry, "load", slow)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: service.adapters.resolve(parse_spec("a"))[0][0], range(8)))
    assert loads == ["a"]
    assert len(set(map(id, found))) == 1


def test_prompt_that_cannot_fit_is_refused_unread(service: Service, monkeypatch) -> None:
    text = "x" * (192 * service.base.tokenizer.longest_token + 1)
    monkeypatch.setattr(type(service.base.tokenizer), "encode", lambda self, text: pytest.fail("it was tokenized"))
    with pytest.raises(ContextLengthExceeded, match="characters cannot fit"):
        service.encode(text)


def test_republished_adapter_answers_from_the_next_request_on(service: Service, random_adapter) -> None:
    shapes, registry = service.base.shapes, service.registry

    def publish(seed: int) -> None:
        adapter = random_adapter(shapes, ["q_proj", "up_proj"], 4, seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=sorted(adapter.weights))
        registry.publish("fresh", adapter, config, {"base_fingerprint": service.base.fingerprint})

    publish(50)
    spec = parse_spec("fresh")
    old = service.logits([4, 5, 6], spec)
    running = service.generate([4, 5, 6], spec, ENDLESS)
    next(running)
    publish(51)
    new = service.logits([4, 5, 6], spec)
    assert not torch.allclose(old, new, atol=1e-3)
    assert torch.equal(service.logits([4, 5, 6], spec), new)
    assert list(running)[-1].finish_reason == "length"
    assert service.unload("fresh")
    assert not service.unload("fresh")
    assert torch.equal(service.logits([4, 5, 6], spec), new)


def test_kv_memory_lowers_the_number_of_sequences(base, registry) -> None:
    from loraserve.engine.kv_cache import KVCache

    one = KVCache.bytes_per_token(base.config, base.dtype) * 192
    assert Service(base, registry, max_model_len=192, kv_memory=3 * one + 1).max_num_seqs == 3
    with pytest.raises(InvalidRequest, match="kv-memory"):
        Service(base, registry, max_model_len=192, kv_memory=one - 1)


def test_llm_generates_chats_and_scores(tiny_base_dir, registry) -> None:
    with LLM(str(tiny_base_dir), registry.root, dtype="float32", device="cpu", max_model_len=192) as llm:
        first, second = llm.generate(["hello", [10, 11, 12]], adapter=["a", None])
        assert (first.adapter, second.adapter) == ("a", "base")
        assert second.prompt_tokens == 3
        scores = llm.logits([10, 11, 12])
        assert second.token_ids[0] == int(scores[-1].argmax())
        assert llm.generate("hello", adapter="a")[0].text == first.text
        answer = llm.chat([{"role": "user", "content": "hello"}], "b", SamplingParams(max_tokens=5, logprobs=1))
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
        with pytest.raises(InvalidRequest, match="as many adapters"):
            llm.generate(["x", "y"], adapter=["a"])


def test_dropped_in_directory_changed_by_hand_is_read_again(base, registry, random_adapter, tmp_path) -> None:
    mine = Registry(tmp_path, base.shapes, base.fingerprint)
    service = Service(base, mine, max_model_len=192)
    service.start()
    try:
        shutil.copytree(registry.get("a").path, tmp_path / "dropped")
        before = service.logits([4, 5, 6], parse_spec("dropped"))
        assert torch.equal(before, service.logits([4, 5, 6], parse_spec("dropped")))
        shutil.rmtree(tmp_path / "dropped")
        shutil.copytree(registry.get("b").path, tmp_path / "dropped")
        after = service.logits([4, 5, 6], parse_spec("dropped"))
        assert not torch.allclose(before, after, atol=1e-3)
    finally:
        service.stop()


def test_absurd_numbers_are_refused_and_tiny_temperatures_are_greedy(service: Service) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(top_k=10**400)
    assert caught.value.param == "top_k"
    tiny = SamplingParams(max_tokens=5, temperature=1e-39, ignore_eos=True)
    greedy = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    first = [t for piece in service.generate([4, 5], (), tiny) for t in piece.token_ids]
    assert first == [t for piece in service.generate([4, 5], (), greedy) for t in piece.token_ids]


def test_cancelling_wakes_a_thread_that_waits_and_late_calls_fail(base, registry) -> None:
    service = Service(base, registry, max_model_len=192, max_num_seqs=1)
    service.start()
    first = service.generate([5], (), ENDLESS)
    waiting = service.generate([5], (), ENDLESS)  # no slot is free: nothing arrives for it
    reader = threading.Thread(target=lambda: list(waiting))
    reader.start()
    waiting.cancel()
    reader.join(timeout=10)
    assert not reader.is_alive()
    first.cancel()
    service.stop()
    with pytest.raises(NotReady):
        service.logits([5])


def test_adapters_serve_in_the_dtype_of_their_base(tiny_base_dir, registry) -> None:
    from loraserve.base.load import load_base

    half = load_base(str(tiny_base_dir), device="cpu", dtype="bfloat16")
    service = Service(half, registry, max_model_len=192)
    ((adapter, _),) = service.adapters.resolve(parse_spec("b"))
    stored = registry.load("b")
    for target, weight in adapter.weights.items():
        assert torch.equal(weight.A, stored.weights[target].A.bfloat16())
        assert torch.equal(weight.B, stored.weights[target].B.bfloat16())
    service.start()
    try:
        full = Service(load_base(str(tiny_base_dir), device="cpu", dtype="float32"), registry, max_model_len=192)
        full.start()
        for spec in ("base", "b"):
            rough, exact = (s.logits(list(range(10, 40)), parse_spec(spec)) for s in (service, full))
            assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
        full.stop()
    finally:
        service.stop()
