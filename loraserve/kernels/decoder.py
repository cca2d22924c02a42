"""A decoder whose steps take one call, see decoder.c: the tables it reads, and the buffers it needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraserve.kernels import cpu
from loraserve.kernels.cpu import Deltas, Entries
from loraserve.kernels.gemm import PackedWeight

NOTHING = [0] * 7
"""The entry of a site that no adapter touches."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer: norms (hidden,) float32, those of queries and keys (head_dim,), and its packed weights."""

    input_norm: Tensor
    post_norm: Tensor
    qk_norms: tuple[Tensor, Tensor] | None
    linears: Sequence[PackedWeight]
    """qkv, out, gate and up, down."""


@dataclass(frozen=True)
class CachedRows:
    """Where the rows of a step keep their keys and values, each row attending by itself."""

    pointers: Tensor
    """(2 · layers,) int64: each layer's keys and values, (slots, KV, max_len, D)."""
    max_len: int
    slots: Tensor
    """(N,) int64"""


class DecoderKernel:
    """A decoder's weights as the kernel reads them. They must not change or move afterwards.

    Args:
        layers: all of one shape.
        norm: (hidden,) float32, the last norm.
        heads: H, KV and D.
        eps, cast_first: see `cpu.add_rms_norm`.
    """

    def __init__(
        self, layers: Sequence[LayerWeights], norm: Tensor, heads: tuple[int, int, int], eps: float, cast_first: bool
    ) -> None:
        self._kept = list(layers), norm
        rows = []
        for layer in layers:
            norms = (layer.input_norm, layer.post_norm, *(layer.qk_norms or (None, None)))
            rows.append([0 if w is None else w.data_ptr() for w in norms])
            for linear in layer.linears:
                rows[-1] += [*linear.pointers, linear.in_features, linear.out_features]
        self._layers = torch.tensor(rows)
        self._fields = torch.tensor(
            [self._layers.data_ptr(), norm.data_ptr(), len(layers), norm.shape[0], *heads, int(cast_first)]
        )
        self._heads, self._eps = heads, eps
        shapes = [(linear.in_features, linear.out_features) for linear in layers[0].linears]
        self._deepest = max(k for k, _ in shapes)
        self._widest = max(*map(max, shapes))

    def run(
        self,
        embedded: Tensor,
        table: Tensor,
        positions: Tensor,
        cached: CachedRows,
        sites: "AdapterSites | None",
        entries: Entries | None,
    ) -> Tensor:
        """Return the normed hidden states (N, hidden) after a step in which every row attends by itself.

        Args:
            embedded: (N, hidden), the tokens; float32 or bfloat16 as the weights were.
            table: (positions, 2, D) float32, cos and sin.
            positions: (N,) int64.
            sites, entries: the adapters, or None for none.
        """
        n = embedded.shape[0]
        x = embedded.float() if embedded.dtype != torch.float32 else embedded.clone()
        y = torch.empty_like(embedded)
        inner = torch.empty(2, n, self._widest, dtype=embedded.dtype)
        needed = [n + n * self._deepest + n * self._deepest // 4]
        given = [0, 0, 0, 0, 0]
        if sites is not None and entries is not None:
            needed.append(sites.scratch(len(entries[0])))
            given = [sites.table.data_ptr(), len(entries[0]), *(part.data_ptr() for part in entries)]
        call = [cached.pointers.data_ptr(), cached.max_len, cached.slots.data_ptr(), positions.data_ptr(),
                table.data_ptr(), *given]  # fmt: skip
        step, scratch = torch.tensor(call), torch.empty(max(needed))
        cpu.call("decode", embedded.dtype, self._fields, step, x, y, inner, self._widest, scratch, n, self._eps,
                 1 / math.sqrt(self._heads[2]))  # fmt: skip
        return y


class AdapterSites:
    """What a batch's adapters do to each layer's packed weights, as the kernel reads it.

    Args:
        deltas: per layer and site, None where no adapter touches it.
    """

    def __init__(self, deltas: Sequence[Deltas | None]) -> None:
        self._deltas = list(deltas)
        self.table = torch.tensor([d.fields if d else NOTHING for d in deltas])  # (4 · layers, 7) int64

    def scratch(self, entries: int) -> int:
        """Floats that the kernel needs beside them."""
        return max((d.scratch(entries) for d in self._deltas if d), default=0)
