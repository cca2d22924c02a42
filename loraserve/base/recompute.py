"""Cheap steps that keep only their inputs for the backward pass, and compute the rest again there.

Norms, gates and attention are a small part of a block's time and, with their float32 copies and intermediate products,
the larger part of what it would keep.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., Tensor]


def recompute(step: Step, *inputs: Tensor) -> Tensor:
    """Return `step(*inputs)`; where gradients are kept, of all it computes only `inputs` stay in memory.

    Args:
        step: a function of `inputs` without randomness; gradients reach nothing else that it uses.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Recompute.apply(step, *inputs)
    return step(*inputs)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, *inputs: Tensor) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(*inputs)
        return step(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            output = ctx.step(*inputs)
        found = iter(torch.autograd.grad(output, [x for x in inputs if x.requires_grad], gradient))
        return None, *(next(found) if need else None for need in needed)
