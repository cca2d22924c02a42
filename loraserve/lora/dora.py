"""DoRA: a LoRA update whose result has a length of its own for every output.

    y = g ⊙ (W x + scaling · B A x)        g = m / ‖W + scaling · B A‖, over the inputs of each output
      = W x + (g - 1) ⊙ W x + scaling · (g ⊙ B) (A x)

Served, an adapter is the second line: g is computed once from the base's weight, and what is added to W x is a gain of
that and an ordinary delta. A row's adapters, each with its weight, change it by Σ weight · what each adds, so the gains
of a blend add up, too, before they multiply. Gains are summed slot by slot in float32, whatever rows stand beside.
Source: DoRA, arXiv:2402.09353; PEFT `use_dora`. Knows the base only as a function that gives a target's weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
        weights[target] = replace(update, B=gain.unsqueeze(1) * update.B.float(), magnitude=None, gain=gain - 1)
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
