"""Attention on a CPU: where one way of computing it begins to win over another.

    python benchmarks/attention.py

Heads as in minimind-3; milliseconds, the least of 7. The last line of stdout is JSON.

    training    a batch in float32 and in bfloat16, forward alone and with gradients, conversions from bfloat16 included
    prompts     up to 512 tokens of prompts of one length, by the kernel row by row (see `SHORT`) and by torch
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from loraserve.bench.machine import machine
from loraserve.bench.models import minimind3_config
from loraserve.engine import kv_cache
from loraserve.engine.kv_cache import CachedAttention, KVCache
from loraserve.engine.params import SamplingParams
from loraserve.engine.scheduler import Chunk
from loraserve.engine.sequence import Sequence as Request

SHAPES = ((16, 32), (16, 64), (16, 128), (16, 192), (16, 256), (16, 512), (4, 1024))
"""Sequences and their length."""
HEADS, KEYS, WIDTH = 8, 4, 96
PROMPTS, TOKENS = (16, 32, 64, 96, 128, 192, 256, 512), 512


def main() -> None:
    training = train()
    print(json.dumps({"machine": machine(), "training_ms": training, "prompts_ms": prompts()}))


def train() -> list[dict[str, float]]:
    result = []
    for count, length in SHAPES:
        q, k, v = (torch.randn(count, heads, length, WIDTH).bfloat16() for heads in (HEADS, KEYS, KEYS))
        row: dict[str, float] = {"sequences": count, "length": length}
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            row[f"{name} forward"] = _least(partial(_attend, (q, k, v), dtype, False))
            row[f"{name} with gradients"] = _least(partial(_attend, (q, k, v), dtype, True))
        print(row)
        result.append(row)
    return result


def prompts() -> list[dict[str, float]]:
    config = dataclasses.replace(minimind3_config(), num_hidden_layers=1)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (HEADS, KEYS, WIDTH)
    result = []
    for length in PROMPTS:
        row: dict[str, float] = {"length": length}
        for dtype in (torch.float32, torch.bfloat16):
            cache = KVCache(config, TOKENS // length, 2048, torch.device("cpu"), dtype)
            rows = TOKENS // length * length
            q, k, v = (torch.randn(rows, heads, WIDTH, dtype=dtype) for heads in (HEADS, KEYS, KEYS))
            chunks = []
            for slot in range(TOKENS // length):
                sequence = Request([0] * length, SamplingParams(), 1)
                sequence.slot = slot
                chunks.append(Chunk(sequence, 0, length))
            positions = torch.arange(length).repeat(len(chunks))
            with torch.inference_mode():
                for name, short in (("kernel", length), ("torch", 0)):
                    kv_cache.SHORT = short
                    attention = CachedAttention(cache, chunks, positions)
                    assert (attention.cached is not None) == bool(short)
                    column = f"{str(dtype).removeprefix('torch.')} {name}"
                    row[column] = _least(partial(attention.attend, 0, q, k, v))
        print(row)
        result.append(row)
    return result


def _attend(given: Sequence[Tensor], dtype: torch.dtype, gradients: bool) -> None:
    inputs = [x.to(dtype).requires_grad_(gradients) for x in given]
    out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True).bfloat16()
    if gradients:
        out.backward(torch.ones_like(out))


def _least(function: Callable[[], object], repeats: int = 7) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(1e3 * min(times), 2)


if __name__ == "__main__":
    main()
