"""DoRA in training: the gain of every output, which changes with the adapter.

    g = m / ‖W + s·B A‖,    ‖W + s·B A‖² = ‖W‖² + Σ over r of B ∘ (2s · W Aᵀ + s² · B (A Aᵀ)),    of each output

Nothing of the size of W is made: ‖W‖² (out,) is computed once, and W Aᵀ (out, r) once for an optimizer step, from some
rows of W at a time in float32. To the gradient the norm is a number, as in PEFT and the paper's section 4.3: g passes
it on to m, and g ⊙ B to m and B.
Source: DoRA, arXiv:2402.09353. What a batch does with g is in `lora/dora.py`.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from loraserve.lora.adapter import LoraWeight
from loraserve.lora.dora import WeightOf, with_gain

CHUNK = 1 << 20
"""Numbers of W that are in float32 at once."""


class DoraNorms:
    """The norms under an adapter whose weights change, on a base that does not. One without magnitudes has none.

    Args:
        weights: parameters, on the base's device.
        weight_of: the base's weights; None where there are no magnitudes.
    """

    def __init__(self, weights: Mapping[str, LoraWeight], weight_of: WeightOf | None) -> None:
        self._weights, self._weight_of = weights, weight_of
        self._squares = {t: row_squares(self._base(t)) for t, w in weights.items() if w.magnitude is not None}
        self._norms: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self) -> None:
        """Take the norms (out,) for the weights as they are now."""
        for target, square in self._squares.items():
            update = self._weights[target]
            A, B, s = update.A, update.B, update.scaling
            projected = torch.cat([rows @ A.T for rows in _in_float32(self._base(target))])  # (out, r)
            change = (B * (2 * s * projected + s * s * (B @ (A @ A.T)))).sum(1)  # (out,)
            self._norms[target] = (square + change).sqrt()

    def weights(self) -> dict[str, LoraWeight]:
        """The adapter as a batch computes with it, by the norms last measured; for one backward pass."""
        used = dict(self._weights)
        for target, norm in self._norms.items():
            magnitude = used[target].magnitude
            assert magnitude is not None
            used[target] = with_gain(used[target], magnitude / norm)
        return used

    def _base(self, target: str) -> Tensor:
        assert self._weight_of is not None
        return self._weight_of(target)


def measured(weights: Mapping[str, LoraWeight], weight_of: WeightOf) -> dict[str, LoraWeight]:
    """An adapter as a batch computes with it, as in training."""
    norms = DoraNorms(weights, weight_of)
    norms.measure()
    return norms.weights()


@torch.no_grad()
def row_squares(weight: Tensor) -> Tensor:
    """‖W‖² of each output, (out,) float32."""
    return torch.cat([rows.square().sum(1) for rows in _in_float32(weight)])


def _in_float32(weight: Tensor) -> Iterator[Tensor]:
    """The rows of W (out, in), some at a time."""
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        yield rows.float()
