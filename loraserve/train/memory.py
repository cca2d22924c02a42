"""How much memory a training step needs, and how to split a batch so that it fits.

    peak = resident + adapter + max(at the head, in a block)(rows)
    resident     what is there before the first step: torch and the adapter, as measured; the base, and of a quantised
                 one the largest layer's weight as it is made anew for a product
    adapter      gradients and AdamW's two moments: 12 bytes a parameter
    at the head  what the blocks keep for the backward pass, the hidden states with their gradient, a chunk of logits
    in a block   what the blocks keep, and what the last one needs while its gradients are computed

With s bytes a number, H, I, Q and K the widths of the residual stream, of the gate, of all queries and of all keys, a
dense block keeps of each row

    s (4H + 2Q + 2K + 3I), with norms of queries and keys s (Q + K) more, and the adapters' 4r of each layer

and with checkpointing only s·H, while one block at a time is there in full. Its gradients need s (3I + 3H) for a while,
those by the gate, by what it is multiplied with and by their product, and by what goes in and out; and 8I where
bfloat16 must be widened for the adapter's products. DoRA keeps a layer's outputs as they are before its gain, s·out,
and for the adapter g ⊙ B and five numbers an output.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import psutil
import torch

from loraserve.base import quantize
from loraserve.base.checkpoint import expected_tensors
from loraserve.base.config import ModelConfig
from loraserve.base.load import Base
from loraserve.errors import InvalidRequest
from loraserve.lora.adapter import LoraWeight
from loraserve.lora.trained import multiplies
from loraserve.train.loss import CHUNK_ROWS

MOMENTS_AND_GRADIENT = 12
"""Bytes of each of the adapter's parameters beside the parameter itself."""
ENOUGH_ROWS = 768
"""Of a pass on a CPU: more take more memory and are no faster. A router's balance is that of a whole batch."""
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

    def _moments(self, checkpointing: bool) -> tuple[tuple[float, int], tuple[float, int]]:
        """Bytes a row, and whatever the rows, at the head and in a block's backward pass."""
        kept = self.num_blocks * (self.kept_input if checkpointing else self.block)
        again = self.block if checkpointing else 0
        return (kept + self.head, self.logits), (kept + again + self.working, 0)

    def row(self, checkpointing: bool) -> float:
        """Bytes of each row of a pass, once there are many."""
        return max(row for row, _ in self._moments(checkpointing))

    def peak(self, rows: int, checkpointing: bool) -> int:
        """Bytes at the highest moment of a step over `rows` rows."""
        return self.adapter + max(int(rows * row) + fixed for row, fixed in self._moments(checkpointing))

    def rows_within(self, room: int, checkpointing: bool) -> int:
        """The most rows of a pass that `room` bytes are enough for; 0 or less if there are none."""
        return min(int((room - self.adapter - fixed) / row) for row, fixed in self._moments(checkpointing))


@dataclass(frozen=True)
class Keeping:
    """A way to keep the base."""

    resident: int
    """Bytes that it takes, with all else that is there before the first step."""
    quantize: str | None = None
    """One of `quantize.QUANTIZATIONS`."""
    packed: bool = False
    """With the layers' weights laid out for the C kernels, in two more copies."""


@dataclass(frozen=True)
class Plan:
    """How the steps of a run are taken."""

    peak: int
    """Bytes of the whole process, or of a GPU's tensors, at its highest moment."""
    checkpointing: bool = False
    max_rows: int | None = None
    """Rows of one pass; longer batches are split. None: never."""
    quantize: str | None = None
    packed: bool = False
    """See `Keeping`."""
    reason: str = ""
    """Why the base is quantised, if nobody asked for it."""

    def __str__(self) -> str:
        split = f"passes of up to {self.max_rows:,} tokens" if self.max_rows else "whole batches"
        chosen = [split, "checkpointing" * self.checkpointing]
        if self.quantize:
            chosen.append(f"the base's layers in {self.quantize}{self.reason and f' ({self.reason})'}")
        return f"memory: about {size(self.peak)} at the peak; {', '.join(filter(None, chosen))}"


def footprint(
    config: ModelConfig, weights: Mapping[str, LoraWeight], dtype: torch.dtype, device: torch.device
) -> Footprint:
    """What a step over an adapter's `weights` needs on a base in `dtype` on `device`."""
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
    widened = 8 if s < 4 and not multiplies(dtype, device) else 0
    parameters = sum(w.num_parameters for w in weights.values())
    return Footprint(
        adapter=MOMENTS_AND_GRADIENT * parameters + 4 * sum(B.numel() + 5 * len(B) for B in dora.values()),
        block=block,
        kept_input=s * hidden,
        num_blocks=config.num_hidden_layers,
        working=s * (3 * inter * experts + 3 * hidden) + widened * inter * experts,
        head=3 * s * hidden,
        logits=CHUNK_ROWS * config.vocab_size * (8 + s) * (2 if "lm_head" in dora else 1),
    )


def _in_block(target: str) -> bool:
    return target.startswith("model.layers.")


def plan_for(
    base: Base,
    adapters: Sequence[Mapping[str, LoraWeight]],
    batch: Sequence[int],
    budget: int | None,
    how: str = "auto",
    packing: bool = True,
) -> Plan:
    """The plan of a run that is about to start, or of several that share passes; see `plan`.

    Args:
        base: with its weights, which then stay as they are kept, or still without.
        adapters: the weights of each.
        batch: rows of each dialogue that a pass of all may hold.
        how: the base's layers are kept, `none` or one of `quantize.QUANTIZATIONS`; `auto` quantises them if the budget
            needs it.
        packing: whether the layers' weights may be laid out for the C kernels, see `Keeping`.

    Raises:
        InvalidRequest: no plan fits, or the base cannot be kept as `how` has it; the message has what would do.
    """
    if how in quantize.QUANTIZATIONS:
        quantize.check_quantization(how, base.config)
    needs = [footprint(base.config, weights, base.dtype, base.device) for weights in adapters]
    widest = max(needs, key=lambda each: each.row(False))
    together = replace(widest, adapter=sum(each.adapter for each in needs), logits=max(each.logits for each in needs))
    allowed: list[str | None] = [None if how == "none" else how]
    if how == "auto":
        allowed = [base.model.quantized]
        if not base.has_weights and budget is not None:
            able = [q for q in quantize.QUANTIZATIONS if quantize.fits(q, base.config)]
            allowed += [q for q in able if q != quantize.NF4 or quantize.installed()]
    others = [q for q in quantize.QUANTIZATIONS if q not in allowed and quantize.fits(q, base.config)]
    ways = ([way for way in same if packing or not way.packed] for same in keepings(base, allowed))
    enough = ENOUGH_ROWS if base.device.type == "cpu" and not base.config.num_experts else None
    return plan(together, ways, batch, budget, others=keepings(base, others), enough=enough)


def plan(
    needs: Footprint,
    keepings: Iterable[Sequence[Keeping]],
    batch: Sequence[int],
    budget: int | None,
    *,
    others: Iterable[Sequence[Keeping]] = (),
    enough: int | None = None,
) -> Plan:
    """Choose how to take steps over batches of up to `batch`, the longest dialogues that one may hold, within `budget`.

    What costs no time comes first: whole batches, then split ones, then no copies of the weights, then checkpointing,
    which runs each block twice; and then the same with weights in fewer bits.

    Args:
        keepings: ways to keep the base, the best first, in groups of the same bits.
        batch: rows of each dialogue.
        budget: bytes; None plans what is fastest, whatever it needs.
        others: ways that are not to be chosen, and named if they would fit where none of `keepings` does.
        enough: rows beyond which a pass is no faster, so that longer batches are split without need, too.

    Raises:
        InvalidRequest: no plan fits; the message has what would.
    """
    rows, longest = sum(batch), max(batch)
    few = max(enough, longest) if enough is not None and enough < rows else None
    tried: list[Keeping] = []
    for same in keepings:
        how = same[0].quantize
        if budget is None:
            peak = same[0].resident + needs.peak(few or rows, False)
            return Plan(peak, max_rows=few, quantize=how, packed=same[0].packed)
        reason = f"otherwise the least is {size(_least(needs, tried, longest))}" if tried else ""
        tried += same
        for checkpointing in (False, True):
            for keeping in same:
                room = budget - keeping.resident
                split = None if needs.peak(rows, checkpointing) <= room else needs.rows_within(room, checkpointing)
                if split is None or split >= longest:
                    split = min(filter(None, (split, few)), default=None)
                    peak = keeping.resident + needs.peak(split or rows, checkpointing)
                    return Plan(peak, checkpointing, split, how, keeping.packed, reason)
    assert budget is not None
    raise _refusal(needs, tried, longest, budget, others)


def _least(needs: Footprint, keepings: Iterable[Keeping], rows: int) -> int:
    """Bytes without which a pass of `rows` rows cannot be, however the base is kept."""
    return min(keeping.resident for keeping in keepings) + needs.peak(rows, True)


def _refusal(
    needs: Footprint,
    tried: Sequence[Keeping],
    least: int,
    budget: int,
    others: Iterable[Sequence[Keeping]],
) -> InvalidRequest:
    smallest = min(tried, key=lambda keeping: keeping.resident)
    needed = _least(needs, tried, least)
    bits = f" with the base's layers in {smallest.quantize}" if smallest.quantize else ""
    fitting = [
        f"--quantize {other.quantize}"
        + " (pip install 'loraserve[bitsandbytes]')" * (other.quantize == quantize.NF4 and not quantize.installed())
        for other, *_ in others
        if _least(needs, [other], least) <= budget
    ]
    options = [f"--memory-budget {needed // 2**20 + 1}MB", *fitting, "--max-seq-len below that", "a lower --rank"]
    return InvalidRequest(
        f"a memory budget of {size(budget)} is too small: the least is {size(needed)}{bits}, of which "
        f"{size(smallest.resident)} are there before the first step, {size(needs.adapter)} belong to the adapter's "
        f"gradients and moments, and {size(needs.peak(least, True) - needs.adapter)} to a pass of {least:,} tokens; "
        f"give {', '.join(options)}, or --dtype bfloat16 if this is float32",
        param="memory_budget",
    )


def keepings(base: Base, hows: Sequence[str | None]) -> Iterator[list[Keeping]]:
    """The ways to keep a base whose weights may be still to come, for each of `hows`, measured when it is asked for."""
    for how in hows:
        if how == quantize.NF4 and quantize.installed():
            quantize.bitsandbytes()  # a part of what is in use
        resident = bytes_in_use(base) + (0 if base.has_weights else weight_bytes(base.config, base.dtype, how))
        if how is not None:
            shapes = quantize.quantized_shapes(base.config).values()
            yield [Keeping(resident + base.dtype.itemsize * max(map(math.prod, shapes)), how)]
            continue
        copies = base.model.bytes_to_pack(base.dtype, base.device)
        packed = [Keeping(resident + copies, packed=True)] if copies else []
        yield [*packed, Keeping(resident)]


def weight_bytes(config: ModelConfig, dtype: torch.dtype, how: str | None) -> int:
    """Bytes of a base's weights."""
    quantized = {} if how is None else quantize.quantized_shapes(config)
    total = sum(quantize.num_bytes(shape, how, dtype) for shape in quantized.values()) if how is not None else 0
    plain = (shape for name, shape in expected_tensors(config).items() if name.removesuffix(".weight") not in quantized)
    return total + dtype.itemsize * sum(map(math.prod, plain))


def bytes_in_use(base: Base) -> int:
    """Bytes in use now: of the process on a CPU, of tensors on a GPU."""
    for weight in base.model.parameters():
        weight.sum()  # of a file that is mapped, what nobody has read is not there yet
    on_gpu = base.device.type == "cuda"
    return torch.cuda.memory_allocated(base.device) if on_gpu else psutil.Process().memory_info().rss


def size(count: float) -> str:
    """A number of bytes for people, in binary units as memory is sold."""
    unit = next((unit for unit, step in UNITS.items() if count >= step), "kB")
    return f"{count / UNITS[unit]:.3g} {unit}" if count < 1000 * UNITS[unit] else f"{count / UNITS[unit]:.0f} {unit}"
