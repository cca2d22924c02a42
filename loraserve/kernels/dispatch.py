"""Which kernels run on a device: `cpu` in C, `cuda` in Triton, or none. Both keep one contract, `Kernels`.

None has the plain forward pass serve instead: no compiler, no Triton, a GPU that Triton does not know, a dtype or head
size that the kernels do not have, or `LORASERVE_KERNELS=off`.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from loraserve.kernels import cpu

log = logging.getLogger(__name__)

Cell = tuple[Tensor, Tensor, float] | None
"""What one adapter does to one layer: A (r, in), B (out, r) and scaling; or nothing."""


class Deltas(Protocol):
    def add(self, x: Tensor, y: Tensor, entries: Any) -> None: ...


class Kernels(Protocol):
    """What a module of kernels offers; shapes stand in `cpu.py`."""

    FEW_ROWS: int
    """A slot with more rows than this is better served by matrix products."""

    def available(self, dtype: torch.dtype, head_dim: int = ...) -> bool: ...

    def add_rms_norm(
        self, x: Tensor, y: Tensor | None, weight: Tensor, eps: float, cast_first: bool, dtype: torch.dtype
    ) -> Tensor: ...

    def norm_and_rotate(
        self, qkv: Tensor, heads: tuple[int, int, int], norms: tuple[Tensor, Tensor] | None, eps: float,
        cast_first: bool, table: Tensor, positions: Tensor,
    ) -> None: ...  # fmt: skip

    def store_and_attend(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor,
        decoding: int, longest: int, out: Tensor,
    ) -> None: ...  # fmt: skip

    def silu_and_multiply(self, gate_up: Tensor) -> Tensor: ...

    def entries(self, row_weights: Tensor, device: torch.device | str) -> Any: ...

    def deltas(self, weights: Sequence[Sequence[Cell]], widths: Sequence[int], dtype: torch.dtype) -> Deltas: ...


def of(device: torch.device, dtype: torch.dtype, head_dim: int = cpu.LANES) -> Kernels | None:
    """The kernels for activations of `dtype` and heads of `head_dim` on `device`; None where the plain pass serves."""
    if device.type == "cpu":
        kernels: Kernels | None = cpu
    else:
        kernels = _cuda() if device.type == "cuda" else None
    return kernels if kernels is not None and kernels.available(dtype, head_dim) else None


@functools.cache
def _cuda() -> Kernels | None:
    """The Triton kernels, if one of them runs on this machine's GPU."""
    if os.environ.get("LORASERVE_KERNELS") == "off":
        return None
    if importlib.util.find_spec("triton") is None:
        log.warning("no Triton, the model runs slower without its kernels: pip install triton")
        return None
    try:
        from loraserve.kernels import cuda

        with torch.inference_mode():
            cuda.silu_and_multiply(torch.zeros(1, 2, device="cuda"))
    # Triton compiles at the first call, with a compiler and a driver of its own: whatever fails, nobody needs it.
    except Exception as error:
        log.warning("no Triton kernels, the model runs slower without them: %s", error)
        return None
    return cast(Kernels, cuda)
