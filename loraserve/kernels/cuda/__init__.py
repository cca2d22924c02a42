"""The Triton kernels, called with tensors on one CUDA device. The contract is that of `kernels/cpu.py`.

Activations are float32, bfloat16 or float16; sums are float32. A row's result depends on that row alone, every sum has
a fixed order and nothing is added atomically, so results repeat bit for bit. No call waits for the device or depends on
values that lie there, so that a CUDA graph can record it. Importing this package needs Triton.
"""

import torch

from loraserve.kernels.cuda.attention import store_and_attend
from loraserve.kernels.cuda.lora import deltas, entries
from loraserve.kernels.cuda.rows import add_rms_norm, norm_and_rotate, silu_and_multiply

__all__ = [
    "add_rms_norm", "available", "deltas", "entries", "norm_and_rotate", "silu_and_multiply", "store_and_attend",
]  # fmt: skip

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
FEW_ROWS = 16
"""Of a slot: more are better served by matrix products."""


def available(dtype: torch.dtype, head_dim: int = 16) -> bool:
    """Whether the kernels exist for activations of `dtype` and heads of `head_dim`."""
    return dtype in DTYPES and 16 <= head_dim <= MAX_HEAD_DIM and head_dim % 2 == 0
