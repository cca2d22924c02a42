"""The C kernels of training, as steps that autograd knows: equations stand in train.c.

Each keeps its inputs and nothing else, and passes no gradient on to weights and angles, which are frozen. On a CPU, in
float32 and bfloat16; where `available` says no, torch computes the same.
"""

from typing import Any

import torch
from torch import Tensor

from loraserve.kernels import cpu
from loraserve.kernels.build import library


def available(x: Tensor) -> bool:
    """Whether x has a gradient that the kernels can pass on."""
    return (
        x.requires_grad
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in cpu.DTYPES
        and library() is not None
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, cast_first: bool) -> Tensor:
    """norm(x) · weight of x (..., D) and weight (D,) float32; `cast_first` rounds before the weight multiplies."""
    out: Tensor = _Norm.apply(x, weight, eps, cast_first)
    return out


def silu_and_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, both (N, D)."""
    out: Tensor = _Gate.apply(gate, up)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x (N, H, D) rotated by cos and sin (N, 1, D) float32, whose halves are equal."""
    out: Tensor = _Rotation.apply(x, cos, sin)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, cast_first: bool) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps, d = eps, x.shape[-1]
        out = torch.empty_like(x)
        cpu.call("norm", x.dtype, x, weight, out, x.numel() // d, d, eps, int(cast_first))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        by_x, d = torch.empty_like(x), x.shape[-1]
        cpu.call("norm_backward", x.dtype, x, weight, gradient.contiguous(), by_x, x.numel() // d, d, ctx.eps)
        return by_x, None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        cpu.call("gate", gate.dtype, gate, up, out, gate.numel())
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        by_gate, by_up = torch.empty_like(gate), torch.empty_like(up)
        cpu.call("gate_backward", gate.dtype, gate, up, gradient.contiguous(), by_gate, by_up, gate.numel())
        return by_gate, by_up


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    assert cos.stride() == sin.stride() and cos.stride(-1) == 1
    cpu.call("rotate", x.dtype, x, cos, sin, cos.stride(0), out, *x.shape, sign)
    return out
