"""The best weights of a run by validation loss: what is published, and when there is no use in going on.

What is published must beat the base, and a run that goes on with an adapter must beat that one, too. All of it goes
into the checkpoint, so that a resumed run ends as one that was not interrupted.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loraserve.lora.adapter import LoraWeight


class BestWeights:
    """Keeps a copy of `weights` as they were at the lowest validation loss."""

    def __init__(self, weights: Mapping[str, LoraWeight]) -> None:
        self._parameters: dict[str, Tensor] = {}
        for target, weight in weights.items():
            self._parameters |= {f"{target}.{name}": tensor for name, tensor in weight.named_tensors.items()}
        self._kept: dict[str, Tensor] = {}
        self.base_loss: float | None = None
        self.initial_loss: float | None = None
        """Of the adapter that the run goes on with."""
        self.loss: float | None = None
        self.step = 0

    def begin(self, base_loss: float, initial_loss: float | None) -> None:
        """Take note of the validation losses before the first step."""
        self.base_loss, self.initial_loss = base_loss, initial_loss

    def offer(self, step: int, loss: float) -> None:
        """Take note of the validation loss after `step` micro-batches, and of the weights if it is the lowest."""
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            self.step, self.loss = step, loss
            self._kept = {name: tensor.detach().cpu().clone() for name, tensor in self._parameters.items()}

    @property
    def is_better(self) -> bool | None:
        """Whether the validation loss is below all there was before; None if nothing was validated."""
        if self.base_loss is None:
            return None
        before = [self.base_loss] if self.initial_loss is None else [self.base_loss, self.initial_loss]
        return self.loss is not None and not any(self.loss >= loss for loss in before)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights into the parameters; without validation those of the last step stay."""
        for name, tensor in self._kept.items():
            self._parameters[name].copy_(tensor)

    def state(self) -> dict[str, Any]:
        losses = {"base_loss": self.base_loss, "initial_loss": self.initial_loss, "loss": self.loss}
        return losses | {"step": self.step, "weights": self._kept}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
        self.base_loss, self.initial_loss = state["base_loss"], state["initial_loss"]
        self.loss, self.step, self._kept = state["loss"], state["step"], state["weights"]
