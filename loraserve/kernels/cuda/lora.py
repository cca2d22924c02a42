"""What adapters add to layers that read the same input, for a few rows of each of many adapters.

    y[n] += Σ_e weight_e · scaling · B (A x[n])      e: the entries (row, slot, weight) of row n, in their order

Adapters differ in rank and in the layers they touch, so a table of cells says where each one's A and B lie. The first
kernel computes weight · scaling · A x of every entry in float32; the second owns a block of a row's outputs and sums
the row's entries in order. Rows without entries, and layers that a row's adapters do not touch, are not written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CELL = 4
"""int64 of a table's cell: pointer to A (r, in), pointer to Bᵀ (r, out), r, and the bits of the float32 scaling."""
BLOCK_R, BLOCK_K, BLOCK_N = 16, 128, 128
ALIGNMENT = 16
"""Bytes. A and B that lie otherwise are copied, so that they can be read in vectors."""

POINTEE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Entries:
    """Entries sorted by row, each row's in the order they are summed in.

    An entry of weight 0 is padding: nothing is read or written for it.
    """

    rows: Tensor
    """(E,) int64"""
    slots: Tensor
    """(E,) int64"""
    runs: Tensor
    """(E,) int64: at a row's first entry their number, 0 at the others and in padding"""
    weights: Tensor
    """(E,) float32"""


def entries(row_weights: Tensor, device: torch.device | str) -> Entries:
    """Return the nonzero entries of W (N, S) float32, which lies on the CPU."""
    rows, slots = row_weights.nonzero(as_tuple=True)  # by row, then by slot
    # One copy, and one that does not wait for the device.
    sent = torch.stack([rows, slots, runs_of(rows)]).to(device, non_blocking=True)
    return Entries(sent[0], sent[1], sent[2], row_weights[rows, slots].to(device, non_blocking=True))


def runs_of(rows: Tensor) -> Tensor:
    """For rows (E,) in order, how often a row occurs, at its first place; 0 elsewhere."""
    _, counts = rows.unique_consecutive(return_counts=True)
    runs = torch.zeros_like(rows)
    runs[counts.cumsum(0) - counts] = counts
    return runs


def serving_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of A and B beside activations of `dtype`: the same, but float32 where float16 would overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def cell(A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype) -> tuple[list[int], tuple[Tensor, Tensor]]:
    """A table's cell for A (r, in) and B (out, r), and the tensors it points to, which must be kept.

    Contiguous A and Bᵀ of `dtype` are not copied.
    """
    kept = _readable(A, dtype), _readable(B.T, dtype)
    bits = torch.tensor(scaling, dtype=torch.float32).view(torch.int32)
    return [kept[0].data_ptr(), kept[1].data_ptr(), A.shape[0], int(bits)], kept


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.detach().to(dtype).contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def deltas(
    weights: Sequence[Sequence[tuple[Tensor, Tensor, float] | None]], widths: Sequence[int], dtype: torch.dtype
) -> "Deltas":
    """Return the deltas of adapters to layers of one input.

    Args:
        weights: per adapter and target A (r, in), B (out, r) and scaling, or None.
        widths: out_features of each target.
        dtype: of the activations.
    """
    stored, kept = serving_dtype(dtype), []
    table = torch.zeros(len(weights), len(widths), CELL, dtype=torch.int64)
    for slot, row in enumerate(weights):
        for target, found in enumerate(row):
            if found is not None:
                values, tensors = cell(*found, stored)
                table[slot, target] = torch.tensor(values)
                kept.append(tensors)
    most = int(table[:, :, 2].max())
    return Deltas(table.to(kept[0][0].device), widths, most, stored, kept)


class Deltas:
    """What the adapters of a table do to layers of one input.

    Args:
        table: (slots, targets, CELL) int64, any stride between slots.
        widths: out_features of each target.
        most: no rank in the table is higher.
        dtype: of A and B.
        kept: what the table points to, if nobody else keeps it.
    """

    def __init__(
        self, table: Tensor, widths: Sequence[int], most: int, dtype: torch.dtype, kept: object = None
    ) -> None:
        assert table.stride()[1:] == (CELL, 1)
        self._table, self._most, self._dtype, self._kept = table, most, dtype, kept
        self._aligned = all(width % 16 == 0 for width in widths)
        # Of each block of outputs: its target, where it begins, the target's width, and the target's first column.
        blocks, left = [], 0
        for target, width in enumerate(widths):
            blocks += [(target, start, width, left) for start in range(0, width, BLOCK_N)]
            left += width
        self._blocks = torch.tensor(blocks, dtype=torch.int32).to(table.device, non_blocking=True)

    def add(self, x: Tensor, y: Tensor, entries: Entries) -> None:
        """Add to y (N, Σout) in place what the entries ask for; x (N, in)."""
        assert x.stride(1) == 1 and y.stride(1) == 1
        count, targets, most = len(entries.rows), self._table.shape[1], self._most
        hidden = torch.empty(count, targets, most, device=x.device)  # weight · scaling · A x
        with torch.cuda.device_of(x):
            _shrink[(count, targets, triton.cdiv(most, BLOCK_R))](
                x, x.stride(0), x.shape[1], self._table, self._table.stride(0), entries.rows, entries.slots,
                entries.weights, hidden, targets, most, DTYPE=POINTEE[self._dtype], CELL=CELL, BLOCK_R=BLOCK_R,
                BLOCK_K=BLOCK_K,
            )  # fmt: skip
            _expand[(count, len(self._blocks))](
                y, y.stride(0), self._table, self._table.stride(0), entries.rows, entries.slots, entries.runs, hidden,
                self._blocks, targets, most, DTYPE=POINTEE[self._dtype], ALIGNED=self._aligned, CELL=CELL,
                BLOCK_R=BLOCK_R, BLOCK_N=BLOCK_N,
            )  # fmt: skip


@triton.jit
def _shrink(
    x, x_stride, width, table, slot_stride, rows, slots, weights, hidden, targets, most,
    DTYPE: tl.constexpr, CELL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    entry, target, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    weight = tl.load(weights + entry)
    at = table + tl.load(slots + entry) * slot_stride + target * CELL
    rank = tl.load(at + 2).to(tl.int32)
    if (weight != 0.0) & (block * BLOCK_R < rank):
        A = tl.multiple_of(tl.load(at).to(tl.pointer_type(DTYPE)), 16)
        scaling = tl.load(at + 3).to(tl.int32).to(tl.float32, bitcast=True)
        source = x + tl.load(rows + entry) * x_stride
        r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        k = tl.arange(0, BLOCK_K)
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for start in range(0, width, BLOCK_K):
            cols = start + k
            values = tl.load(source + cols, mask=cols < width, other=0.0).to(tl.float32)
            mask = (r < rank)[:, None] & (cols < width)[None, :]
            a = tl.load(A + r[:, None] * width + cols[None, :], mask=mask, other=0.0)
            acc += a.to(tl.float32) * values[None, :]
        result = tl.sum(acc, axis=1) * (weight * scaling)
        tl.store(hidden + (entry * targets + target) * most + r, result, mask=r < rank)


@triton.jit
def _expand(
    y, y_stride, table, slot_stride, rows, slots, runs, hidden, blocks, targets, most,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CELL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first, block = tl.program_id(0), tl.program_id(1)
    run = tl.load(runs + first).to(tl.int32)
    if run > 0:
        target = tl.load(blocks + block * 4)
        width = tl.load(blocks + block * 4 + 2)
        left = tl.load(blocks + block * 4 + 3)
        if ALIGNED:
            width, left = tl.multiple_of(width, 16), tl.multiple_of(left, 16)
        cols = tl.multiple_of(tl.load(blocks + block * 4 + 1), BLOCK_N) + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_N,), tl.float32)
        touched = 0
        for entry in range(first, first + run):
            at = table + tl.load(slots + entry) * slot_stride + target * CELL
            rank = tl.load(at + 2).to(tl.int32)
            B = tl.multiple_of(tl.load(at + 1).to(tl.pointer_type(DTYPE)), 16)
            mine = hidden + (entry * targets + target) * most
            for start in range(0, rank, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                h = tl.load(mine + r, mask=r < rank, other=0.0)
                mask = (r < rank)[:, None] & (cols < width)[None, :]
                b = tl.load(B + r[:, None] * width + cols[None, :], mask=mask, other=0.0).to(tl.float32)
                acc += tl.sum(h[:, None] * b, axis=0)
            touched += rank
        if touched > 0:
            to = y + tl.load(rows + first) * y_stride + left + cols
            before = tl.load(to, mask=cols < width, other=0.0).to(tl.float32)
            tl.store(to, (before + acc).to(y.dtype.element_ty), mask=cols < width)
