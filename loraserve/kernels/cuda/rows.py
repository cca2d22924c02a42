"""What happens to each row between two matrix products: add and norm, norm and rotate, silu and multiply.

One program owns a row, a head of a row, or a block of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Columns of one program of `silu_and_multiply`."""


def add_rms_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, cast_first: bool, dtype: torch.dtype
) -> Tensor:
    """Add y (N, D) to x (N, D) float32 in place and return the normed sum, times weight (D,) float32, in `dtype`."""
    n, d = x.shape
    out = torch.empty(n, d, dtype=dtype, device=x.device)
    if n:
        with torch.cuda.device_of(x):
            _add_rms_norm[(n,)](
                x, y, weight, out, d, eps, HAS_Y=y is not None, CAST_FIRST=cast_first, BLOCK=triton.next_power_of_2(d)
            )
    return out


def norm_and_rotate(
    qkv: Tensor,
    heads: tuple[int, int, int],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cast_first: bool,
    table: Tensor,
    positions: Tensor,
) -> None:
    """Norm and rotate queries and keys in qkv (N, (H + 2 KV) D) in place; see `cpu.norm_and_rotate`."""
    h, kv, d = heads
    q_norm, k_norm = norms or (None, None)
    if qkv.shape[0]:
        with torch.cuda.device_of(qkv):
            _norm_and_rotate[(qkv.shape[0], h + kv)](
                qkv, q_norm, k_norm, table, positions, qkv.stride(0), h, eps, D=d, NORMED=norms is not None,
                CAST_FIRST=cast_first, BLOCK=triton.next_power_of_2(d // 2), num_warps=1,
            )  # fmt: skip


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, (N, D), of gate and up side by side in (N, 2 D)."""
    n, d = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(n, d, dtype=gate_up.dtype, device=gate_up.device)
    if n:
        with torch.cuda.device_of(gate_up):
            _silu_and_multiply[(n, triton.cdiv(d, BLOCK))](gate_up, out, d, BLOCK=BLOCK)
    return out


@triton.jit
def _add_rms_norm(
    x, y, weight, out, d, eps, HAS_Y: tl.constexpr, CAST_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * d
    cols = tl.arange(0, BLOCK)
    mask = cols < d
    value = tl.load(x + row + cols, mask=mask, other=0.0)
    if HAS_Y:
        value += tl.load(y + row + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(x + row + cols, value, mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / d + eps)
    w = tl.load(weight + cols, mask=mask, other=0.0)
    dtype = out.dtype.element_ty
    if CAST_FIRST:
        normed = (value * scale).to(dtype).to(tl.float32) * w
    else:
        normed = value * scale * w
    tl.store(out + row + cols, normed.to(dtype), mask=mask)


@triton.jit
def _norm_and_rotate(
    qkv, q_norm, k_norm, table, positions, stride, h, eps,
    D: tl.constexpr, NORMED: tl.constexpr, CAST_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    HALF: tl.constexpr = D // 2
    cols = tl.arange(0, BLOCK)
    mask = cols < HALF
    x = qkv + row.to(tl.int64) * stride + head * D + cols
    dtype = qkv.dtype.element_ty
    left = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        scale = 1.0 / tl.sqrt(tl.sum(left * left + right * right, axis=0) / D + eps)
        query, key = cols < tl.where(head < h, HALF, 0), cols < tl.where(head < h, 0, HALF)
        w_left = tl.load(q_norm + cols, mask=query, other=0.0) + tl.load(k_norm + cols, mask=key, other=0.0)
        w_right = tl.load(q_norm + HALF + cols, mask=query, other=0.0)
        w_right += tl.load(k_norm + HALF + cols, mask=key, other=0.0)
        left, right = left * scale, right * scale
        if CAST_FIRST:
            left, right = left.to(dtype).to(tl.float32), right.to(dtype).to(tl.float32)
        left = (left * w_left).to(dtype).to(tl.float32)
        right = (right * w_right).to(dtype).to(tl.float32)
    cos = table + tl.load(positions + row) * 2 * D + cols
    sin = cos + D
    cos_left, sin_left = tl.load(cos, mask=mask, other=0.0), tl.load(sin, mask=mask, other=0.0)
    cos_right = tl.load(cos + HALF, mask=mask, other=0.0)
    sin_right = tl.load(sin + HALF, mask=mask, other=0.0)
    tl.store(x, (left * cos_left - right * sin_left).to(dtype), mask=mask)
    tl.store(x + HALF, (right * cos_right + left * sin_right).to(dtype), mask=mask)


@triton.jit
def _silu_and_multiply(gate_up, out, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < d
    gate = tl.load(gate_up + row * 2 * d + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * d + d + cols, mask=mask, other=0.0).to(tl.float32)
    silu = gate / (1.0 + tl.exp(-gate))
    tl.store(out + row * d + cols, (silu * up).to(out.dtype.element_ty), mask=mask)
