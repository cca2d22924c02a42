"""The adapters that are active together, stacked so that one product serves many of them.

Adapters with the same targets and ranks form a group. For layers that read the same input a group keeps one site: the A
of all its adapters as (S, R, in), R the sum of the targets' ranks, and their B as (S, R, Σout) with zeros where a
target's columns of R meet another target's outputs. No rank is padded. What is stacked for parameters in training lets
gradients through.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from loraserve.kernels import cpu
from loraserve.kernels.decoder import AdapterSites
from loraserve.kernels.dispatch import Deltas, Kernels
from loraserve.lora.adapter import LoraWeight

Weights = Mapping[str, LoraWeight]
Sites = tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
"""Targets that read one input and their out_features, for each packed weight of a model in turn."""


@dataclass(frozen=True)
class Site:
    """What the adapters of a group do to layers of one input."""

    A: Tensor
    """(S, R, in)"""
    B: Tensor
    """(S, R, Σout)"""
    scaling: Tensor
    """(S, R) float32"""


class Group:
    """Adapters with the same targets and ranks. `members` are their slots."""

    def __init__(self, members: list[int], adapters: list[Weights]) -> None:
        self.members = members
        self._adapters = adapters
        self._sites: dict[tuple[str, ...], Site | None] = {}
        self._single: dict[int, Group] = {}

    @property
    def in_training(self) -> bool:
        """Whether they are parameters; adapters train as a whole and not beside others that serve."""
        weight = next(iter(self._adapters[0].values()), None)
        return weight is not None and weight.A.requires_grad

    def single(self, member: int) -> "Group":
        """One of them alone, so that whoever needs no other does not wait until all are stacked."""
        if len(self.members) == 1:
            return self
        if member not in self._single:
            self._single[member] = Group([self.members[member]], [self._adapters[member]])
        return self._single[member]

    def site(self, targets: tuple[str, ...], widths: Sequence[int]) -> Site | None:
        """What they do to `targets`, layers of `widths` out_features over one input; None if nothing.

        Stacked on first use and kept, unless it is in training and changes with each step.
        """
        if targets in self._sites:
            return self._sites[targets]
        weights = [adapter[target] for adapter in self._adapters for target in targets if target in adapter]
        site = self._stack(targets, widths) if weights else None
        if not any(w.A.requires_grad for w in weights):
            self._sites[targets] = site
        return site

    def _stack(self, targets: tuple[str, ...], widths: Sequence[int]) -> Site:
        rows = [self._side_by_side(weights, targets, widths) for weights in self._adapters]
        A, B, scaling = (parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
                         for parts in zip(*rows, strict=True))  # fmt: skip
        return Site(A, B, scaling)

    @staticmethod
    def _side_by_side(
        weights: Weights, targets: tuple[str, ...], widths: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A (R, in), B (R, Σout) and scaling (R,) of one adapter."""
        present = [weights[target] for target in targets if target in weights]
        A = present[0].A if len(present) == 1 else torch.cat([w.A for w in present])
        scaling = torch.tensor([w.scaling for w in present for _ in range(w.r)], device=A.device)
        if len(targets) == 1:
            return A, present[0].B.T if A.requires_grad else present[0].B.T.contiguous(), scaling
        blocks = [weights[t].B.T if t in weights else A.new_zeros(0, width)
                  for t, width in zip(targets, widths, strict=True)]  # fmt: skip
        return A, torch.block_diag(*blocks), scaling


class AdapterStack:
    """Adapters by slot, in groups."""

    def __init__(self, adapters: Sequence[Weights]) -> None:
        self.adapters = list(adapters)
        layouts: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for slot, weights in enumerate(self.adapters):
            layouts.setdefault(tuple(sorted((target, w.r) for target, w in weights.items())), []).append(slot)
        self.groups = [Group(slots, [self.adapters[slot] for slot in slots]) for slots in layouts.values()]
        self.dora_slots = [i for i, a in enumerate(self.adapters) if any(w.gain is not None for w in a.values())]
        assert not any(w.magnitude is not None for a in self.adapters for w in a.values()), "not prepared for a base"
        self._gains: dict[tuple[str, ...], list[tuple[int, Tensor]]] = {}
        self._deltas: dict[tuple[tuple[str, ...], torch.dtype], Deltas | None] = {}
        self._sites: dict[tuple[Sites, torch.dtype], AdapterSites] = {}

    def deltas(
        self, kernels: Kernels, targets: tuple[str, ...], widths: Sequence[int], dtype: torch.dtype
    ) -> Deltas | None:
        """The adapters at layers of one input for a kernel; None if none of them touches these."""
        if (targets, dtype) not in self._deltas:
            cells = [[(weights[t].A, weights[t].B, weights[t].scaling) if t in weights else None for t in targets]
                     for weights in self.adapters]  # fmt: skip
            deltas = kernels.deltas(cells, widths, dtype) if any(any(row) for row in cells) else None
            if any(cell[0].requires_grad for row in cells for cell in row if cell):
                return deltas  # in training it changes with each step
            self._deltas[targets, dtype] = deltas
        return self._deltas[targets, dtype]

    def gains(self, targets: tuple[str, ...], widths: Sequence[int]) -> list[tuple[int, Tensor]]:
        """(slot, g - 1 (Σout,) float32 at layers of one input) of every DoRA adapter that touches them."""
        if targets not in self._gains:
            found: list[tuple[int, Tensor]] = []
            for slot in self.dora_slots:
                here = [w.gain if (w := self.adapters[slot].get(t)) is not None else None for t in targets]
                if any(gain is not None for gain in here):
                    device = next(gain.device for gain in here if gain is not None)
                    parts = [torch.zeros(width, device=device) if gain is None else gain.float()
                             for gain, width in zip(here, widths, strict=True)]  # fmt: skip
                    found.append((slot, torch.cat(parts)))
            if any(gain.requires_grad for _, gain in found):
                return found
            self._gains[targets] = found
        return self._gains[targets]

    def sites(self, sites: Sites, dtype: torch.dtype) -> AdapterSites:
        """The adapters at all of a decoder's packed weights, for its kernel on a CPU."""
        if (sites, dtype) not in self._sites:
            deltas = [self.deltas(cpu, targets, widths, dtype) for targets, widths in sites]
            found = AdapterSites(cast(list[cpu.Deltas | None], deltas))
            if any(w.A.requires_grad for weights in self.adapters for w in weights.values()):
                return found
            self._sites[sites, dtype] = found
        return self._sites[sites, dtype]
