"""How much memory a training step needs, and how to split a batch so that it fits.

    peak = resident + adapter + activations(rows)
    resident     what is there before the first step: torch, the base, the adapter; measured, not computed
    adapter      gradients and AdamW's two moments: 12 bytes a parameter
    activations  per row of a pass: what blocks keep for the backward pass, and what one block needs while it runs

With s bytes a number, H, I, Q and K the widths of the residual stream, of the gate, of all queries and of all keys, a
dense block keeps of each row

    s (4H + 2Q + 2K + 3I), with norms of queries and keys s (Q + K) more, and the adapters' 4r of each layer

and with checkpointing only s·H, while one block at a time is there in full. DoRA keeps a layer's outputs as they are
before its gain, s·out, and for the adapter g ⊙ B and five numbers an output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import psutil
import torch

from loraserve.base.config import ModelConfig
from loraserve.base.load import Base
from loraserve.base.model import Model
from loraserve.errors import InvalidRequest
from loraserve.lora.adapter import LoraWeight
from loraserve.train.loss import CHUNK_ROWS

MOMENTS_AND_GRADIENT = 12
"""Bytes of each of the adapter's parameters beside the parameter itself."""
UNITS = {"GB": 2**30, "MB": 2**20, "kB": 2**10}


@dataclass(frozen=True)
class Footprint:
    """Bytes that a step needs on top of what is there before the first one."""

    adapter: int
    """Gradients and moments."""
    block: float
    """Kept by one block, a row."""
    kept_input: float
    """Of it the block's input, all that checkpointing keeps."""
    num_blocks: int
    working: float
    """Needed for a while in one block's backward pass, a row."""
    head: float
    """Hidden states at the head and their gradient, a row."""
    logits: int
    """A chunk's."""

    def row(self, checkpointing: bool) -> float:
        """Bytes of each row of a pass."""
        blocks = self.num_blocks * (self.kept_input if checkpointing else self.block)
        return blocks + (self.block if checkpointing else 0) + self.working + self.head

    def peak(self, rows: int, checkpointing: bool) -> int:
        """Bytes at the highest moment of a step over `rows` rows."""
        return self.adapter + self.logits + int(rows * self.row(checkpointing))

    def rows_within(self, room: int, checkpointing: bool) -> int:
        """The most rows of a pass that `room` bytes are enough for; 0 or less if there are none."""
        return int((room - self.adapter - self.logits) / self.row(checkpointing))


@dataclass(frozen=True)
class Plan:
    """How the steps of a run are taken."""

    peak: int
    """Bytes of the whole process, or of a GPU's tensors, at its highest moment."""
    checkpointing: bool = False
    max_rows: int | None = None
    """Rows of one pass; longer batches are split. None: never."""

    def __str__(self) -> str:
        split = f"passes of up to {self.max_rows:,} tokens" if self.max_rows else "whole batches"
        return f"memory: about {size(self.peak)} at the peak; {split}{', checkpointing' if self.checkpointing else ''}"


def footprint(config: ModelConfig, weights: Mapping[str, LoraWeight], dtype: torch.dtype) -> Footprint:
    """What a step over an adapter's `weights` needs on a base in `dtype`."""
    s = dtype.itemsize
    hidden, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    queries, keys = heads * config.head_dim, kv * config.head_dim
    inter, experts = config.intermediate_size, 1
    if config.num_experts:
        inter, experts = config.moe_intermediate_size, config.num_experts_per_tok + config.num_shared_experts
    ranks: float = sum(w.r for target, w in weights.items() if _in_block(target))
    if config.num_experts:  # a row meets few of them
        ranks *= experts / (config.num_experts + config.num_shared_experts)
    block = s * (4 * hidden + 2 * queries + 2 * keys + 3 * inter * experts) + 4 * ranks / config.num_hidden_layers
    if config.qk_norm:
        block += s * (queries + keys)
    if config.num_experts:
        block += s * 2 * hidden * experts  # each expert's own copy of its rows, and its outputs
    dora = {target: w.B for target, w in weights.items() if w.magnitude is not None}
    met = experts / (config.num_experts + config.num_shared_experts) if config.num_experts else 1.0
    outputs = sum(len(B) * (met if "experts." in target else 1.0) for target, B in dora.items() if _in_block(target))
    block += s * outputs / config.num_hidden_layers
    copies = 8 if s < 4 else 4  # the adapter computes in float32
    parameters = sum(w.num_parameters for w in weights.values())
    return Footprint(
        adapter=MOMENTS_AND_GRADIENT * parameters + 4 * sum(B.numel() + 5 * len(B) for B in dora.values()),
        block=block,
        kept_input=s * hidden,
        num_blocks=config.num_hidden_layers,
        working=inter * (copies + 4 * s),
        head=3 * s * hidden,
        logits=CHUNK_ROWS * config.vocab_size * (8 + s) * (2 if "lm_head" in dora else 1),
    )


def _in_block(target: str) -> bool:
    return target.startswith("model.layers.")


def plan_for(
    base: Base, adapters: Sequence[Mapping[str, LoraWeight]], batch: Sequence[int], budget: int | None
) -> Plan:
    """The plan of a run that is about to start, or of several that share passes; see `plan`.

    Args:
        adapters: the weights of each.
        batch: rows of each dialogue that a pass of all may hold.
    """
    needs = [footprint(base.config, weights, base.dtype) for weights in adapters]
    widest = max(needs, key=lambda each: each.row(False))
    together = replace(widest, adapter=sum(each.adapter for each in needs), logits=max(each.logits for each in needs))
    return plan(together, resident_bytes(base.model), batch, budget)


def plan(needs: Footprint, resident: int, batch: Sequence[int], budget: int | None, *, splitting: bool = True) -> Plan:
    """Choose how to take steps over batches of up to `batch`, the longest dialogues that one may hold, within `budget`.

    What costs no time comes first: whole batches, then split ones, then checkpointing, which runs each block twice.

    Args:
        resident: bytes that are there before the first step.
        batch: rows of each dialogue.
        budget: bytes; None plans whole batches, whatever they need.
        splitting: whether batches may be split.

    Raises:
        InvalidRequest: no plan fits; the message has what would.
    """
    rows, longest = sum(batch), max(batch)
    if budget is None:
        return Plan(resident + needs.peak(rows, False))
    room = budget - resident
    least = longest if splitting else rows
    for checkpointing in (False, True):
        if needs.peak(rows, checkpointing) <= room:
            return Plan(resident + needs.peak(rows, checkpointing), checkpointing)
        max_rows = needs.rows_within(room, checkpointing)
        if max_rows >= least:
            return Plan(resident + needs.peak(max_rows, checkpointing), checkpointing, max_rows)
    needed = resident + needs.peak(least, True)
    activations = int(least * needs.row(True))
    shorter = "--max-seq-len below" if splitting else "a smaller --batch-size than"
    raise InvalidRequest(
        f"a memory budget of {size(budget)} is too small: the least is {size(needed)}, of which {size(resident)} are "
        f"there before the first step, {size(needs.adapter)} belong to the adapter's gradients and moments, and "
        f"{size(activations)} to a pass of {least:,} tokens; give --memory-budget {needed // 2**20 + 1}MB, {shorter} "
        "that, a lower --rank, or --dtype bfloat16 if this is float32",
        param="memory_budget",
    )


def resident_bytes(model: Model) -> int:
    """Bytes in use now: of the process on a CPU, of tensors on a GPU."""
    device = model.lm_head.weight.device
    for weight in model.parameters():
        weight.sum()  # of a file that is mapped, what nobody has read is not there yet
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def size(count: float) -> str:
    """A number of bytes for people, in binary units as memory is sold."""
    unit = next((unit for unit, step in UNITS.items() if count >= step), "kB")
    return f"{count / UNITS[unit]:.3g} {unit}" if count < 1000 * UNITS[unit] else f"{count / UNITS[unit]:.0f} {unit}"
