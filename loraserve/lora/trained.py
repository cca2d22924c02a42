"""The deltas of adapters in training: parameters A and B, and the gradients by them and by the layers' input.

    y[n] += scaling · B (A x[n]),   with g the gradient by y and h = scaling · A x:
    ∂A = scaling · Bᵀgᵀ x,   ∂B = gᵀ h,   ∂x = scaling · Aᵀ Bᵀ g,   summed over the adapter's rows

Rows of one adapter lie together, so each takes products of its own over slices of x and y: no gradient of one adapter
passes through another's rows, not even times zero, and no row is copied to be picked out. A row meets one adapter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from loraserve.lora.stack import Group

Span = tuple[Group, slice, Tensor | None]
"""A slot alone, rows of it that lie together, and their weights (n, 1) unless all are 1."""


def projected(x: Tensor, A: Tensor, scale: Tensor) -> Tensor:
    """x Aᵀ · scale, (n, R) float32."""
    return (x.to(A.dtype) @ A.T).float() * scale


def spans_of(group: Group, rows: Tensor, weights: Tensor, device: torch.device | str) -> Iterator[Span]:
    """One adapter's `rows` (n,), in order, and `weights` (n,), both on the CPU, as stretches that lie together."""
    breaks = (rows.diff() != 1).nonzero().squeeze(1) + 1
    for own, factors in zip(rows.tensor_split(breaks), weights.tensor_split(breaks), strict=True):
        plain = bool((factors == 1).all())
        yield group, slice(int(own[0]), int(own[-1]) + 1), None if plain else factors.unsqueeze(1).to(device)


@dataclass
class Trained:
    """The part of a batch's delta that has gradients."""

    spans: list[Span]

    def __post_init__(self) -> None:
        ends = sorted((rows.start, rows.stop) for _, rows, _ in self.spans)
        assert all(before[1] <= after[0] for before, after in pairwise(ends)), "in training a row has one adapter"

    def add(self, targets: tuple[str, ...], widths: Sequence[int], x: Tensor, y: Tensor) -> None:
        spans: list[slice] = []
        tensors: list[Tensor] = []
        for group, rows, weights in self.spans:
            if (site := group.site(targets, widths)) is not None:
                spans.append(rows)
                scaling = site.scaling[0] if weights is None else weights * site.scaling[0]  # (R,) or (n, R)
                tensors += (site.A[0], site.B[0], scaling)
        if spans:
            _Deltas.apply(y, x, spans, *tensors)


class _Deltas(torch.autograd.Function):
    """The deltas of several adapters, each on rows of its own, added to y in place.

    The products take A and B in bfloat16, as serving does, where x is that and the processor multiplies it. Parameters
    and their gradients stay as they are. x is kept as it is, as its neighbours keep it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, spans: Sequence[slice], *weights: Tensor) -> Tensor:
        """weights: A (R, in), B (R, Σout) and scaling (R,) of each span's adapter."""
        dtype = ctx.dtype = x.dtype if multiplies(x.dtype, x.device) else weights[0].dtype
        hidden = []
        for rows, A, B, scaling in zip(spans, weights[::3], weights[1::3], weights[2::3], strict=True):
            h = projected(x[rows], A.to(dtype), scaling)
            hidden.append(h)
            if y.dtype == dtype:
                y[rows].addmm_(h.to(dtype), B.to(dtype))
            else:
                y[rows].add_(h @ B)
        ctx.spans = spans
        ctx.save_for_backward(x, *weights, *hidden)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        spans, dtype = ctx.spans, ctx.dtype
        weights, hidden = rest[: 3 * len(spans)], rest[3 * len(spans) :]
        whole = sum(rows.stop - rows.start for rows in spans) == len(x)
        by_x = None
        if ctx.needs_input_grad[1]:
            by_x = torch.empty_like(x) if whole else torch.zeros_like(x)
        by_weights: list[Tensor | None] = []
        for rows, A, B, scaling, h in zip(spans, weights[::3], weights[1::3], weights[2::3], hidden, strict=True):
            g = gradient[rows].to(dtype)
            by_h = ((g @ B.to(dtype).T).float() * scaling).to(dtype)  # (n, R), before scaling
            if by_x is not None and by_x.dtype == dtype:
                torch.mm(by_h, A.to(dtype), out=by_x[rows])
            elif by_x is not None:
                by_x[rows] = by_h @ A.to(dtype)
            by_weights += [(by_h.T @ x[rows].to(dtype)).to(A.dtype), (h.to(dtype).T @ g).to(B.dtype), None]
        return gradient, by_x, None, *by_weights


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether that is bfloat16 and there are instructions that multiply it."""
    has = torch.cpu.get_capabilities()
    native = device.type != "cpu" or has.get("avx512_bf16") or has.get("amx_bf16")
    return dtype == torch.bfloat16 and bool(native)
