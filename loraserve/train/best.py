"""The best weights of a run by validation loss: what is published, and when there is no use in going on.

The loss before the first step is the base's own. All of it goes into the checkpoint, so that a resumed run ends as one
that was not interrupted.
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
            self._parameters |= {f"{target}.A": weight.A, f"{target}.B": weight.B}
        self._kept: dict[str, Tensor] = {}
        self.base_loss: float | None = None
        self.loss: float | None = None
        self.step = 0

    def offer(self, step: int, loss: float) -> None:
        """Take note of the validation loss after `step` micro-batches, and of the weights if it is the lowest."""
        if step == 0:
            self.base_loss = loss
        elif math.isfinite(loss) and (self.loss is None or loss < self.loss):
            self.step, self.loss = step, loss
            self._kept = {name: tensor.detach().cpu().clone() for name, tensor in self._parameters.items()}

    @property
    def beats_base(self) -> bool | None:
        """Whether the validation loss is below the base's; None if nothing was validated."""
        if self.base_loss is None:
            return None
        return self.loss is not None and not self.loss >= self.base_loss

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights into the parameters; without validation those of the last step stay."""
        for name, tensor in self._kept.items():
            self._parameters[name].copy_(tensor)

    def state(self) -> dict[str, Any]:
        return {"base_loss": self.base_loss, "loss": self.loss, "step": self.step, "weights": self._kept}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
        self.base_loss, self.loss, self.step = state["base_loss"], state["loss"], state["step"]
        self._kept = state["weights"]
