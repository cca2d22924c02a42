"""The frozen linear layers, alone and side by side.

    y = x Wᵀ + the deltas of the rows' adapters

Layers that read the same input (q, k and v; gate and up) cost one matrix product instead of several once `pack` has
laid their weights together for serving. Unpacked, and wherever gradients are kept, each layer computes on its own: that
is the plain form, and the tests' oracle.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraserve.base.quantize import Quantized, quantized
from loraserve.errors import InvalidRequest
from loraserve.kernels import gemm
from loraserve.kernels.decoder import CachedRows
from loraserve.lora.batch import LoraBatch

PACKED_ROWS = 16
"""The number of rows the packed layout is best for."""
BLOCK_ROWS = 64
"""Where rows must not depend on their number, a GPU multiplies so many at a time."""


class Attention(Protocol):
    """Where keys and values live, and which rows see which."""

    max_position: int
    """All positions of this step are below it."""
    cached: CachedRows | None
    """Where keys and values lie, if every row is one more token that a C kernel can attend for; else None."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: gemm.BothWays | Quantized) -> Tensor:
        ctx.weight = weight
        return weight.forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.weight.backward(gradient), None


class Linear(nn.Module):
    """A frozen linear layer without bias that knows its own path, by which adapters target it."""

    def __init__(self, target: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.target = target
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self._both_ways: gemm.BothWays | Quantized | None = None
        self._quantized: Quantized | None = None

    def packs(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether `pack_for_training` will make two copies of the weight, in `dtype` on `device`."""
        ready = self._both_ways is None and device.type == "cpu" and gemm.fast()
        return ready and all(gemm.available(dtype, width) for width in self.weight.shape)

    def pack_for_training(self) -> None:
        """Let the C kernels multiply where they are the fastest there is. The weight must not change afterwards."""
        weight = self.weight.detach()
        if self.packs(weight.dtype, weight.device):
            self._both_ways = gemm.BothWays(weight)

    def quantize(self, weight: Tensor, how: str, dtype: torch.dtype) -> None:
        """Keep `weight` (out, in) in fewer bits, and nothing of it in `dtype`; see `quantize.quantized`."""
        self._both_ways = self._quantized = quantized(weight, how, dtype)
        self.weight = nn.Parameter(torch.empty_like(weight, dtype=dtype, device="meta"), requires_grad=False)

    def weight_used(self) -> Tensor:
        """The weight (out, in) that products are made with; of a quantised layer a new tensor."""
        return self.weight.detach() if self._quantized is None else self._quantized.dequantized()

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ, (N, out)."""
        if self._both_ways is None:
            return F.linear(x, self.weight)
        product: Tensor = _Product.apply(x, self._both_ways)
        return product

    def backward_product(self, gradient: Tensor) -> Tensor:
        """Return g W, (N, in): of the gradient g (N, out) of `product`, that of its input."""
        return gradient @ self.weight if self._both_ways is None else self._both_ways.backward(gradient)

    def forward(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        y = self.product(x)
        return y if lora is None else lora.add((self.target,), (y.shape[1],), x, y)


class Joint(nn.Module):
    """Linear layers of one input, computed together once packed. It owns no parameters: its layers belong to others.

    Args:
        exact: never in int8.
    """

    def __init__(self, *layers: Linear, exact: bool = False) -> None:
        super().__init__()
        self._exact = exact
        object.__setattr__(self, "layers", layers)  # not as submodules, which would give each weight a second name
        self.targets = tuple(layer.target for layer in layers)
        self.widths = [layer.weight.shape[0] for layer in layers]
        self._multiply: Callable[[Tensor], Tensor] | None = None
        self.packed: gemm.PackedWeight | None = None
        """The weights, if the C kernels multiply them."""
        self._weight: Tensor | None = None
        self.num_bytes = 0
        """Of the weights as they are packed."""

    layers: tuple[Linear, ...]

    def pack(self, int8: bool = False, repeatable: bool = False, keep: bool = True) -> None:
        """Lay the weights together, for serving. They must not change afterwards.

        Where the C kernels multiply that is a copy, as it is on other CPUs in bfloat16; elsewhere the layers' weights
        become views of the joint one.

        Args:
            int8: round weights and activations to 8 bits, see `kernels.gemm`.
            repeatable: a row's result must not depend on how many rows stand beside it.
            keep: the layers' own weights, too, where the joint one is a copy: without them there are no gradients.

        Raises:
            InvalidRequest: int8 or repeatable where there are no kernels for it.
        """
        if self._multiply is not None:
            return
        weights = [layer.weight.detach() for layer in self.layers]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        on_cpu = weight.device.type == "cpu"
        kernels = on_cpu and gemm.available(weight.dtype, weight.shape[1])
        if int8 and not kernels:
            raise InvalidRequest("dtype int8 needs a CPU, a C compiler and layers of 16·n inputs", param="dtype")
        if repeatable and on_cpu and not kernels:
            raise InvalidRequest(
                "deterministic needs a C compiler and layers of 16·n inputs; leave --deterministic out",
                param="deterministic",
            )
        self.num_bytes = weight.nbytes
        if kernels and (int8 or repeatable or gemm.fast()):
            packed = self.packed = gemm.PackedWeight(weight, int8 and not self._exact)
            self._multiply, self._weight, self.num_bytes = packed.multiply, packed.weight, packed.num_bytes
        elif on_cpu and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            reordered = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
            self._multiply, self._weight = partial(_multiply_reordered, reordered), reordered
        else:
            for layer, part in zip(self.layers, weight.split(self.widths), strict=True):
                layer.weight.data = part
            multiply = _multiply_in_blocks if repeatable else F.linear
            self._multiply, self._weight = partial(multiply, weight=weight), weight
            return
        if not keep:
            for layer in self.layers:
                layer.weight = nn.Parameter(torch.empty_like(layer.weight, device="meta"), requires_grad=False)

    def forward(self, x: Tensor, lora: LoraBatch | None) -> tuple[Tensor, ...]:
        """Return (N, out) of each layer for x (N, in)."""
        if self._multiply is None or torch.is_grad_enabled():
            return tuple(layer(x, lora) for layer in self.layers)
        return self.side_by_side(x, lora).split(self.widths, dim=-1)

    def side_by_side(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """Return (N, Σout), all layers' outputs in one tensor; only after `pack`."""
        assert self._multiply is not None
        y = self._multiply(x)
        return y if lora is None else lora.add(self.targets, self.widths, x, y)


def _multiply_in_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ by products of one and the same shape, so that a row meets the same sums whatever stands beside it."""
    filled = F.pad(x, (0, 0, 0, -x.shape[0] % BLOCK_ROWS))
    return torch.cat([F.linear(block, weight) for block in filled.split(BLOCK_ROWS)])[: x.shape[0]]


def _multiply_reordered(weight: Tensor, x: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")
    return y
