"""DoRA: a LoRA update whose result has a length of its own for every output.

    y = g ⊙ (W x + scaling · B A x)        g = m / ‖W + scaling · B A‖, over the inputs of each output
      = W x + (g - 1) ⊙ W x + scaling · (g ⊙ B) (A x)

Served, an adapter is the second line: g is computed once from the base's weight, and what is added to W x is a gain of
that and an ordinary delta. A row's adapters, each with its weight, change it by Σ weight · what each adds, so the gains
of a blend add up, too, before they multiply. Gains are summed slot by slot in float32, whatever rows stand beside.

In training m, A and B change, and the norm with them; as in PEFT and the paper's section 4.3 no gradient passes through
it. `train/dora.py` has the gain of each pass, whose gradient goes on to m and B.
Source: DoRA, arXiv:2402.09353; PEFT `use_dora`. Knows the base only as a function that gives a target's weight.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loraserve.errors import AdapterRefused
from loraserve.lora.adapter import Adapter, LoraWeight, list_some
from loraserve.lora.stack import AdapterStack

WeightOf = Callable[[str], Tensor]
"""The base's weight (out, in) of a target."""


def gain_of(weight: Tensor, update: LoraWeight) -> Tensor:
    """g (out,) float32 of a DoRA update on the base's `weight` (out, in), on the update's device."""
    assert update.magnitude is not None
    direction = weight.to(update.A.device, torch.float32) + update.delta()
    return update.magnitude.float() / direction.norm(dim=1)


def with_gain(update: LoraWeight, gain: Tensor) -> LoraWeight:
    """A DoRA update as a batch computes with it, for its g (out,) float32."""
    return replace(update, B=gain.unsqueeze(1) * update.B.float(), magnitude=None, gain=gain - 1)


@torch.no_grad()
def prepared(adapter: Adapter, weight_of: WeightOf) -> Adapter:
    """The adapter as a batch computes with it beside one base; the same object if it has no magnitudes.

    Raises:
        AdapterRefused: an output's weights vanish under it, so that there is nothing to give a magnitude to.
    """
    if not adapter.is_dora:
        return adapter
    weights, vanished = dict(adapter.weights), []
    for target, update in adapter.weights.items():
        if update.magnitude is None:
            continue
        gain = gain_of(weight_of(target), update)
        if not gain.isfinite().all():
            vanished.append(target)
        weights[target] = with_gain(update, gain)
    if vanished:
        raise AdapterRefused(
            adapter.name, [f"{list_some(vanished)}: DoRA divides by the length of W + ΔW, which is zero on this base"]
        )
    return Adapter(weights, adapter.name)


@dataclass
class Gains:
    """The part of a batch's work that multiplies the rows of DoRA adapters; before any delta is added."""

    stack: AdapterStack
    rows: Tensor
    """(n,), those with a DoRA adapter."""
    weights: Tensor
    """(n, S) float32."""

    def add(self, targets: tuple[str, ...], widths: Sequence[int], x: Tensor, y: Tensor) -> None:
        if not (gains := self.stack.gains(targets, widths)):
            return
        total = y.new_ones(len(self.rows), y.shape[1], dtype=torch.float32)
        for slot, gain in gains:
            total += self.weights[:, slot : slot + 1] * gain
        y[self.rows] = (y[self.rows].float() * total).to(y.dtype)


class _Gained(torch.autograd.Function):
    """y ⊙ (1 + gain) at some rows, in place. It keeps those rows as they were, in y's dtype."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, rows: Tensor | None) -> Tensor:
        before = y.clone() if rows is None else y[rows]  # (n, out)
        ctx.save_for_backward(before, gain, rows)
        ctx.mark_dirty(y)
        if rows is None:
            return y.mul_(1 + gain)  # in float32, rounded once
        return y.index_copy_(0, rows, (before * (1 + gain)).to(y.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        before, gain, rows = ctx.saved_tensors
        own = (gradient if rows is None else gradient[rows]).float()
        by_gain, by_y = (own * before).sum(0), None
        if ctx.needs_input_grad[0]:
            by_own = (own * (1 + gain)).to(gradient.dtype)
            by_y = by_own if rows is None else gradient.index_copy(0, rows, by_own)
        return by_y, by_gain, None


@dataclass
class TrainedGains:
    """The same work in training, where each row has one adapter at weight 1, and gains have gradients."""

    stack: AdapterStack
    rows: Mapping[int, Tensor | None]
    """By slot, of the DoRA adapters that have some; None stands for all rows."""

    @classmethod
    def of(cls, stack: AdapterStack, row_weights: Tensor, device: torch.device | str) -> "TrainedGains":
        """The work of a batch whose rows have `row_weights` (N, S), on the CPU."""
        found: dict[int, Tensor | None] = {}
        for slot in stack.dora_slots:
            rows = row_weights[:, slot].nonzero().squeeze(1)  # (n,)
            if len(rows):
                assert (row_weights[rows, slot] == 1).all()
                found[slot] = None if len(rows) == len(row_weights) else rows.to(device)
        return cls(stack, found)

    def add(self, targets: tuple[str, ...], widths: Sequence[int], x: Tensor, y: Tensor) -> None:
        for slot, gain in self.stack.gains(targets, widths):
            if slot in self.rows:
                _Gained.apply(y, gain, self.rows[slot])
