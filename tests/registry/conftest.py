"""A small base's shapes, adapters that differ, and a registry in a fresh directory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraserve.base.config import ModelConfig
from loraserve.lora.adapter import Adapter, LoraWeight, Shapes
from loraserve.lora.config import LoraConfig
from loraserve.registry import Registry

FINGERPRINT = "sha256:" + "a" * 64


@pytest.fixture(scope="session")
def shapes() -> Shapes:
    config = ModelConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
    )
    return config.linear_shapes()


@pytest.fixture
def registry(tmp_path: Path, shapes: Shapes) -> Registry:
    return Registry(tmp_path / "adapters", shapes, FINGERPRINT)


@pytest.fixture(scope="session")
def make(shapes: Shapes) -> Callable[..., tuple[Adapter, LoraConfig]]:
    """An adapter that depends on `seed`, and the config that describes it."""

    def adapter(seed: int, r: int = 4, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> tuple[Adapter, LoraConfig]:
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets)
        generator = torch.Generator().manual_seed(seed)
        weights = {
            target: LoraWeight(
                torch.randn(r, width, generator=generator), torch.randn(out, r, generator=generator), 2.0
            )
            for target, (out, width) in shapes.items()
            if config.matches(target)
        }
        return Adapter(weights, f"seed {seed}"), config

    return adapter


@pytest.fixture
def publish(registry: Registry, make) -> Callable[..., Adapter]:
    """Publish the adapter of a seed under a name, trained on the registry's base."""

    def one(name: str, seed: int, **options: object) -> Adapter:
        adapter, config = make(seed, **options)
        registry.publish(name, adapter, config, {"base_fingerprint": FINGERPRINT})
        return adapter

    return one
