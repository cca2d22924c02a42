"""Keys and values of running sequences: one contiguous slot each, allocated once.

Layout per layer: (slots, KV, max_model_len, D). A slot's history is one strided view, so decoding reads it in place;
the memory of positions that are never reached is never touched, and so costs nothing on a CPU.
"""

import itertools
import math
import mmap
from collections.abc import Sequence as List

import torch
import torch.nn.functional as F
from torch import Tensor

from loraserve.base.attention import attends_in_float32
from loraserve.base.config import ModelConfig
from loraserve.engine.scheduler import Chunk
from loraserve.kernels import cpu, dispatch
from loraserve.kernels.decoder import CachedRows

SHORT = 128
"""Tokens of a prompt that a CPU's kernel, row by row, attends to faster than torch, see benchmarks/attention.py."""


class KVCache:
    """Preallocated keys and values of `num_slots` sequences of up to `max_model_len` tokens."""

    def __init__(
        self, config: ModelConfig, num_slots: int, max_model_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (num_slots, config.num_key_value_heads, max_model_len, config.head_dim)
        self.keys = [_zeros(shape, device, dtype) for _ in range(config.num_hidden_layers)]
        self.values = [_zeros(shape, device, dtype) for _ in range(config.num_hidden_layers)]
        self.pointers = torch.tensor([t.data_ptr() for pair in zip(self.keys, self.values, strict=True) for t in pair])
        """(2 · layers,) int64: where each layer's keys and values lie."""
        self.num_slots = num_slots
        self.max_model_len = max_model_len

    def clear(self, slot: int, start: int, count: int) -> None:
        """Zero `count` positions of a slot from `start` on."""
        for tensor in (*self.keys, *self.values):
            tensor[slot, :, start : start + count] = 0

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` positions of a slot to another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :count] = tensor[source, :, :count]

    @staticmethod
    def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros, for a masked position still meets the product 0 · value. On a CPU only what is written takes memory."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)  # torch.zeros would write every page
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class CachedAttention:
    """The attention of one step over a KVCache: writes the new keys and values, then attends to each slot's history.

    Args:
        chunks: the step's chunks, those of one token first; their tokens and drafts are the rows, in order. The kernel
            takes them from the first on, up to a prompt that is not SHORT.
        repeatable: a row's result must not depend on the rows beside it, so every row is attended to by itself.
    """

    def __init__(self, cache: KVCache, chunks: List[Chunk], positions: Tensor, repeatable: bool = False) -> None:
        device = positions.device
        self._cache = cache
        self._positions = positions  # (N,)
        self._kernels = dispatch.of(device, cache.keys[0].dtype, cache.keys[0].shape[3])
        self.max_position = max(chunk.start + chunk.num_rows for chunk in chunks)
        of_rows = [chunk.sequence.slot for chunk in chunks for _ in range(chunk.num_rows)]
        self._slots = torch.tensor(of_rows, device=device)  # (N,)
        short = SHORT if self._kernels is cpu else 0
        if repeatable and self._kernels:
            short = cache.max_model_len
        alone = list(itertools.takewhile(lambda chunk: chunk.count == 1 or chunk.start + chunk.count <= short, chunks))
        prompts = chunks[len(alone) :]
        b = sum(chunk.num_rows for chunk in alone)
        self._num_alone = b
        in_c = self._kernels is cpu and b == len(of_rows)
        self.cached = CachedRows(cache.pointers, cache.max_model_len, self._slots) if in_c else None
        self._prompts: list[tuple[slice, int, int, Tensor | None]] = []
        if b and not self._kernels:
            self._length = max(chunk.start + chunk.num_rows for chunk in alone)
            seen = torch.arange(self._length, device=device) <= positions[:b, None]  # (B, L)
            self._seen = seen[:, None, None]  # (B, 1, 1, L)
            first = of_rows[0]
            dense = of_rows[:b] == list(range(first, first + b))
            self._decoding: slice | Tensor = slice(first, first + b) if dense else self._slots[:b]
        row = b
        for chunk in prompts:
            rows, end = slice(row, row + chunk.count), chunk.start + chunk.count
            mask = None
            if chunk.start:
                mask = torch.arange(end, device=device) <= positions[rows, None]  # (T, end)
            self._prompts.append((rows, chunk.sequence.slot, end, mask))
            row += chunk.count

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (N, H, D)
        b = self._num_alone
        if self._kernels:
            self._kernels.store_and_attend(
                q, k, v, keys, values, self._slots, self._positions, b, self.max_position, out
            )
        else:
            keys[self._slots, :, self._positions] = k
            values[self._slots, :, self._positions] = v
        if b and not self._kernels:
            # The H/KV query heads that share a key head stand as that head's queries: no key is repeated.
            grouped = q[:b].unflatten(1, (k.shape[1], -1))  # (B, KV, G, D)
            past_k = keys[:, :, : self._length][self._decoding]  # (B, KV, L, D)
            past_v = values[:, :, : self._length][self._decoding]
            attended = F.scaled_dot_product_attention(grouped, past_k, past_v, attn_mask=self._seen)
            out[:b] = attended.flatten(1, 2)
        for rows, slot, end, mask in self._prompts:
            query = q[rows].transpose(0, 1).unsqueeze(0)  # (1, H, T, D)
            past = keys[slot, :, :end].unsqueeze(0), values[slot, :, :end].unsqueeze(0)  # (1, KV, end, D)
            if attends_in_float32(q):
                query, past = query.float(), (past[0].float(), past[1].float())
            attended = F.scaled_dot_product_attention(
                query, *past, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
            )
            out[rows] = attended[0].transpose(0, 1).to(out.dtype)
        return out
