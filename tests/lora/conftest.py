"""Tiny shapes of a dense and a mixture-of-experts base, and adapters on them that really do something."""

from collections.abc import Callable, Sequence

import pytest
import torch

from loraserve.base.config import ModelConfig
from loraserve.lora.adapter import Adapter, LoraWeight, Shapes
from loraserve.lora.config import LoraConfig, expand_targets

MakeAdapter = Callable[..., Adapter]


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """A Qwen3-like model; q_proj and o_proj are square, nothing else is."""
    return ModelConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        qk_norm=True,
    )


@pytest.fixture(scope="session")
def shapes(tiny_config: ModelConfig) -> Shapes:
    return tiny_config.linear_shapes()


@pytest.fixture(scope="session")
def moe_shapes() -> Shapes:
    config = ModelConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    )
    return config.linear_shapes()


@pytest.fixture(scope="session")
def make_adapter() -> MakeAdapter:
    """Random A and nonzero B of the ranks and scalings that a config gives."""

    def make(shapes: Shapes, config: LoraConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for target, (out, width) in shapes.items():
            if config.matches(target):
                r = config.rank_of(target)
                A = torch.randn(r, width, generator=generator) / width**0.5
                B = torch.randn(out, r, generator=generator) / r**0.5
                weights[target] = LoraWeight(A.to(dtype), B.to(dtype), config.scaling_of(target))
        assert weights, "the config of this test targets nothing"
        return Adapter(weights, "test")

    return make


@pytest.fixture(scope="session")
def lora() -> Callable[..., LoraConfig]:
    """A LoraConfig on some targets, rank 4 and scaling 2 unless told otherwise."""

    def make(targets: Sequence[str] | str = ("q_proj", "v_proj"), **settings: object) -> LoraConfig:
        return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets} | settings)

    return make


@pytest.fixture(scope="session")
def all_linear(shapes: Shapes) -> list[str]:
    return expand_targets("all", shapes)
