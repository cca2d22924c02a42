"""Adapters come and go between disk, host and device while requests run, wait, fail and are cancelled."""

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from loraserve.base.load import Base
from loraserve.engine.adapter_cache import AdapterCache
from loraserve.engine.adapter_tiers import AdapterTiers
from loraserve.engine.generation import Generation
from loraserve.engine.params import SamplingParams
from loraserve.engine.service import Service
from loraserve.errors import AdapterRefused, Conflict, InvalidRequest, NotReady
from loraserve.lora.adapter import Adapter
from loraserve.lora.config import LoraConfig
from loraserve.lora.spec import parse_spec
from loraserve.registry import Registry

NAMES = [f"n{i}" for i in range(10)]
SHORT = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
PROMPT = [7, 8, 9]


@pytest.fixture
def many(base: Base, tmp_path, random_adapter) -> Registry:
    """Ten adapters of several ranks and targets."""
    return fill(Registry(tmp_path / "many", base.shapes, base.fingerprint), random_adapter)


def fill(registry: Registry, random_adapter: Callable[..., Adapter]) -> Registry:
    for seed, name in enumerate(NAMES):
        publish(registry, random_adapter, name, seed)
    return registry


def publish(registry: Registry, random_adapter: Callable[..., Adapter], name: str, seed: int) -> None:
    r = 1 + seed % 4
    adapter = random_adapter(registry.shapes, [["q_proj", "up_proj"], "all-linear"][seed % 2], r, seed)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=sorted(adapter.weights))
    registry.publish(name, adapter, config, {"base_fingerprint": registry.fingerprint})


@pytest.fixture
def make(base: Base, many: Registry) -> Iterator[Callable[..., Service]]:
    services = []

    def start(**limits: Any) -> Service:
        services.append(Service(base, many, **{"max_model_len": 192, "max_num_seqs": 8, **limits}))
        services[-1].start()
        return services[-1]

    yield start
    for service in services:
        service.stop()


class Gate:
    """Loads of chosen adapters that stand still until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.names, self.reached, self.open = set(names), threading.Event(), threading.Event()
        load = Registry.load

        def slow(registry: Registry, name: str) -> Adapter:
            if name in self.names:
                self.reached.set()
                assert self.open.wait(30)
            return load(registry, name)

        monkeypatch.setattr(Registry, "load", slow)


def ask(service: Service, spec: str, params: SamplingParams = SHORT) -> Generation:
    return service.generate(PROMPT, parse_spec(spec), params)


def tokens(generation: Generation) -> list[int]:
    return [i for piece in generation for i in piece.token_ids]


@pytest.fixture(scope="module")
def alone(base: Base, tmp_path_factory: pytest.TempPathFactory, random_adapter) -> dict[str, list[int]]:
    """What each adapter answers with nobody beside it and all the room there is."""
    registry = fill(Registry(tmp_path_factory.mktemp("alone"), base.shapes, base.fingerprint), random_adapter)
    service = Service(base, registry, max_model_len=192, max_num_seqs=1)
    service.start()
    answers = {name: tokens(ask(service, name)) for name in [*NAMES, "base", "n0:0.5+n1:0.7"]}
    service.stop()
    assert len({tuple(answer) for answer in answers.values()}) == len(answers), "every adapter answers differently"
    return answers


def largest(registry: Registry) -> int:
    return max(registry.load(name).num_bytes for name in NAMES)


def settle(service: Service) -> dict[str, Any]:
    """The stats once the engine has seen that everybody left."""
    service._worker.call(lambda: None)
    return service.stats()


@pytest.mark.parametrize("room", [1, 2.5])
def test_more_adapters_than_fit_are_all_answered_rightly(make, many, alone, room) -> None:
    capacity = int(room * largest(many))
    service = make(adapter_memory=capacity, max_queue=100)
    asked = [name for _ in range(4) for name in [*NAMES, "base"]]
    random.Random(1).shuffle(asked)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda name: tokens(ask(service, name)), asked))
    assert answers == [alone[name] for name in asked]
    stats = settle(service)
    assert 0 < stats["adapter_bytes"] <= capacity
    assert stats["adapter_loads_total"] >= len(NAMES) and stats["adapter_evictions_total"] > 0
    assert stats["adapters_waiting"] == 0 and stats["requests_running"] == 0


def test_a_request_waits_for_room_and_one_that_runs_is_not_disturbed(make, many, alone) -> None:
    service = make(adapter_memory=many.load("n3").num_bytes)
    with service.adapters.hold(parse_spec("n3")):  # as long as this, whatever the speed of the machine
        running = ask(service, "n3", LONG)
        waiting = ask(service, "n7")
        assert waiting.next(timeout=0.05) is None, "there is no room yet"
        assert tokens(ask(service, "base")) == alone["base"], "the base needs none"
        assert service.loaded() == ["n3"] and service.stats()["adapters_waiting"] == 1
        assert tokens(running)[: SHORT.max_tokens] == alone["n3"]
        assert waiting.next(timeout=0.05) is None, "somebody holds it still"
    assert tokens(waiting) == alone["n7"]
    assert service.loaded() == ["n7"]


def test_blends_wait_for_all_their_adapters(make, many, alone) -> None:
    sizes = [many.load(name).num_bytes for name in ("n0", "n1")]
    service = make(adapter_memory=sum(sizes))
    specs = ["n0:0.5+n1:0.7", "n1", "n0:0.5+n1:0.7", "n0", "n0:0.5+n1:0.7"]
    generations = [ask(service, spec) for spec in specs]
    assert [tokens(g) for g in generations] == [alone[spec] for spec in specs]
    with pytest.raises(InvalidRequest, match="blend fewer, or raise --adapter-memory"):
        ask(service, "n0+n1+n2")
    assert tokens(ask(service, "n0:0.5+n1:0.7+n2:0")) == alone["n0:0.5+n1:0.7"], "what has no weight needs no room"


def test_an_adapter_larger_than_the_memory_is_refused_when_it_is_asked_for(make, many) -> None:
    service = make(adapter_memory=many.load("n1").num_bytes - 1)
    with pytest.raises(InvalidRequest, match="raise --adapter-memory") as caught:
        ask(service, "n1")
    assert caught.value.param == "adapter" and service.stats()["requests_total"] == 0
    assert tokens(ask(service, "n0"))


def test_others_go_on_while_a_load_stands_still(make, alone, monkeypatch) -> None:
    service = make(max_num_seqs=2)
    tokens(ask(service, "n1"))
    gate = Gate(monkeypatch, "n2")
    stuck = ask(service, "n2")
    assert gate.reached.wait(30)
    assert tokens(ask(service, "base")) == alone["base"]
    assert tokens(ask(service, "n1")) == alone["n1"]
    assert stuck.next(timeout=0) is None
    steps, schedules = service.stats()["steps_total"], []
    schedule = service._engine.scheduler.schedule
    monkeypatch.setattr(
        service._engine.scheduler, "schedule", lambda now: schedules.append(now) or schedule(now), raising=True
    )
    assert stuck.next(timeout=0.3) is None
    assert len(schedules) <= 1 and service.stats()["steps_total"] == steps, "the engine sleeps meanwhile"
    gate.open.set()
    assert tokens(stuck) == alone["n2"]


@pytest.mark.parametrize("has_host", [False, True])
def test_the_line_knows_a_lack_of_room_from_a_slow_load(base: Base, many: Registry, monkeypatch, has_host) -> None:
    cache = AdapterCache(many, torch.device("cpu"), torch.float32, many.load("n3").num_bytes, has_host=has_host)
    with cache.hold(parse_spec("n3")):
        gate = Gate(monkeypatch, "n0")
        lease = cache.lease(parse_spec("n0"))
        lease.join()
        assert lease.short_of_room, "whatever is read ahead meanwhile"
        assert not has_host or gate.reached.wait(30)
    assert gate.reached.wait(30) and lease.peek() is None
    assert not lease.short_of_room, "only the disk is slow"
    gate.open.set()
    with cache._changed:
        assert cache._changed.wait_for(lambda: lease.take() is not None, timeout=30)
    later = cache.lease(parse_spec("n7"))
    later.join()
    assert later.short_of_room
    lease.release()
    with cache._changed:
        assert cache._changed.wait_for(lambda: later.take() is not None, timeout=30)


def test_a_cancelled_request_leaves_the_line_and_stopping_fails_those_in_it(make, alone, monkeypatch) -> None:
    service = make()
    gate = Gate(monkeypatch, "n2")
    first, second = ask(service, "n2"), ask(service, "n2")
    assert gate.reached.wait(30)
    first.cancel()
    assert settle(service)["adapters_waiting"] == 1
    service.stop()
    with pytest.raises(NotReady):
        tokens(second)
    assert service.stats()["adapters_waiting"] == 0
    gate.open.set()


def test_a_crash_of_the_engine_frees_the_adapters_even_of_requests_that_are_being_cancelled(make, many) -> None:
    service = make(adapter_memory=largest(many))
    running, waiting = ask(service, "n3", LONG), ask(service, "n7")
    next(running)

    def crash() -> None:
        running.cancel()
        waiting.cancel()
        raise ZeroDivisionError("a bug")

    service._worker.post(crash)
    service._worker._thread.join(30)
    assert not service.ready and service.stats()["adapters_waiting"] == 0
    assert all(entry.users == 0 for entry in service.adapters._table.entries.values())
    service.adapters.pin("n7")  # there is room for it, and nobody waits for ever
    with pytest.raises(NotReady, match="crashed"):
        service.pin("n7")


def damage(registry: Registry, name: str) -> None:
    """Change a byte of the weights, which only reading them all reveals."""
    file = registry.get(name).path / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.unlink()
    file.write_bytes(data)


def test_a_corrupt_file_fails_only_its_own_request(make, many, alone, monkeypatch) -> None:
    service = make()
    gate = Gate(monkeypatch, "n2")
    ask(service, "n2").cancel()
    damage(many, "n4")
    asked = ["n3", "n4", "n5", "n3+n4", "base"]
    generations = dict(zip(asked, (ask(service, spec) for spec in asked), strict=True))
    gate.open.set()
    for spec in ("n4", "n3+n4"):
        with pytest.raises(AdapterRefused, match="sha256"):
            tokens(generations[spec])
    for spec in ("n3", "n5", "base"):
        assert tokens(generations[spec]) == alone[spec]
    with pytest.raises(AdapterRefused, match="sha256"):
        service.logits(PROMPT, parse_spec("n4"))
    assert service.ready and settle(service)["adapters_waiting"] == 0
    many.publish("n4", many.load("n5"), LoraConfig.from_peft({**many.get("n5").config.to_peft()}), {})
    assert tokens(ask(service, "n4")) == alone["n5"]


def test_a_version_published_while_an_older_one_is_loaded_answers_who_asks_after_it(
    make, many, alone, monkeypatch, random_adapter
) -> None:
    service = make()
    load, reached, release = Registry.load, threading.Event(), threading.Event()

    def slow(registry: Registry, name: str) -> Adapter:
        adapter = load(registry, name)
        if name == "n2" and not reached.is_set():
            reached.set()
            assert release.wait(30)
        return adapter

    monkeypatch.setattr(Registry, "load", slow)
    early = ask(service, "n2")
    assert reached.wait(30)
    publish(many, random_adapter, "n2", 3)  # what n3 is
    late = ask(service, "n2")
    release.set()
    assert tokens(late) == alone["n3"]
    assert tokens(early) in (alone["n2"], alone["n3"])
    running = ask(service, "n2", LONG)
    first = next(running).token_ids
    publish(many, random_adapter, "n2", 5)
    assert tokens(ask(service, "n2")) == alone["n5"]
    assert (first + tokens(running))[: SHORT.max_tokens] == alone["n3"], "it ends with the version it began with"
    assert settle(service)["adapter_bytes"] == many.load("n5").num_bytes


def test_pinned_adapters_stay_until_they_are_unpinned(make, many, alone) -> None:
    service = make(adapter_memory=2 * largest(many))
    service.pin("n0")
    service.pin("n0")
    for name in NAMES[1:]:
        assert tokens(ask(service, name)) == alone[name]
    assert "n0" in service.loaded() and service.is_pinned("n0") and not service.is_pinned("n1")
    service.unpin("n0")
    for name in NAMES[1:]:
        tokens(ask(service, name))
    assert "n0" not in service.loaded()


def test_pinning_is_refused_for_what_does_not_fit_or_cannot_be_loaded(make, many) -> None:
    service = make(adapter_memory=largest(many) + many.load("n4").num_bytes)
    service.pin("n3")
    with pytest.raises(Conflict, match="unpin another"):
        service.pin("n7")
    damage(many, "n4")
    with pytest.raises(AdapterRefused):
        service.pin("n4")
    assert service.adapters.pinned() == {"n3"}
    assert service.unload("n3") and service.adapters.pinned() == set()


def test_everybody_gets_through_with_pins_blends_and_cancellations(make, many, alone) -> None:
    service = make(adapter_memory=int(2.2 * largest(many)), max_queue=1000, max_num_seqs=4)
    service.pin("n3")
    specs = [*NAMES, "base", "n0:0.5+n1:0.7"]

    def visit(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(6):
            spec = chance.choice(specs)
            generation = ask(service, spec)
            if chance.random() < 0.3:
                generation.next(timeout=chance.choice([0, 0.01]))
                generation.cancel()
            else:
                assert tokens(generation) == alone[spec]

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(visit, range(24)))
    stats = settle(service)
    assert stats["adapters_waiting"] == stats["requests_running"] == 0
    assert all(entry.users == 0 for entry in service.adapters._table.entries.values())


def test_two_tiers_keep_host_copies_and_fill_the_device_from_them(base: Base, many: Registry, monkeypatch) -> None:
    sizes = {name: many.load(name).num_bytes for name in NAMES}
    reads = []
    load = Registry.load
    monkeypatch.setattr(Registry, "load", lambda self, name: reads.append(name) or load(self, name))
    cpu, room = torch.device("cpu"), sizes["n1"] + sizes["n3"]
    cache = AdapterCache(many, cpu, torch.float32, room, host_capacity=room + sizes["n5"], has_host=True)

    def bring(name: str) -> Adapter:
        ((adapter, weight),) = cache.resolve(parse_spec(name))
        stored = load(many, name)
        for target, w in stored.weights.items():
            assert torch.equal(adapter.weights[target].A, w.A) and torch.equal(adapter.weights[target].B, w.B)
            assert adapter.weights[target].B.T.is_contiguous() and weight == 1.0
        return adapter

    first = bring("n1")
    bring("n3")
    bring("n5")
    assert cache.names() == ["n3", "n5"] and reads == ["n1", "n3", "n5"]
    assert cache.num_bytes == sizes["n3"] + sizes["n5"] <= room and cache.host_bytes == room + sizes["n5"]
    again = bring("n1")
    assert reads == ["n1", "n3", "n5"], "it came from the host"
    assert again is not first and again.weights.keys() == first.weights.keys()
    bring("n7")
    assert cache.host_bytes <= room + sizes["n5"]
    bring("n3")
    assert reads == ["n1", "n3", "n5", "n7", "n3"], "the host drops the least recently used, too"


def test_with_two_tiers_the_disk_is_read_ahead_of_room_on_the_device(base: Base, many: Registry) -> None:
    sizes = {name: many.load(name).num_bytes for name in NAMES}
    cache = AdapterCache(many, torch.device("cpu"), torch.float32, sizes["n1"], has_host=True)
    with cache.hold(parse_spec("n1")):
        leases = [cache.lease(parse_spec(name)) for name in ("n0", "n2")]
        for lease in leases:
            lease.join()
        wanted = sizes["n1"] + sizes["n0"] + sizes["n2"]
        with cache._changed:
            assert cache._changed.wait_for(lambda: cache.host_bytes == wanted and cache._job is None, timeout=30)
        assert cache.names() == ["n1"] and leases[0].take() is None
    with cache._changed:
        assert cache._changed.wait_for(lambda: leases[0].peek() is not None, timeout=30)


def test_an_adapter_dropped_while_it_is_loaded_leaves_no_copy(base: Base, many: Registry, monkeypatch) -> None:
    cache = AdapterCache(many, torch.device("cpu"), torch.float32, many.load("n1").num_bytes, has_host=True)
    gate = Gate(monkeypatch, "n2")
    lease = cache.lease(parse_spec("n2"))
    lease.join()
    assert gate.reached.wait(30)
    lease.release()
    cache.drop("n2")
    gate.open.set()
    with cache._changed:
        assert cache._changed.wait_for(lambda: cache._job is None, timeout=30)
    assert cache.names() == [] and cache.host_bytes == cache.num_bytes == 0
    cache.resolve(parse_spec("n2"))
    assert cache.host_bytes == many.load("n2").num_bytes


def test_what_is_republished_before_its_turn_is_read_ahead_once(
    base: Base, many: Registry, random_adapter, monkeypatch
) -> None:
    reads = []
    warm = AdapterTiers.warm
    monkeypatch.setattr(AdapterTiers, "warm", lambda self, *args: reads.append(args[0]) or warm(self, *args))
    room = many.load("n1").num_bytes
    cache = AdapterCache(many, torch.device("cpu"), torch.float32, room, has_host=True)
    with cache.hold(parse_spec("n1")):
        lease = cache.lease(parse_spec("n2"))
        publish(many, random_adapter, "n2", 6)  # of n2's size
        lease.join()
        with cache._changed:
            assert cache._changed.wait_for(lambda: cache._job is None, timeout=10), "one load after another"
        assert reads == ["n2"] and cache.host_bytes == room + many.load("n2").num_bytes
    with cache._changed:
        assert cache._changed.wait_for(lambda: lease.peek() is not None, timeout=30)
    ((adapter, _),) = lease.take()
    for target, weight in many.load("n2").weights.items():
        assert torch.equal(adapter.weights[target].B, weight.B)


def test_a_load_that_cannot_begin_fails_who_needs_it_and_the_next_one_begins(make, many, alone, monkeypatch) -> None:
    service = make(adapter_memory=largest(many))
    start, full = threading.Thread.start, []

    def begin(thread: threading.Thread) -> None:
        if full and thread.name == "loraserve-loader":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", begin)
    full.append(True)
    with pytest.raises(NotReady, match="try again"):
        ask(service, "n1")
    with pytest.raises(NotReady, match="try again"):
        service.pin("n1")
    assert settle(service)["requests_waiting"] == service.stats()["adapters_waiting"] == 0
    full.clear()
    with service.adapters.hold(parse_spec("n3")):
        waiting, running = ask(service, "n5"), ask(service, "n3", LONG)
        assert tokens(running)
        full.append(True)
    with pytest.raises(NotReady, match="try again"):
        tokens(waiting)
    assert tokens(ask(service, "base")) == alone["base"]
    full.clear()
    assert tokens(ask(service, "n1")) == alone["n1"]
    assert settle(service)["adapters_waiting"] == 0


def test_on_one_tier_nothing_is_kept_twice(base: Base, many: Registry) -> None:
    cache = AdapterCache(many, torch.device("cpu"), torch.float32, 1 << 30)
    cache.resolve(parse_spec("n1"))
    assert cache.host_bytes == 0 and cache.num_bytes == many.load("n1").num_bytes
