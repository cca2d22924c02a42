"""One step's matrix products by the C kernels, in three widths, beside torch's: float32, and where the processor has
bfloat16 oneDNN's over weights laid out once.

    python benchmarks/products.py

All layers of a random minimind-3 (64M), one after the other; the least of 9 interleaved rounds, in milliseconds. The
last line of stdout is JSON.
"""

import json
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from loraserve.base.linear import PACKED_ROWS
from loraserve.bench.machine import machine
from loraserve.bench.models import minimind3_config
from loraserve.kernels.gemm import PackedWeight

ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
ROUNDS = 9


def main() -> None:
    config = minimind3_config()
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    hidden, width = config.hidden_size, config.intermediate_size
    layer = [
        (heads, hidden),
        (hidden, config.num_attention_heads * config.head_dim),
        (2 * width, hidden),
        (hidden, width),
    ]
    shapes = layer * config.num_hidden_layers + [(config.vocab_size, hidden)]
    weights = [torch.randn(shape) for shape in shapes]
    halves = [weight.bfloat16() for weight in weights]
    products: dict[str, list[Callable[[Tensor], Tensor]]] = {
        "torch's float32": [partial(F.linear, weight=weight) for weight in weights],
        "float32": [PackedWeight(weight).multiply for weight in weights],
        "bfloat16": [PackedWeight(weight).multiply for weight in halves],
        "int8": [PackedWeight(weight, int8=True).multiply for weight in halves],
    }
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        onednn = [torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS) for weight in halves]
        products["oneDNN's bfloat16"] = [partial(_onednn, weight) for weight in onednn]
    result = {}
    with torch.inference_mode():
        for rows in ROWS:
            inputs = [torch.randn(rows, shape[1]) for shape in shapes]
            half_inputs = [x.bfloat16() for x in inputs]
            times = dict.fromkeys(products, float("inf"))
            for _ in range(ROUNDS):
                for name, multiply in products.items():
                    given = inputs if "float32" in name else half_inputs
                    start = time.perf_counter()
                    for product, x in zip(multiply, given, strict=True):
                        product(x)
                    times[name] = min(times[name], 1e3 * (time.perf_counter() - start))
            result[rows] = {name: round(ms, 2) for name, ms in times.items()}
            print(f"{rows:4} rows  {result[rows]}")
    print(json.dumps({"machine": machine(), "ms": result}))


def _onednn(weight: Tensor, x: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


if __name__ == "__main__":
    main()
