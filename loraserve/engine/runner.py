"""Run one step: chunks of sequences through the model, with the adapters each asked for."""

import torch

from loraserve.base.model import Model
from loraserve.engine.kv_cache import CachedAttention, KVCache
from loraserve.engine.sampler import sample
from loraserve.engine.scheduler import Chunk
from loraserve.engine.sequence import Sequence, Token
from loraserve.kernels.threads import apart
from loraserve.lora.adapter import Adapter
from loraserve.lora.batch import LoraBatch
from loraserve.lora.stack import AdapterStack


class Runner:
    """Owns the model and the cache; turns chunks into sampled tokens."""

    def __init__(self, model: Model, cache: KVCache) -> None:
        self._model = model
        apart(model.pack)
        self._cache = cache
        self._device = model.lm_head.weight.device
        self._stacked: dict[Adapter, int] = {}
        self._stack = AdapterStack([])

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[tuple[Sequence, Token | None]]:
        """Compute the chunks; return a new token for each sequence whose prompt is complete.

        None stands for logits that are not finite: the sequence cannot go on.
        """
        ids: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        for chunk in chunks:
            ids += chunk.sequence.tokens(chunk.start, chunk.count)
            positions += range(chunk.start, chunk.start + chunk.count)
            if chunk.samples:
                last_rows.append(len(ids) - 1)
        where = torch.tensor(positions, device=self._device)
        logits = self._model(
            torch.tensor(ids, device=self._device),
            where,
            CachedAttention(self._cache, chunks, where),
            self._lora_batch(chunks),
            rows=torch.tensor(last_rows, device=self._device, dtype=torch.int64),
        )
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        if not sampling:
            return []
        finite = logits.sum(dim=-1, dtype=torch.float32).isfinite().tolist()  # one pass: NaN and Inf survive a sum
        if all(finite):
            return list(zip(sampling, sample(logits, sampling), strict=True))
        sound = [i for i, is_finite in enumerate(finite) if is_finite]
        tokens = iter(sample(logits[sound], [sampling[i] for i in sound]) if sound else [])
        return [(s, next(tokens) if is_finite else None) for s, is_finite in zip(sampling, finite, strict=True)]

    def clear(self, sequence: Sequence) -> None:
        """Zero the keys and values of a sequence that ends unseen: NaN among them would reach its slot's next owner."""
        if sequence.slot >= 0:
            self._cache.clear(sequence.slot, sequence.num_tokens)

    def forget_adapters(self) -> None:
        """Let go of the adapters of past steps."""
        self._stacked, self._stack = {}, AdapterStack([])

    def forget(self, adapter: Adapter) -> None:
        """Let go of one adapter; it must not run any more."""
        if adapter in self._stacked:
            self.forget_adapters()

    def _lora_batch(self, chunks: list[Chunk]) -> LoraBatch | None:
        active = dict.fromkeys(adapter for chunk in chunks for adapter, weight in chunk.sequence.adapters if weight)
        if not active:
            return None
        # A stack still fits after adapters left, but columns nobody uses cost time: rebuild it when half are idle.
        if not active.keys() <= self._stacked.keys() or len(self._stacked) > 2 * len(active):
            self._stacked = {adapter: slot for slot, adapter in enumerate(active)}
            self._stack = AdapterStack([adapter.weights for adapter in self._stacked])
        segments = [
            (chunk.count, [(self._stacked[adapter], weight) for adapter, weight in chunk.sequence.adapters if weight])
            for chunk in chunks
        ]
        return LoraBatch.from_segments(self._stack, segments, self._device)
