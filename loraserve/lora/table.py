"""The active adapters and a step's entries at addresses that never change, as recorded steps need them.

A table says for every slot and layer where A and B lie (`kernels/cuda/lora.py`); it and the entries are buffers that
are written before a step. So one recording serves whichever adapters are active, however they came and went.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from loraserve.kernels.cuda.lora import CELL, Deltas, Entries, cell, runs_of, serving_dtype
from loraserve.lora.adapter import Adapter, Shapes
from loraserve.lora.batch import LoraBatch

LEAST_MOST = 64
"""Recordings have room for ranks up to it from the start."""


class AdapterTable:
    """Holds up to `capacity` adapters and `max_entries` entries (row, adapter, weight).

    Args:
        shapes: every layer that adapters may touch, those of one input side by side.
        dtype: of the activations.
    """

    def __init__(
        self, shapes: Shapes, capacity: int, max_entries: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.max_entries = max_entries
        self._columns = {target: column for column, target in enumerate(shapes)}
        self._cells = torch.zeros(capacity, len(shapes), CELL, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(3 * max_entries, dtype=torch.int64, device=device)  # rows, slots, runs
        self._weights = torch.zeros(max_entries, device=device)
        self._dtype = serving_dtype(dtype)
        self._slots: dict[Adapter, int] = {}
        self._kept: dict[Adapter, list[tuple[Tensor, Tensor]]] = {}
        self._free = list(range(capacity))
        self._most = LEAST_MOST
        self._sites: dict[tuple[str, ...], Deltas] = {}

    def fits(self, adapters: Collection[Adapter]) -> bool:
        """Whether it can hold these together; those of DoRA have gains, which recorded steps do not compute."""
        return len(adapters) <= len(self._cells) and not any(adapter.is_dora for adapter in adapters)

    def hold(self, active: Collection[Adapter]) -> bool:
        """Write the active adapters into the table.

        Returns:
            Whether recordings made before are of no use any more, for a rank is higher than they have room for.
        """
        missing = [adapter for adapter in active if adapter not in self._slots]
        # Adapters that left may come back; but nobody's memory is held for long, or when a slot is wanted.
        if len(missing) > len(self._free) or len(self._slots) + len(missing) > 2 * len(active):
            for adapter in self._slots.keys() - set(active):
                self.drop(adapter)
        for adapter in missing:
            self._write(adapter)
        highest = max((weight.r for adapter in missing for weight in adapter.weights.values()), default=0)
        if highest <= self._most:
            return False
        self._most = 1 << (highest - 1).bit_length()
        self._sites.clear()
        return True

    def fill(self, entries: Sequence[tuple[int, Adapter, float]], padded: int) -> None:
        """Write a step's entries, sorted by row, padded to `padded` with some of weight 0."""
        numbers = torch.zeros(3, padded, dtype=torch.int64)
        weights = torch.zeros(padded)
        if count := len(entries):
            numbers[0, :count] = torch.tensor([row for row, _, _ in entries])
            numbers[1, :count] = torch.tensor([self._slots[adapter] for _, adapter, _ in entries])
            numbers[2, :count] = runs_of(numbers[0, :count])
            weights[:count] = torch.tensor([weight for _, _, weight in entries])
        self._numbers[: 3 * padded].copy_(numbers.flatten(), non_blocking=True)
        self._weights[:padded].copy_(weights, non_blocking=True)

    def batch(self, padded: int) -> LoraBatch:
        """The LoraBatch of the `padded` entries that lie in the buffers whenever it runs."""
        rows, slots, runs = self._numbers[: 3 * padded].view(3, padded)
        return LoraBatch.fixed(_Fixed(self, Entries(rows, slots, runs, self._weights[:padded])))

    def forget(self) -> None:
        """Let go of all adapters."""
        for adapter in list(self._slots):
            self.drop(adapter)

    def drop(self, adapter: Adapter) -> None:
        """Let go of one adapter, if it is here; no step may name it."""
        if adapter in self._slots:
            self._free.append(self._slots.pop(adapter))  # its cells are not read: no entry names the slot
            del self._kept[adapter]

    def deltas(self, targets: tuple[str, ...], widths: Sequence[int]) -> Deltas:
        """What the table's adapters do to layers of one input."""
        if targets not in self._sites:
            first, last = self._columns[targets[0]], self._columns[targets[-1]] + 1
            assert last - first == len(targets)
            self._sites[targets] = Deltas(self._cells[:, first:last], widths, self._most, self._dtype)
        return self._sites[targets]

    def _write(self, adapter: Adapter) -> None:
        row = torch.zeros(self._cells.shape[1:], dtype=torch.int64)
        kept = self._kept[adapter] = []
        for target, weight in adapter.weights.items():
            values, tensors = cell(weight.A, weight.B, weight.scaling, self._dtype)
            row[self._columns[target]] = torch.tensor(values)
            kept.append(tensors)
        slot = self._slots[adapter] = self._free.pop()
        self._cells[slot].copy_(row, non_blocking=True)


class _Fixed:
    """The deltas of a table for entries in its buffers."""

    def __init__(self, table: AdapterTable, entries: Entries) -> None:
        self._table, self._entries = table, entries

    def add(self, targets: tuple[str, ...], widths: Sequence[int], x: Tensor, y: Tensor) -> None:
        self._table.deltas(targets, widths).add(x, y, self._entries)
