"""A batch of dialogues laid end to end without padding, and its loss through the serving path.

    loss = Σ over supervised t of -log p(x[t+1] | x[..t])

Rows after a dialogue's last supervised target predict nothing that is asked for and nothing sees them, so they are not
run at all; only the rows that predict a supervised token reach the head, a chunk of them at a time (`loss`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from loraserve.base.attention import PackedAttention
from loraserve.base.model import MixtureOfExperts, Model
from loraserve.lora.batch import LoraBatch
from loraserve.lora.stack import AdapterStack
from loraserve.train.data import Sample
from loraserve.train.loss import token_cross_entropy

ROUTER_LOSS_WEIGHT = 5e-4


@dataclass(frozen=True)
class PackedBatch:
    """Several dialogues as one flat sequence of rows."""

    input_ids: Tensor
    """(N,) int64."""
    lengths: list[int]
    """Rows of each dialogue; their sum is N."""
    rows: Tensor
    """(M,) int64: the rows whose next token is supervised."""
    targets: Tensor
    """(M,) int64: those next tokens."""
    group: int = 1
    """Dialogues that stay together: 2 of preference pairs, the chosen and the rejected one."""

    @property
    def num_rows(self) -> int:
        return self.input_ids.numel()

    @property
    def num_supervised(self) -> int:
        return self.targets.numel()

    @property
    def num_pairs(self) -> int:
        return len(self.lengths) // 2

    def split(self, max_rows: int | None) -> list["PackedBatch"]:
        """The same dialogues in batches of up to `max_rows` rows; a longer dialogue or pair is a batch of its own."""
        groups: list[list[int]] = []
        for i in range(0, len(self.lengths), self.group):
            together = self.lengths[i : i + self.group]
            if not groups or (max_rows is not None and sum(groups[-1]) + sum(together) > max_rows):
                groups.append([])
            groups[-1] += together
        parts, start = [], 0
        for lengths in groups:
            end = start + sum(lengths)
            mine = (self.rows >= start) & (self.rows < end)
            rows, targets = self.rows[mine] - start, self.targets[mine]
            parts.append(PackedBatch(self.input_ids[start:end], lengths, rows, targets, self.group))
            start = end
        return parts


def pack(samples: Sequence[Sample], group: int = 1) -> PackedBatch:
    """Lay `samples` end to end, `group` of which belong together. Each must have a supervised token after its first."""
    ids, lengths, rows, targets, start = [], [], [], [], 0
    for sample in samples:
        at = sample.supervised[1:].nonzero().squeeze(1)  # (m,) rows that predict a supervised token
        length = int(at[-1]) + 1
        ids.append(sample.input_ids[:length])
        targets.append(sample.input_ids[at + 1])
        rows.append(at + start)
        lengths.append(length)
        start += length
    return PackedBatch(torch.cat(ids).long(), lengths, torch.cat(rows), torch.cat(targets).long(), group)


def joined(batches: Sequence[PackedBatch]) -> PackedBatch | None:
    """Lay batches end to end as one; None of none."""
    if not batches:
        return None
    starts = [sum(before.num_rows for before in batches[:i]) for i in range(len(batches))]
    return PackedBatch(
        torch.cat([batch.input_ids for batch in batches]),
        [length for batch in batches for length in batch.lengths],
        torch.cat([batch.rows + start for batch, start in zip(batches, starts, strict=True)]),
        torch.cat([batch.targets for batch in batches]),
        batches[0].group,
    )


def passes(batches: Sequence[tuple[int, PackedBatch]], max_rows: int | None) -> list[list[tuple[int, PackedBatch]]]:
    """Put batches of several adapters into as few passes of up to `max_rows` rows as come one after the other.

    Args:
        batches: (slot, batch); a batch that is too long is split.
    """
    found: list[list[tuple[int, PackedBatch]]] = []
    for slot, batch in batches:
        for part in batch.split(max_rows):
            rows = part.num_rows + sum(other.num_rows for _, other in found[-1]) if found else None
            if rows is None or (max_rows is not None and rows > max_rows):
                found.append([])
            found[-1].append((slot, part))
    return found


def summed_loss(model: Model, batch: PackedBatch, stack: AdapterStack | None, *, checkpointing: bool = False) -> Tensor:
    """Cross-entropy summed over the batch's supervised tokens, a float32 scalar.

    Args:
        stack: the one adapter applied to every row, or None for the base alone.
        checkpointing: keep only the blocks' inputs for the backward pass; the same loss in less memory.
    """
    return token_losses(model, [(0, batch)], stack, checkpointing=checkpointing)[0].sum()


def dialogue_losses(batch: PackedBatch, losses: Tensor) -> Tensor:
    """The losses of a batch's supervised tokens summed over each dialogue: (M,) → (D,) float32."""
    dialogues = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))[batch.rows]  # (M,)
    return losses.new_zeros(len(batch.lengths)).index_add(0, dialogues.to(losses.device), losses)


def token_losses(
    model: Model,
    parts: Sequence[tuple[int, PackedBatch]],
    stack: AdapterStack | None,
    *,
    checkpointing: bool = False,
) -> list[Tensor]:
    """Cross-entropy of each supervised token of several batches in one pass; of each batch (M,) float32.

    Args:
        parts: (slot, batch): the rows of the batch meet the adapter of that slot and no other.
        stack: the adapters, or None for the base alone.
        checkpointing: as of `summed_loss`.
    """
    device = model.lm_head.weight.device
    sizes = [batch.num_rows for _, batch in parts]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    attention = PackedAttention([length for _, batch in parts for length in batch.lengths], device)
    lora = None
    if stack is not None:
        lora = LoraBatch.from_segments(stack, [(batch.num_rows, [(slot, 1.0)]) for slot, batch in parts], device)
    input_ids = torch.cat([batch.input_ids for _, batch in parts]).to(device)
    hidden_states = model.model(input_ids, attention.positions, attention, lora, checkpointing=checkpointing)
    rows = [batch.rows + start for start, (_, batch) in zip(starts, parts, strict=True)]  # each (M,)
    predicting = hidden_states[torch.cat(rows).to(device)].split([len(own) for own in rows])  # each (M, hidden)
    losses = []
    for own, hidden, (slot, batch) in zip(rows, predicting, parts, strict=True):
        at_head = lora if stack is not None and model.lm_head.target in stack.adapters[slot] else None
        losses.append(token_cross_entropy(model, hidden, batch.targets.to(device), at_head, own))
    return losses


class RouterLoss:
    """MiniMind-3's auxiliary loss of a mixture of experts, gathered from one forward pass inside a `with`.

        5e-4 · Σ over layers of E · Σ over experts e of load_e · mean score_e

    load_e is the share of the batch's tokens that go to expert e. MiniMind also counts its padding rows; there are none
    here.
    """

    def __init__(self, model: Model) -> None:
        self._layers = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MixtureOfExperts)]
        self._logits: list[Tensor] = []

    def __enter__(self) -> "RouterLoss":
        self._hooks = [
            layer.gate.register_forward_hook(lambda _module, _inputs, logits: self._logits.append(logits))
            for layer in self._layers
        ]
        return self

    def __exit__(self, *_error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self, lengths: Sequence[int]) -> list[Tensor | float]:
        """The loss over each stretch of rows of the forward pass since the last call; 0.0 for a dense model."""
        totals: list[Tensor | float] = [0.0] * len(lengths)
        for layer, logits in zip(self._layers, self._logits, strict=True):
            for i, own in enumerate(logits.split(list(lengths))):
                scores = own.float().softmax(dim=-1)  # (n, E)
                experts = scores.shape[1]
                load = F.one_hot(scores.topk(layer.top_k, dim=-1).indices, experts).float().mean(0)  # (top_k, E)
                totals[i] = totals[i] + ROUTER_LOSS_WEIGHT * experts * (load * scores.mean(0)).sum()
        self._logits.clear()
        return totals
