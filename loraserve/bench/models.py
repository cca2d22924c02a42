"""A random base and random adapters, so that a benchmark needs no download. Shapes are those of minimind-3 (64M)."""

import math
from pathlib import Path

import torch

from loraserve.base.checkpoint import Checkpoint, expected_tensors
from loraserve.base.config import ModelConfig
from loraserve.base.export import write_hf
from loraserve.base.fingerprint import fingerprint
from loraserve.base.resolve import bundled_path
from loraserve.lora.adapter import Adapter, LoraWeight
from loraserve.lora.config import LoraConfig, expand_targets
from loraserve.registry import Registry


def minimind3_config() -> ModelConfig:
    """minimind-3, dense: 63.9M parameters."""
    return ModelConfig(
        vocab_size=6400,
        hidden_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=96,
        intermediate_size=math.ceil(768 * math.pi / 64) * 64,
        qk_norm=True,
    )


def make_models(folder: Path, num_adapters: int, r: int, seed: int = 1234) -> tuple[Path, Path]:
    """Write `folder/base` and `folder/adapters/a0 …` (all-linear, rank r); return both paths."""
    generator = torch.Generator().manual_seed(seed)
    config = minimind3_config()
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
        for name, shape in expected_tensors(config).items()
    }
    base, adapters = folder / "base", folder / "adapters"
    write_hf(Checkpoint(config, tensors, folder, "hf"), base, bundled_path())
    shapes = config.linear_shapes()
    identity = fingerprint(Checkpoint(config, tensors, base, "hf"))
    registry = Registry(adapters, shapes, identity)
    for i in range(num_adapters):
        weights = {
            target: LoraWeight(
                torch.randn(r, shapes[target][1], generator=generator) * 0.02,
                torch.randn(shapes[target][0], r, generator=generator) * 0.02,
                2.0,
            )
            for target in expand_targets("all-linear", shapes)
        }
        lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules=sorted({t.rsplit(".", 1)[1] for t in weights}))
        registry.publish(f"a{i}", Adapter(weights, f"a{i}"), lora, {"base_fingerprint": identity})
    return base, adapters
