"""How the ranks of a run plan and divide an optimizer step, and put together what comes of it.

    gradient = Σ over ranks of the gradient of the rank's dialogues' summed losses / count of the whole window

Every rank knows the whole window, and takes of it the dialogues, or pairs, that are its own: the longest one left goes
to the rank with the fewest rows so far, over all micro-batches of the step and all adapters. A rank may get none. Each
plans for its own memory; all keep the base in the same bits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor

from loraserve.base.load import Base
from loraserve.base.quantize import QUANTIZATIONS
from loraserve.lora.adapter import LoraWeight
from loraserve.train.batch import PackedBatch, joined, passes
from loraserve.train.memory import Plan, plan_for
from loraserve.train.ranks import Ranks


def divide(sizes: Sequence[int], parts: int) -> list[int]:
    """Which of `parts` takes each of `sizes`, so that their sums are about the same."""
    sums, owners = [0] * parts, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = sums.index(min(sums))
        sums[owners[i]] += sizes[i]
    return owners


def largest_share(batch: Sequence[int], micro_batches: int, parts: int) -> list[int]:
    """What one of `parts` may have to run of a micro-batch, of its dialogues' sizes `batch`.

    Args:
        micro_batches: of a step, which is divided as a whole: of several, one of the parts may get one almost alone.
    """
    owners = divide(batch, max(1, parts // micro_batches))
    shares = [[size for size, owner in zip(batch, owners, strict=True) if owner == part] for part in set(owners)]
    return max(shares, key=sum)


def plan_together(
    base: Base,
    adapters: Sequence[Mapping[str, LoraWeight]],
    batch: Sequence[int],
    budget: int | None,
    how: str,
    ranks: Ranks,
) -> Plan:
    """This rank's plan, see `plan_for`; the base is kept alike on all, as the rank with the least room for it must.

    Args:
        batch: rows of each dialogue of this rank's largest share.
    """
    own = plan_for(base, adapters, batch, budget, how)
    plans = ranks.gather(own)
    bits = max((each.quantize for each in plans), key=lambda each: QUANTIZATIONS.index(each) + 1 if each else 0)
    packing = all(each.packed for each in plans)
    if (own.quantize, own.packed) == (bits, packing):
        return own
    plan = plan_for(base, adapters, batch, budget, bits or "none", packing)
    return plan if bits == own.quantize else replace(plan, reason="for want of memory in another process")


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
