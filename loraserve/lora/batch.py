"""The adapters of one forward pass, and the batched delta that every linear layer adds.

    y[n] += Σ_s W[n, s] · scaling_s · B_s (A_s x[n])

Rows n are tokens; slots s are the adapters active in this step; W (N, S) holds each row's weights (several per row for
a blend, none for the base). For one target the A of all active adapters stand stacked as one (R, in) matrix and their B
as one (out, R), R the sum of their ranks, so that a mixed batch costs two matrix products however many adapters it
mixes; a row's foreign columns are multiplied by zero in between. A and B stay as they were trained:
`weight · scaling` multiplies xAᵀ in float32, in training and in serving alike.

Invariants: rows without an adapter are never written, so they keep exactly the base's bits; a batch in which no row has
an adapter is represented by None and runs no code here. `apply_one_by_one` is the naive form and the tests' oracle.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from loraserve.lora.adapter import LoraWeight

Weights = Mapping[str, LoraWeight]


class _Site:
    """What one target needs: stacked A and B and, for each of the R columns, its slot and scaling."""

    def __init__(self, slots: list[int], weights: list[LoraWeight]) -> None:
        alone = len(weights) == 1
        self.A = weights[0].A if alone else torch.cat([w.A for w in weights])  # (R, in)
        self.B = weights[0].B if alone else torch.cat([w.B for w in weights], dim=1)  # (out, R)
        # Sites with the same key share one mask per step: all targets of uniform adapters do.
        self.key = tuple((slot, w.r, w.scaling) for slot, w in zip(slots, weights, strict=True))
        device = self.A.device
        self.slot = torch.tensor([s for s, r, _ in self.key for _ in range(r)], device=device)  # (R,)
        self.scaling = torch.tensor([c for _, r, c in self.key for _ in range(r)], device=device)  # (R,)


class AdapterStack:
    """The adapters active together, stacked per target on first use. Kept while the active set stays the same."""

    def __init__(self, adapters: Sequence[Weights]) -> None:
        self.adapters = list(adapters)
        self._sites: dict[str, _Site | None] = {}

    def site(self, target: str) -> _Site | None:
        if target not in self._sites:
            slots = [s for s, weights in enumerate(self.adapters) if target in weights]
            self._sites[target] = _Site(slots, [self.adapters[s][target] for s in slots]) if slots else None
        return self._sites[target]


class LoraBatch:
    """The adapters of one step, for `model(..., lora=...)`.

    Args:
        stack: the active adapters; slot numbers below index it.
        row_weights: W (N, S) float32, the weight of each slot for each token row; zero where it does not apply.
    """

    def __init__(self, stack: AdapterStack, row_weights: Tensor) -> None:
        self.stack = stack
        self.row_weights = row_weights
        self._touched = row_weights.ne(0).any(dim=1).nonzero().squeeze(1)  # (N',)
        self._all_touched = self._touched.numel() == row_weights.shape[0]
        self._any_touched = self._touched.numel() > 0
        self._masks: dict[tuple[tuple[int, int, float], ...], tuple[Tensor, Tensor | None]] = {}

    @classmethod
    def uniform(cls, weights: Weights, num_rows: int, device: torch.device | str = "cpu") -> "LoraBatch":
        """Every row uses the one adapter at weight 1, as in training."""
        return cls(AdapterStack([weights]), torch.ones(num_rows, 1, device=device))

    @classmethod
    def from_segments(
        cls,
        stack: AdapterStack,
        segments: Sequence[tuple[int, Sequence[tuple[int, float]]]],
        device: torch.device | str,
    ) -> "LoraBatch | None":
        """Build W from consecutive row segments.

        Args:
            segments: per sequence, its number of rows and its (slot, weight) entries; a slot may occur only once in it.

        Returns:
            None if no row has a nonzero weight, so that the model runs no adapter code.
        """
        lengths = torch.tensor([length for length, _ in segments])
        weights = torch.zeros(len(segments), len(stack.adapters))
        for i, (_, entries) in enumerate(segments):
            for slot, weight in entries:
                weights[i, slot] = weight
        if not weights.any():
            return None
        return cls(stack, weights.repeat_interleave(lengths, dim=0).to(device))

    def select(self, rows: Tensor) -> "LoraBatch":
        """The batch of a subset of rows, `rows` (M,) int64: an expert's tokens, or the rows that sample."""
        return LoraBatch(self.stack, self.row_weights[rows])

    def apply(self, target: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y plus the delta of `target`.

        Args:
            x: the layer's input (N, in).
            y: the frozen layer's output (N, out); not modified.
        """
        site = self.stack.site(target) if self._any_touched else None
        if site is None:
            return y
        if site.key not in self._masks:
            mask = self.row_weights[:, site.slot] * site.scaling  # (N, R)
            if not self._all_touched:
                mask = mask[self._touched]
            foreign = mask == 0 if len(site.key) > 1 else None
            self._masks[site.key] = mask, foreign
        mask, foreign = self._masks[site.key]
        x = x if self._all_touched else x[self._touched]
        h = F.linear(x.to(site.A.dtype), site.A).float() * mask  # (N', R)
        if foreign is not None:  # an overflow in a foreign column, times zero, must not become this row's NaN
            h = h.masked_fill(foreign, 0.0)
        delta = F.linear(h.to(site.B.dtype), site.B).to(y.dtype)  # (N', out)
        return y + delta if self._all_touched else y.index_add(0, self._touched, delta)


def apply_one_by_one(batch: LoraBatch, target: str, x: Tensor, y: Tensor) -> Tensor:
    """The same as `batch.apply`, one adapter and one row at a time: the definition, kept as the oracle."""
    y = y.clone()
    for slot, weights in enumerate(batch.stack.adapters):
        if target not in weights:
            continue
        w = weights[target]
        for row in range(x.shape[0]):
            weight = batch.row_weights[row, slot].item()
            if weight:
                h = (w.A @ x[row].to(w.A.dtype)).float() * (weight * w.scaling)
                y[row] += (w.B @ h.to(w.B.dtype)).to(y.dtype)
    return y
