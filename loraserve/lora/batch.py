"""The adapters of one forward pass, and the batched delta that every linear layer adds.

    y[n] += Σ_s W[n, s] · scaling_s · B_s (A_s x[n])

Rows n are tokens; slots s are the adapters active in this step; W (N, S) holds each row's weights (several per row for
a blend, none for the base). A row meets the adapters it asked for and no other. A kernel adds the deltas of all in one
call; without one, many rows of one adapter take a product of their own, and the few rows that each of many adapters has
while decoding share one batched product. A and B are never scaled themselves; `weight · scaling` multiplies xAᵀ in
float32, in training (`lora/trained.py`) and in serving alike. DoRA's gains multiply y first (`lora/dora.py`).

Invariants: rows without an adapter are neither read nor written, so they keep exactly the base's bits; a batch in which
no row has an adapter is represented by None and runs no code here. `apply_one_by_one` is the naive form and the tests'
oracle.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from loraserve.kernels import dispatch
from loraserve.kernels.dispatch import Kernels
from loraserve.lora.dora import Gains, TrainedGains
from loraserve.lora.stack import AdapterStack, Group, Weights
from loraserve.lora.trained import Span, Trained, projected, spans_of

FEW_ROWS = 16
"""Without a kernel a slot with more rows than this takes a product of its own."""


class Work(Protocol):
    """A part of a batch's delta."""

    def add(self, targets: tuple[str, ...], widths: Sequence[int], x: Tensor, y: Tensor) -> None: ...


def _delta(x: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """(x Aᵀ · scale) B"""
    return projected(x, A, scale).to(B.dtype) @ B


@dataclass
class _Alone:
    """The rows of one slot. `rows` None stands for all rows, `weights` (n, 1) None for all ones."""

    group: Group
    """Of this slot alone."""
    rows: Tensor | None
    weights: Tensor | None

    def add(self, targets: tuple[str, ...], widths: Sequence[int], x: Tensor, y: Tensor) -> None:
        if (site := self.group.site(targets, widths)) is None:
            return
        A, B = site.A[0], site.B[0]  # (R, in), (R, Σout)
        x = x if self.rows is None else x[self.rows]
        scale = site.scaling[0] if self.weights is None else self.weights * site.scaling[0]  # (R,) or (n, R)
        delta = _delta(x, A, B, scale)
        if self.rows is None:
            y += delta
        else:
            y.index_add_(0, self.rows, delta.to(y.dtype))


@dataclass
class _Together:
    """A few rows of each slot of a group: `rows` (S·m,), `weights` (S, m, 1), padded with weight 0."""

    group: Group
    rows: Tensor
    weights: Tensor
    foreign: Tensor | None

    def add(self, targets: tuple[str, ...], widths: Sequence[int], x: Tensor, y: Tensor) -> None:
        if (site := self.group.site(targets, widths)) is None:
            return
        x = x[self.rows].view(len(self.group.members), -1, x.shape[1])  # (S, m, in)
        h = torch.bmm(x.to(site.A.dtype), site.A.transpose(1, 2)).float()  # (S, m, R)
        h = h * (self.weights * site.scaling.unsqueeze(1))
        if self.foreign is not None:  # an overflow in padding, times zero, must not become a row's NaN
            h = h.masked_fill(self.foreign, 0.0)
        delta = torch.bmm(h.to(site.B.dtype), site.B)  # (S, m, Σout)
        y.index_add_(0, self.rows, delta.flatten(0, 1).to(y.dtype))


@dataclass
class _Few:
    """A few rows of each of any slots, by a kernel."""

    stack: AdapterStack
    kernels: Kernels
    entries: Any

    def add(self, targets: tuple[str, ...], widths: Sequence[int], x: Tensor, y: Tensor) -> None:
        if (deltas := self.stack.deltas(self.kernels, targets, widths, x.dtype)) is not None:
            deltas.add(x.contiguous(), y, self.entries)


class LoraBatch:
    """The adapters of one step, for `model(..., lora=...)`.

    Args:
        stack: the active adapters; slot numbers below index it.
        row_weights: W (N, S) float32 on the CPU, the weight of each slot for each token row; zero where it does not
            apply.
        device: where the rows are.
        repeatable: a row's delta must not depend on how many rows stand beside it, bit for bit. Needs the kernel.
    """

    def __init__(
        self, stack: AdapterStack, row_weights: Tensor, device: torch.device | str = "cpu", repeatable: bool = False
    ) -> None:
        self.stack = stack
        self.row_weights = row_weights
        self._device = device
        self._repeatable = repeatable
        self._plans: dict[bool, list[Work]] = {}

    @classmethod
    def uniform(cls, weights: Weights, num_rows: int, device: torch.device | str = "cpu") -> "LoraBatch":
        """Every row uses the one adapter at weight 1, as in training."""
        return cls(AdapterStack([weights]), torch.ones(num_rows, 1), device)

    @classmethod
    def from_segments(
        cls,
        stack: AdapterStack,
        segments: Sequence[tuple[int, Sequence[tuple[int, float]]]],
        device: torch.device | str,
        repeatable: bool = False,
    ) -> "LoraBatch | None":
        """Build W from consecutive row segments.

        Args:
            segments: per sequence, its number of rows and its (slot, weight) entries; a slot may occur only once in it.

        Returns:
            None if no row has a nonzero weight, so that the model runs no adapter code.
        """
        lengths = torch.tensor([length for length, _ in segments])
        cells = [(i, slot, weight) for i, (_, entries) in enumerate(segments) for slot, weight in entries if weight]
        if not cells:
            return None
        weights = torch.zeros(len(segments), len(stack.adapters))
        rows, slots, values = zip(*cells, strict=True)
        weights[list(rows), list(slots)] = torch.tensor(values)
        return cls(stack, weights.repeat_interleave(lengths, dim=0), device, repeatable)

    @classmethod
    def fixed(cls, work: Work) -> "LoraBatch":
        """A batch that does `work` and nothing else; no rows can be selected from it."""
        batch = cls(AdapterStack([]), torch.empty(0, 0))
        batch._plans = {False: [work], True: [work]}
        return batch

    def select(self, rows: Tensor) -> "LoraBatch":
        """The batch of a subset of rows, `rows` (M,) int64: an expert's tokens, or the rows that sample."""
        return LoraBatch(self.stack, self.row_weights[rows.cpu()], self._device, self._repeatable)

    def apply(self, target: str, x: Tensor, y: Tensor) -> Tensor:
        """Return y plus the delta of `target`.

        Args:
            x: the layer's input (N, in).
            y: the frozen layer's output (N, out); not modified.
        """
        return self.add((target,), (y.shape[1],), x, y.clone())

    def add(self, targets: tuple[str, ...], widths: Sequence[int], x: Tensor, y: Tensor) -> Tensor:
        """Add to y the deltas of layers that read the same input.

        Args:
            targets: the layers.
            widths: their out_features.
            x: their input (N, in).
            y: their outputs side by side (N, Σout); written in place and returned.
        """
        kernels = None
        if x.dtype == y.dtype and not torch.is_grad_enabled():
            kernels = dispatch.of(x.device, x.dtype)
        for work in self._plan(kernels):
            work.add(targets, widths, x, y)
        return y

    def in_one_call(self, kernels: Kernels) -> Any:
        """The entries of all rows for a kernel; None if matrix products serve some of them."""
        plan = self._plan(kernels)
        return plan[0].entries if len(plan) == 1 and isinstance(plan[0], _Few) else None

    def _plan(self, kernels: Kernels | None) -> list[Work]:
        if (planned := kernels is not None) not in self._plans:
            slots = range(len(self.stack.adapters))
            plan = self._plan_for(kernels) if kernels else self._plan_for_groups(slots)
            self._plans[planned] = [*self._plan_gains(), *plan]
        return self._plans[planned]

    def _plan_gains(self) -> list[Work]:
        """The gains of DoRA, which must meet the base's outputs before a delta does."""
        slots = self.stack.dora_slots
        if any(group.in_training for group in self.stack.groups):
            return [TrainedGains.of(self.stack, self.row_weights, self._device)] if slots else []
        rows = (self.row_weights[:, slots] != 0).any(dim=1).nonzero().squeeze(1)  # (n,)
        if not len(rows):
            return []
        return [Gains(self.stack, rows.to(self._device), self.row_weights[rows].to(self._device))]

    def _plan_for(self, kernels: Kernels) -> list[Work]:
        """The kernel for slots of few rows, matrix products for the others."""
        most = sys.maxsize if self._repeatable else kernels.FEW_ROWS
        counts = (self.row_weights != 0).sum(dim=0)  # (S,)
        few = (counts <= most) & (counts > 0)
        plan = self._plan_for_groups((counts > most).nonzero().squeeze(1).tolist())
        if few.any():
            plan.append(_Few(self.stack, kernels, kernels.entries(self.row_weights * few, self._device)))
        return plan

    def _plan_for_groups(self, slots: Sequence[int]) -> list[Work]:
        """Matrix products for some of the slots."""
        plan: list[Work] = []
        trained: list[Span] = []
        wanted = set(slots)
        for group in self.stack.groups:
            weights = self.row_weights[:, group.members]  # (N, S)
            by_slot, rows = weights.T.nonzero(as_tuple=True)  # by slot, then by row
            per_slot = rows.split(by_slot.bincount(minlength=len(group.members)).tolist())
            counts = [len(own) if slot in wanted else 0 for slot, own in zip(group.members, per_slot, strict=True)]
            if group.in_training:
                for member, own in enumerate(per_slot):
                    if counts[member]:
                        trained += spans_of(group.single(member), own, weights[own, member], self._device)
                continue
            few = [n if n <= FEW_ROWS else 0 for n in counts]
            if sum(n > 0 for n in few) < 2:
                few = [0] * len(few)
            for member, own in enumerate(per_slot):
                if counts[member] and not few[member]:
                    plan.append(self._alone(group, member, own, weights[own, member]))
            if any(few):
                plan.append(self._together(group, weights, per_slot, few))
        return [*plan, Trained(trained)] if trained else plan

    def _alone(self, group: Group, member: int, rows: Tensor, weights: Tensor) -> _Alone:
        everywhere = len(rows) == self.row_weights.shape[0]
        plain = bool((weights == 1).all())
        return _Alone(
            group.single(member),
            None if everywhere else rows.to(self._device),
            None if plain else weights.unsqueeze(1).to(self._device),
        )

    def _together(self, group: Group, weights: Tensor, per_slot: Sequence[Tensor], counts: list[int]) -> _Together:
        longest = max(counts)
        spare = next(rows[0] for rows, n in zip(per_slot, counts, strict=True) if n)
        index = spare.repeat(len(counts), longest)  # padding stands at a row that is written anyway
        used = torch.zeros(len(counts), longest)
        for member, (rows, n) in enumerate(zip(per_slot, counts, strict=True)):
            if n:
                index[member, :n] = rows
                used[member, :n] = weights[rows, member]
        used = used.unsqueeze(2).to(self._device)
        padded = sum(counts) < index.numel()
        return _Together(group, index.flatten().to(self._device), used, used == 0 if padded else None)


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
