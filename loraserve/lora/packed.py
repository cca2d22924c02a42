"""An adapter in one piece of memory, so that it moves from one memory to another in one copy.

Each A (r, in) lies as it is and each B (out, r) by columns, as a delta reads it. Ranks are not padded; parts begin on a
cache line.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraserve.lora.adapter import Adapter, LoraWeight

LINE = 64
"""Bytes to which the parts are aligned."""


@dataclass(frozen=True, eq=False)
class Packed:
    """One buffer, and the adapter whose A and B are views of it."""

    buffer: Tensor
    adapter: Adapter

    @classmethod
    def of(cls, adapter: Adapter, dtype: torch.dtype, pinned: bool = False) -> "Packed":
        """Copy an adapter into a buffer of its own on the CPU, in `dtype`; pinned for copies to a GPU."""
        size = sum(_span(w, dtype) for w in adapter.weights.values())
        buffer = torch.empty(size, dtype=dtype, pin_memory=pinned)
        packed = cls(buffer, _views(buffer, adapter.weights, adapter.name))
        for target, weight in adapter.weights.items():
            packed.adapter.weights[target].A.copy_(weight.A)
            packed.adapter.weights[target].B.copy_(weight.B)
        return packed

    def over(self, buffer: Tensor) -> "Packed":
        """The same adapter over another buffer, which holds or will hold the same numbers."""
        return Packed(buffer, _views(buffer, self.adapter.weights, self.adapter.name))


def _views(buffer: Tensor, weights: Mapping[str, LoraWeight], name: str) -> Adapter:
    views, at = {}, 0
    for target, weight in weights.items():
        (r, width), out = weight.A.shape, weight.B.shape[0]
        A = buffer[at : at + r * width].view(r, width)
        at += _aligned(r * width, buffer.dtype)
        B = buffer[at : at + r * out].view(r, out).T
        at += _aligned(r * out, buffer.dtype)
        views[target] = LoraWeight(A, B, weight.scaling)
    return Adapter(views, name)


def _span(weight: LoraWeight, dtype: torch.dtype) -> int:
    return _aligned(weight.A.numel(), dtype) + _aligned(weight.B.numel(), dtype)


def _aligned(count: int, dtype: torch.dtype) -> int:
    """Numbers up to the next cache line."""
    line = LINE // dtype.itemsize
    return -(-count // line) * line
