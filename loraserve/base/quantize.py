"""A frozen base in 8 or 4 bits while adapters train on it (QLoRA, arXiv:2305.14314).

    y = x Wᵀ,  W = values · scales

    int8   a whole number within ±127 for each weight, a scale for each output           1 byte a weight
    nf4    one of 16 quantiles of a normal distribution, a float32 scale for 64 weights  0.5625 bytes a weight

W is made anew for every product, forward and backward, in the dtype of the activations, and is gone after it; gradients
reach x alone. Embeddings, head, norms and routers are never rounded: they are small, and all rows and losses go through
them. nf4 is that of bitsandbytes, an extra of this package.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from loraserve.base.config import ModelConfig
from loraserve.errors import InvalidRequest

INT8, NF4 = "int8", "nf4"
QUANTIZATIONS = (INT8, NF4)
BLOCK = 64
"""Weights of one nf4 scale."""
SLAB = 512
"""Rows that are rounded at a time, so that float32 copies stay small; a multiple of BLOCK."""


@dataclass(frozen=True)
class Quantized:
    """A weight W (out, in) in fewer bits."""

    dequantized: Callable[[], Tensor]
    """Makes W (out, in), in the dtype of the activations."""
    num_bytes: int

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ, (N, out)."""
        return F.linear(x, self.dequantized())

    def backward(self, gradient: Tensor) -> Tensor:
        """Return g W, (N, in): of the gradient g (N, out) of x Wᵀ, that of x."""
        return gradient @ self.dequantized()


def quantized(weight: Tensor, how: str, dtype: torch.dtype) -> Quantized:
    """Round a weight (out, in), on whose device the result stays.

    Args:
        how: one of QUANTIZATIONS.
        dtype: of the activations.

    What `check_quantization` refuses cannot be rounded.
    """
    return _int8(weight, dtype) if how == INT8 else _nf4(weight, dtype)


def _int8(weight: Tensor, dtype: torch.dtype) -> Quantized:
    parts = [_rounded(slab, dtype) for slab in weight.split(SLAB)]
    values = torch.cat([part for part, _ in parts])  # (out, in) int8
    scale = torch.cat([part for _, part in parts])  # (out, 1)
    return Quantized(lambda: values.to(dtype).mul_(scale), values.nbytes + scale.nbytes)


def _rounded(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights (out, in) as int8, and the outputs' scales (out, 1), of which the values allow for being in `dtype`."""
    scale = (weight.abs().amax(dim=1, keepdim=True).float() / 127).to(dtype)
    step = torch.where(scale > 0, scale.float(), 1.0)
    return (weight / step).round_().clamp_(-127, 127).to(torch.int8), scale


def _nf4(weight: Tensor, dtype: torch.dtype) -> Quantized:
    assert weight.numel() % BLOCK == 0
    library = bitsandbytes()
    parts = [library.quantize_4bit(slab, blocksize=BLOCK, quant_type=NF4) for slab in weight.split(SLAB)]
    values = torch.cat([part for part, _ in parts])  # (out · in / 2, 1) uint8
    scales = torch.cat([state.absmax for _, state in parts])  # (out · in / 64,) float32
    # In rows of one block: the library's CPU kernel misreads rows that end within a block.
    blocks = torch.Size((weight.numel() // BLOCK, BLOCK))
    state = library.QuantState(scales, blocks, parts[0][1].code, BLOCK, NF4, dtype)
    shape = weight.shape
    return Quantized(lambda: library.dequantize_4bit(values, state).view(shape), values.nbytes + scales.nbytes)


def check_quantization(how: str, config: ModelConfig | None = None) -> None:
    """Raise InvalidRequest if there is no `how`, its library is not installed, or a layer of `config` cannot be so."""
    if how not in QUANTIZATIONS:
        raise InvalidRequest(f"quantize is one of {', '.join(QUANTIZATIONS)}, not {how!r}", param="quantize")
    if how == NF4 and not installed():
        raise InvalidRequest(
            "quantize nf4 needs bitsandbytes: pip install 'loraserve[bitsandbytes]', or use --quantize int8",
            param="quantize",
        )
    for target, shape in _unfit(how, config) if config is not None else ():
        raise InvalidRequest(
            f"quantize nf4 takes layers of {BLOCK}·n weights, and {target} has the shape {shape}; use --quantize int8",
            param="quantize",
        )


def fits(how: str, config: ModelConfig) -> bool:
    """Whether all layers of a base of `config` can be kept like that, where the library is installed."""
    return not _unfit(how, config)


def _unfit(how: str, config: ModelConfig) -> list[tuple[str, tuple[int, int]]]:
    """(target, shape) of the layers that cannot be kept so."""
    shapes = quantized_shapes(config).items() if how == NF4 else ()
    return [(target, shape) for target, shape in shapes if shape[0] * shape[1] % BLOCK]


def installed() -> bool:
    """Whether the library for nf4 is."""
    return importlib.util.find_spec("bitsandbytes") is not None


def bitsandbytes() -> ModuleType:
    """Import the library's functions, which takes some 150 MB of the process."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)  # it advises to install faster products for single rows
        try:
            import bitsandbytes.functional as library
        finally:
            logger.setLevel(level)
    return library


def quantized_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The layers that a quantised base has in fewer bits, {target: (out, in)}: all of the blocks but routers."""
    shapes = config.linear_shapes().items()
    return {t: shape for t, shape in shapes if t.startswith("model.layers.") and not t.endswith(".mlp.gate")}


def num_bytes(shape: tuple[int, int], how: str, dtype: torch.dtype) -> int:
    """What `quantized` keeps of a weight (out, in)."""
    out_features, in_features = shape
    weights = out_features * in_features
    return weights + out_features * dtype.itemsize if how == INT8 else weights // 2 + 4 * (weights // BLOCK)
