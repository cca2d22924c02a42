"""A tiny random base with real tokenizer, and adapters of different ranks and targets in a registry."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from loraserve.base.load import Base, load_base
from loraserve.engine.service import Service
from loraserve.lora.config import LoraConfig
from loraserve.registry import Registry

TARGETS = {"a": ["q_proj", "down_proj"], "b": "all-linear", "c": ["v_proj", "lm_head"]}


@pytest.fixture(scope="session")
def base(tiny_base_dir: Path) -> Base:
    return load_base(str(tiny_base_dir), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def registry(base: Base, tmp_path_factory: pytest.TempPathFactory, random_adapter) -> Registry:
    registry = Registry(tmp_path_factory.mktemp("adapters"), base.shapes, base.fingerprint)
    for seed, (name, targets) in enumerate(TARGETS.items()):
        r = 2 + 3 * seed
        adapter = random_adapter(base.shapes, targets, r, seed)
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=sorted(adapter.weights))
        registry.publish(name, adapter, config, {"base_fingerprint": base.fingerprint})
    return registry


@pytest.fixture
def service(base: Base, registry: Registry) -> Iterator[Service]:
    service = Service(base, registry, max_model_len=192, max_num_seqs=16)
    service.start()
    yield service
    service.stop()
