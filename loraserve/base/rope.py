"""Rotary position embeddings, rotate-half form, with the scalings that MiniMind, Llama and Qwen3 files name.

Sources: RoFormer arXiv:2104.09864, YaRN arXiv:2309.00071, the `rope_scaling` fields of Hugging Face configs.
"""

import math
from typing import Any

import torch
from torch import Tensor

from loraserve.base.config import ModelConfig
from loraserve.kernels import train

SUPPORTED = ("default", "linear", "llama3", "yarn")


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return the inverse frequencies (head_dim/2,) float32 and the factor on cos and sin."""
    dim, theta = config.head_dim, config.rope_theta
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return freqs, 1.0
    factor = float(scaling["factor"])
    if kind == "linear":
        return freqs / factor, 1.0
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * freqs / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return freqs * (smooth + (1 - smooth) / factor), 1.0
    return _yarn(freqs, dim, theta, original, factor, scaling)


def _yarn(
    freqs: Tensor, dim: int, theta: float, original: int, factor: float, scaling: dict[str, Any]
) -> tuple[Tensor, float]:
    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dimension_of(scaling.get("beta_slow") or 1)), dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return freqs * (1 - ramp + ramp / factor), float(attention_factor)


class Rope(torch.nn.Module):
    """Tables of cos and sin, grown on demand to the highest position asked for."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        self.reset(torch.get_default_device())

    def reset(self, device: torch.device) -> None:
        """Start over on `device` with an empty table."""
        freqs, self.factor = inverse_frequencies(self._config)
        self.freqs = freqs.to(device)
        self.table = torch.empty(0, 2, self._config.head_dim, device=device)

    def forward(self, positions: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin (N, 1, head_dim) float32 for `positions` (N,), all below `limit`."""
        rows = self.reach(limit)[positions].unsqueeze(2)  # (N, 2, 1, D)
        return rows[:, 0], rows[:, 1]

    def reach(self, limit: int) -> Tensor:
        """Return the table (positions, 2, head_dim), cos and sin of at least `limit` positions."""
        table = self.table
        if table.shape[0] < limit:
            limit = 1 << (limit - 1).bit_length()  # doubling: decoding asks for one more each step
            angles = torch.outer(torch.arange(limit, device=self.freqs.device).float(), self.freqs.float())
            angles = torch.cat([angles, angles], dim=-1)  # (limit, D)
            self.table = table = torch.stack([angles.cos(), angles.sin()], dim=1) * self.factor
        return table


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x (N, H, D) by cos and sin (N, 1, D); computed in float32, returned in x's dtype."""
    if train.available(x):
        return train.rotate(x, cos, sin)
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
