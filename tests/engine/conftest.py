"""A tiny random base with real tokenizer, and adapters of different ranks and targets in a registry."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loraserve.base.checkpoint import Checkpoint, expected_tensors, read_checkpoint
from loraserve.base.config import ModelConfig
from loraserve.base.export import write_hf
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


@pytest.fixture(scope="session")
def moe(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A Qwen3-MoE base with the tiny base's tokenizer."""
    config = dataclasses.replace(
        read_checkpoint(tiny_base_dir).config, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    return load_base(
        str(write_random(config, tiny_base_dir, tmp_path_factory.mktemp("bases") / "moe")), dtype="float32"
    )


def write_random(config: ModelConfig, tokenizer: Path, out: Path, dtype: torch.dtype = torch.float16) -> Path:
    generator = torch.Generator().manual_seed(4)
    tensors = {
        name: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if len(shape) == 2 else torch.ones(shape))
        for name, shape in expected_tensors(config).items()
    }
    checkpoint = Checkpoint(config, {name: tensor.to(dtype) for name, tensor in tensors.items()}, out, "hf")
    write_hf(checkpoint, out, tokenizer)
    return out


@pytest.fixture
def service(base: Base, registry: Registry) -> Iterator[Service]:
    service = Service(base, registry, max_model_len=192, max_num_seqs=16)
    service.start()
    yield service
    service.stop()
