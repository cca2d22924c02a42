"""Attention of a training batch on a CPU, in float32 and in bfloat16: how long sequences must be for the latter to win.

    python benchmarks/attention.py

Heads as in minimind-3; milliseconds, the least of 7, forward alone and with gradients, conversions from bfloat16
included. The last line of stdout is JSON.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from loraserve.bench.machine import machine

SHAPES = ((16, 32), (16, 64), (16, 128), (16, 192), (16, 256), (16, 512), (4, 1024))
"""Sequences and their length."""
HEADS, KEYS, WIDTH = 8, 4, 96


def main() -> None:
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
    print(json.dumps({"machine": machine(), "ms": result}))


def _attend(given: Sequence[Tensor], dtype: torch.dtype, gradients: bool) -> None:
    inputs = [x.to(dtype).requires_grad_(gradients) for x in given]
    out = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True).bfloat16()
    if gradients:
        out.backward(torch.ones_like(out))


def _least(function: Callable[[], None], repeats: int = 7) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(1e3 * min(times), 2)


if __name__ == "__main__":
    main()
