"""When a hot merge begins and ends: its memory, requests in flight, republished adapters, failures and threads."""

import gc
import shutil
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraserve.base.load import Base, load_base
from loraserve.engine import hot_merge
from loraserve.engine.generation import Generation
from loraserve.engine.params import SamplingParams
from loraserve.engine.service import Service
from loraserve.errors import AdapterNotFound, AdapterRefused, CheckpointError, Conflict, NotReady
from loraserve.lora.adapter import Adapter, LoraWeight
from loraserve.lora.config import LoraConfig
from loraserve.lora.spec import parse_spec
from loraserve.registry import Registry

LINE = [(37 * i) % 500 + 10 for i in range(40)]
SHORT = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)


@pytest.fixture
def mine(base: Base, registry: Registry, tmp_path: Path) -> Registry:
    """A registry of its own with the adapters `a` and `b`."""
    own = Registry(tmp_path / "adapters", base.shapes, base.fingerprint)
    for name in "ab":
        own.import_(registry.get(name).path, name)
    return own


@pytest.fixture
def served(base: Base, mine: Registry) -> Iterator[Service]:
    service = Service(base, mine, max_model_len=2048, max_num_seqs=4)
    service.start()
    yield service
    service.stop()


def collect(generation: Generation) -> list[int]:
    return [token_id for piece in generation for token_id in piece.token_ids]


def idle(service: Service, spec: str = "b") -> list[int]:
    """An answer, after which no thread but this one still looks at any model."""
    return collect(service.generate(LINE, parse_spec(spec), SHORT))


def publish(registry: Registry, base: Base, adapter: Adapter, name: str = "b") -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=sorted(adapter.weights))
    registry.publish(name, adapter, config, {"base_fingerprint": base.fingerprint})


def test_unmerging_frees_every_tensor_of_the_merge(served: Service) -> None:
    before = idle(served)
    merged = served.merge("b")
    assert idle(served) == before
    assert served.stats()["merged_bytes"] == merged.num_bytes > 0 and served.stats()["adapters_merged"] == 1
    layer = merged.model.model.layers[0]
    gone = [weakref.ref(merged.model), weakref.ref(layer.self_attn.qkv._weight), weakref.ref(layer.mlp.gate_up)]
    del merged, layer
    assert served.unmerge("b")
    assert not served.unmerge("b")
    assert idle(served) == before
    assert served.stats()["merged_bytes"] == served.stats()["adapters_merged"] == 0
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_a_request_in_flight_ends_on_the_merged_model_and_then_its_memory_is_free(served: Service) -> None:
    alone = collect(served.generate(LINE, parse_spec("b"), LONG))
    size = served.merge("b").num_bytes
    running = served.generate(LINE, parse_spec("b"), LONG)
    first = next(running).token_ids
    assert served.unmerge("b")
    assert served.stats()["requests_running"] == 1
    assert served.stats()["adapters_merged"] == 0 and served.stats()["merged_bytes"] == size
    assert idle(served) == alone[: SHORT.max_tokens]
    assert first + collect(running) == alone
    del running
    idle(served)
    gc.collect()
    assert served.stats()["merged_bytes"] == 0


def test_merging_again_returns_the_same_merge(served: Service) -> None:
    assert served.merge("b") is served.merge("b")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(served.merge, ["a"] * 4))
    assert all(merged is found[0] for merged in found)
    assert served.stats()["adapters_merged"] == 2


def test_a_merged_adapter_needs_no_place_among_the_loaded_ones(served: Service) -> None:
    served.merge("b")
    idle(served)
    assert served.loaded() == []
    idle(served, "b:0.5")
    assert served.loaded() == ["b"]


def test_a_republished_adapter_is_never_served_from_the_stale_merge(
    served: Service, mine: Registry, base: Base, random_adapter
) -> None:
    stale = idle(served)
    served.merge("b")
    publish(mine, base, random_adapter(base.shapes, "all-linear", 4, 99))
    fresh = served.generate(LINE, parse_spec("b"), SHORT)
    assert fresh._sequence.merged is None
    tokens = collect(fresh)
    assert tokens != stale
    assert served.merges.get("b") is None
    gc.collect()
    assert served.stats()["merged_bytes"] == 0
    assert served.merge("b").parity.greedy_agreement == 1.0
    assert idle(served) == tokens
    mine.rollback("b")
    assert idle(served) == stale


def test_files_that_are_only_touched_keep_the_merge(served: Service, mine: Registry, base: Base) -> None:
    merged = served.merge("b")
    mine.publish("b", mine.load("b"), mine.get("b").config, {"base_fingerprint": base.fingerprint})
    assert mine.get("b").version == 2
    assert served.merges.get("b") is merged
    assert served.merge("b") is merged


def test_an_adapter_that_is_removed_takes_its_merge_along(served: Service, mine: Registry) -> None:
    served.merge("a")
    served.merge("b")
    served.unload("a")
    assert list(served.merges.current()) == ["b"]
    shutil.rmtree(mine.get("b").path.parent.parent)  # behind the server's back
    with pytest.raises(AdapterNotFound):
        idle(served)
    gc.collect()
    assert served.stats()["merged_bytes"] == served.stats()["adapters_merged"] == 0


def test_an_adapter_republished_while_it_is_merged_is_merged_anew(
    served: Service, mine: Registry, base: Base, random_adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = random_adapter(base.shapes, "all-linear", 4, 99)
    compare, versions = hot_merge.compare, []

    def republish(*args: object, **kwargs: object) -> object:
        if not versions:
            publish(mine, base, late)
        versions.append(mine.get("b").version)
        return compare(*args, **kwargs)

    monkeypatch.setattr(hot_merge, "compare", republish)
    merged = served.merge("b")
    assert versions == [2, 2]
    assert merged.digest == mine.load("b").digest
    torch.testing.assert_close(
        served.logits(LINE, parse_spec("b")), served.logits(LINE, parse_spec("b:0.5+b:0.4999999")), atol=0.01, rtol=0
    )


def test_an_unmerge_waits_for_the_merge_under_way(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, unmerging = hot_merge.compare, threading.Thread(target=lambda: served.unmerge("b"))

    def meanwhile(*args: object, **kwargs: object) -> object:
        unmerging.start()
        unmerging.join(0.2)  # one that did not wait would find nothing to free, and end
        return compare(*args, **kwargs)

    monkeypatch.setattr(hot_merge, "compare", meanwhile)
    served.merge("b")
    unmerging.join()
    assert served.merges.get("b") is None


def test_a_merge_beyond_the_memory_is_refused_and_the_others_stay(base: Base, mine: Registry) -> None:
    service = Service(base, mine, max_model_len=192, merge_memory=150_000)
    service.start()
    try:
        a = service.merge("a")
        assert a.num_bytes < 150_000
        with pytest.raises(Conflict, match=r"'b' needs 0\.\d MiB.*\(a\) take 0\.1 of 0\.1 MiB.*--merge-memory"):
            service.merge("b")
        assert service.merge("a") is a
        assert service.stats()["merged_bytes"] == a.num_bytes
        assert idle(service)
    finally:
        service.stop()


def test_a_failure_in_the_middle_leaves_the_server_as_it_was(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    before = idle(served)

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(hot_merge, "derive", fail)
        with pytest.raises(MemoryError):
            served.merge("b")
    assert served.ready and idle(served) == before
    assert served.stats()["merged_bytes"] == served.stats()["adapters_merged"] == 0
    assert served.merge("b").parity.greedy_agreement == 1.0


def test_what_cannot_be_merged_is_refused_and_changes_nothing(
    served: Service, mine: Registry, base: Base, random_adapter
) -> None:
    with pytest.raises(AdapterNotFound, match="nobody"):
        served.merge("nobody")
    sound = random_adapter(base.shapes, ["down_proj"], 4, 9)
    huge = {t: LoraWeight(w.A * 1e18, w.B * 1e30, w.scaling) for t, w in sound.weights.items()}
    publish(mine, base, Adapter(huge), "huge")
    with pytest.raises(CheckpointError, match="beyond the range"):
        served.merge("huge")
    broken = mine.root / "broken"
    broken.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (broken / file).write_bytes((mine.get("a").path / file).read_bytes()[:1000])
    with pytest.raises(AdapterRefused, match="broken"):
        served.merge("broken")
    assert served.merges.current() == {} and served.ready
    assert served.merge("b")


def test_a_base_whose_files_changed_since_it_was_loaded_is_not_merged(
    base: Base, mine: Registry, tmp_path: Path
) -> None:
    twin = shutil.copytree(base.path, tmp_path / "twin")
    service = Service(load_base(str(twin), device="cpu", dtype="float32"), mine, max_model_len=192)
    service.start()
    try:
        tensors = load_file(twin / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
        save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="have changed"):
            service.merge("b")
        assert idle(service) and service.stats()["merged_bytes"] == 0
    finally:
        service.stop()


def test_an_engine_that_does_not_run_merges_nothing(base: Base, mine: Registry) -> None:
    service = Service(base, mine, max_model_len=192)
    with pytest.raises(NotReady):
        service.merge("b")
    assert service.merges.current() == {}
