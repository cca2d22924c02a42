"""Run one step: chunks of sequences through their model, with the adapters each asked for.

The base's model computes all sequences but those of merged adapters, whose models each take a pass of their own; keys
and values lie in one cache.
"""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraserve.base.model import Model
from loraserve.engine.kv_cache import CachedAttention, KVCache
from loraserve.engine.sampler import sample
from loraserve.engine.scheduler import Chunk
from loraserve.engine.sequence import Sequence, Token
from loraserve.errors import InvalidRequest
from loraserve.kernels import dispatch
from loraserve.kernels.threads import apart
from loraserve.lora.adapter import Adapter
from loraserve.lora.batch import LoraBatch
from loraserve.lora.stack import AdapterStack

if TYPE_CHECKING:
    from loraserve.engine.graphs import DecodeGraphs


class Runner:
    """Owns the base's model and the cache; turns chunks into sampled tokens.

    Args:
        int8: round the layers' weights to 8 bits.
        deterministic: a sequence's tokens must not depend on what else is in the batch, bit for bit.

    Raises:
        InvalidRequest: int8 or deterministic cannot be had here, see `Joint.pack`.
    """

    _segments: list[tuple[int, list[tuple[int, float]]]]
    """What the last step asked of the stack, and its batch."""
    _batch: LoraBatch | None

    def __init__(self, model: Model, cache: KVCache, int8: bool = False, deterministic: bool = False) -> None:
        self._model = model
        self._deterministic = deterministic
        weight, head_dim = model.model.embed_tokens.weight, model.config.head_dim
        assert isinstance(weight, torch.Tensor)
        if deterministic and dispatch.of(weight.device, weight.dtype, head_dim) is None:
            raise InvalidRequest(
                f"deterministic needs the kernels, and there are none for {str(weight.dtype).removeprefix('torch.')} "
                f"with heads of {head_dim} on this machine: a CPU needs a C compiler and heads of 16·n up to 256, "
                "a GPU Triton; leave --deterministic out",
                param="deterministic",
            )
        apart(model.pack, int8, deterministic)
        self._cache = cache
        self._device = model.lm_head.weight.device
        self._stack_up([])
        self._graphs: DecodeGraphs | None = None
        if self._device.type == "cuda" and model.model.fused and not model.config.num_experts and not deterministic:
            from loraserve.engine import graphs  # needs Triton

            self._graphs = graphs.DecodeGraphs(model, cache, graphs.cuda_graphs())

    @torch.inference_mode()
    def run(
        self, chunks: list[Chunk], meanwhile: Callable[[], None] = lambda: None
    ) -> list[tuple[Chunk, list[Token | None]]]:
        """Compute the chunks; return for each that samples a new token, and one more after each of its drafts.

        None stands for logits that are not finite.

        Args:
            meanwhile: called, once or more, as late as can be before the model computes.
        """
        by_model: dict[Any, list[Chunk]] = {}
        for chunk in chunks:
            by_model.setdefault(chunk.sequence.merged, []).append(chunk)
        return [result for merged, own in by_model.items() for result in self._forward(merged, own, meanwhile)]

    def _forward(
        self, merged: Any, chunks: list[Chunk], meanwhile: Callable[[], None]
    ) -> list[tuple[Chunk, list[Token | None]]]:
        if merged is None and self._graphs is not None and (replayed := self._graphs.run(chunks)) is not None:
            meanwhile()
            return _sampled(replayed, chunks)
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for chunk in chunks:
            ids += chunk.token_ids
            positions += range(chunk.start, chunk.start + chunk.num_rows)
            if chunk.samples:
                rows += range(len(ids) - len(chunk.drafts) - 1, len(ids))
        input_ids, where = torch.tensor(ids, device=self._device), torch.tensor(positions, device=self._device)
        attention, lora = CachedAttention(self._cache, chunks, where, self._deterministic), self._lora_batch(chunks)
        sampling = torch.tensor(rows, dtype=torch.int64) if len(rows) < len(ids) else None
        meanwhile()
        logits = (self._model if merged is None else merged.model)(input_ids, where, attention, lora, rows=sampling)
        return _sampled(logits, [chunk for chunk in chunks if chunk.samples])

    def clear(self, sequence: Sequence, start: int, count: int) -> None:
        """Zero keys and values of a sequence that may not be sound: NaN would reach its slot's next owner."""
        if sequence.slot >= 0:
            self._cache.clear(sequence.slot, start, count)

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the keys and values of the first `count` positions of a slot to another."""
        self._cache.copy(source, target, count)

    def forget_adapters(self) -> None:
        """Let go of the adapters of past steps."""
        self._stack_up([])
        if self._graphs is not None:
            self._graphs.forget_adapters()

    def forget(self, adapter: Adapter) -> None:
        """Let go of one adapter, which nobody runs on any more."""
        if adapter in self._stacked:
            self._stack_up([])
        if self._graphs is not None:
            self._graphs.forget(adapter)

    def _lora_batch(self, chunks: list[Chunk]) -> LoraBatch | None:
        active = dict.fromkeys(adapter for chunk in chunks for adapter, weight in chunk.sequence.adapters if weight)
        if not active:
            return None
        # A stack still fits after adapters left, but columns nobody uses cost time: rebuild it when half are idle.
        if not active.keys() <= self._stacked.keys() or len(self._stacked) > 2 * len(active):
            # A blend rounds once per adapter, by slot: in one order, whoever else is here.
            ordered = sorted(active, key=lambda adapter: (adapter.digest or "", adapter.name))
            self._stack_up(ordered)
        segments = [
            (
                chunk.num_rows,
                [(self._stacked[adapter], weight) for adapter, weight in chunk.sequence.adapters if weight],
            )
            for chunk in chunks
        ]
        # While the same sequences decode, every step asks for the same.
        if self._segments != segments:
            self._segments = segments
            self._batch = LoraBatch.from_segments(self._stack, segments, self._device, self._deterministic)
        return self._batch

    def _stack_up(self, adapters: list[Adapter]) -> None:
        self._stacked = {adapter: slot for slot, adapter in enumerate(adapters)}
        self._stack = AdapterStack([adapter.weights for adapter in adapters])
        self._segments, self._batch = [], None


def _sampled(logits: Tensor, chunks: list[Chunk]) -> list[tuple[Chunk, list[Token | None]]]:
    """Sample from the logits (R, vocab_size) after the chunks' last tokens and after each of their drafts."""
    if not chunks:
        return []
    sequences = [chunk.sequence for chunk in chunks for _ in range(len(chunk.drafts) + 1)]
    drafts = [chunk.drafts[:i] for chunk in chunks for i in range(len(chunk.drafts) + 1)]
    tokens = iter(sample(logits, sequences, drafts))
    return [(chunk, list(itertools.islice(tokens, len(chunk.drafts) + 1))) for chunk in chunks]
