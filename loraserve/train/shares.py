"""How the ranks of a run divide an optimizer step, and put together what comes of it.

    gradient = Σ over ranks of the gradient of the rank's dialogues' summed losses / count of the whole window

Every rank knows the whole window, and takes of it the dialogues, or pairs, that are its own: the longest one left goes
to the rank with the fewest rows so far, over all micro-batches of the step and all adapters. A rank may get none.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from loraserve.train.batch import PackedBatch, joined, passes
from loraserve.train.ranks import Ranks


def divide(sizes: Sequence[int], parts: int) -> list[int]:
    """Which of `parts` takes each of `sizes`, so that their sums are about the same."""
    sums, owners = [0] * parts, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = sums.index(min(sums))
        sums[owners[i]] += sizes[i]
    return owners


def own_share(windows: Sequence[Sequence[PackedBatch]], ranks: Ranks) -> list[list[PackedBatch | None]]:
    """What this rank runs of each micro-batch of each window; None where that is nothing."""
    if ranks.size == 1:
        return [list(window) for window in windows]
    groups = [[batch.split(0) for batch in window] for window in windows]
    sizes = [group.num_rows for window in groups for batch in window for group in batch]
    owners = iter(divide(sizes, ranks.size))
    return [[joined([g for g in batch if next(owners) == ranks.rank]) for batch in window] for window in groups]


def own_passes(
    windows: Sequence[Sequence[PackedBatch]], max_rows: int | None, ranks: Ranks
) -> Iterator[tuple[int, list[tuple[int, PackedBatch]]]]:
    """(place in the windows, parts of what is this rank's) of each pass, see `passes`."""
    for i, batches in enumerate(zip_longest(*own_share(windows, ranks))):
        present = [(slot, batch) for slot, batch in enumerate(batches) if batch is not None]
        for parts in passes(present, max_rows):
            yield i, parts


def sum_gradients(parameters: Sequence[Tensor], figures: Sequence[Tensor], ranks: Ranks) -> None:
    """Give every rank the sums over all of gradients and figures; what no rank has a gradient of keeps none."""
    if ranks.size == 1:
        return
    present = torch.tensor([parameter.grad is not None for parameter in parameters], device=figures[0].device).float()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    ranks.sum_tensors([present, *figures, *(parameter.grad for parameter in parameters if parameter.grad is not None)])
    for parameter, found in zip(parameters, present.tolist(), strict=True):
        if not found:
            parameter.grad = None
