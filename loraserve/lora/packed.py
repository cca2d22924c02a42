"""An adapter in one piece of memory, so that it moves from one memory to another in one copy.

Each A (r, in) lies as it is and each B (out, r) by columns, as a delta reads it; DoRA's gain (out,) follows. Ranks are
not padded; parts begin on a cache line.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

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
        """Copy an adapter into a buffer of its own on the CPU, in `dtype`; pinned for copies to a GPU.

        Its digest is computed on the way, of the numbers as they are then.
        """
        size = sum(_span(w, dtype) for w in adapter.weights.values())
        buffer = torch.zeros(size, dtype=dtype, pin_memory=pinned)  # the gaps are hashed, too
        views = _views(buffer, adapter.weights)
        for target, weight in adapter.weights.items():
            views[target].A.copy_(weight.A)
            views[target].B.copy_(weight.B)
            if weight.gain is not None:
                cast(Tensor, views[target].gain).copy_(weight.gain)
        layout = [
            (target, tuple(w.A.shape), w.B.shape[0], w.scaling, w.gain is not None) for target, w in views.items()
        ]
        sha = hashlib.sha256(repr((str(dtype), layout)).encode())
        sha.update(buffer.view(torch.uint8).numpy().data)
        return cls(buffer, Adapter(views, adapter.name, sha.hexdigest()))

    def over(self, buffer: Tensor) -> "Packed":
        """The same adapter over another buffer, which holds or will hold the same numbers."""
        adapter = self.adapter
        return Packed(buffer, Adapter(_views(buffer, adapter.weights), adapter.name, adapter.known_digest))


def _views(buffer: Tensor, weights: Mapping[str, LoraWeight]) -> dict[str, LoraWeight]:
    views, at = {}, 0
    assert buffer.storage_offset() == 0  # the offsets of `as_strided` count from the storage
    for target in sorted(weights):
        weight = weights[target]
        (r, width), out = weight.A.shape, weight.B.shape[0]
        A = buffer.as_strided((r, width), (width, 1), at)
        at += _aligned(r * width, buffer.dtype)
        B = buffer.as_strided((out, r), (1, out), at)
        at += _aligned(r * out, buffer.dtype)
        gain = None
        if weight.gain is not None:
            gain = buffer[at : at + out]
            at += _aligned(out, buffer.dtype)
        views[target] = LoraWeight(A, B, weight.scaling, gain=gain)
    return views


def _span(weight: LoraWeight, dtype: torch.dtype) -> int:
    return sum(_aligned(tensor.numel(), dtype) for tensor in weight.tensors)


def _aligned(count: int, dtype: torch.dtype) -> int:
    """Numbers up to the next cache line."""
    line = LINE // dtype.itemsize
    return -(-count // line) * line
