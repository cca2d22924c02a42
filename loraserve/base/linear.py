"""The frozen linear layers, alone and side by side.

    y = x Wᵀ + the deltas of the rows' adapters

Layers that read the same input (q, k and v; gate and up) cost one matrix product instead of several once `pack` has
laid their weights together for serving. Unpacked, and wherever gradients are kept, each layer computes on its own: that
is the plain form, and the tests' oracle.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraserve.lora.batch import LoraBatch

PACKED_ROWS = 16
"""The number of rows the packed layout is best for."""


class Attention(Protocol):
    """Where keys and values live, and which rows see which."""

    max_position: int
    """All positions of this step are below it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Linear(nn.Module):
    """A frozen linear layer without bias that knows its own path, by which adapters target it."""

    def __init__(self, target: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.target = target
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        y = F.linear(x, self.weight)
        return y if lora is None else lora.apply(self.target, x, y)


class Joint(nn.Module):
    """Linear layers of one input, computed together once packed. It owns no parameters: its layers belong to others."""

    def __init__(self, *layers: Linear) -> None:
        super().__init__()
        object.__setattr__(self, "layers", layers)  # not as submodules, which would give each weight a second name
        self._targets = tuple(layer.target for layer in layers)
        self._widths = [layer.weight.shape[0] for layer in layers]
        self._weight: Tensor | None = None
        self._is_reordered = False

    layers: tuple[Linear, ...]

    def pack(self, keep: bool = True) -> None:
        """Lay the weights together, for serving. They must not change afterwards.

        On a CPU in bfloat16 they are also reordered for oneDNN, a copy of its own; elsewhere the layers' weights become
        views of the joint one.

        Args:
            keep: the layers' own weights, too, where the joint one is a copy: without them there are no gradients.
        """
        if self._weight is not None:
            return
        weights = [layer.weight.detach() for layer in self.layers]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        if on_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
            self._is_reordered = True
            if not keep:
                for layer in self.layers:
                    layer.weight = nn.Parameter(torch.empty_like(layer.weight, device="meta"), requires_grad=False)
        else:
            for layer, part in zip(self.layers, weight.split(self._widths), strict=True):
                layer.weight.data = part
        self._weight = weight

    def forward(self, x: Tensor, lora: LoraBatch | None) -> tuple[Tensor, ...]:
        """Return (N, out) of each layer for x (N, in)."""
        if self._weight is None or torch.is_grad_enabled():
            return tuple(layer(x, lora) for layer in self.layers)
        return self.side_by_side(x, lora).split(self._widths, dim=-1)

    def side_by_side(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """Return (N, Σout), all layers' outputs in one tensor; only after `pack`."""
        assert self._weight is not None
        if self._is_reordered:
            y = torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._weight, None, "none", [], "")
        else:
            y = F.linear(x, self._weight)
        return y if lora is None else lora.add(self._targets, self._widths, x, y)
