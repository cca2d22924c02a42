"""What an adapter is in memory: for each target linear, A (r, in), B (out, r) and a scaling.

    y = W x + weight · scaling · B (A x)

Targets are module paths of the base (`model.layers.0.self_attn.q_proj`, `model.layers.1.mlp.experts.3.up_proj`,
`lm_head`). This module knows the base only as `{target: (out_features, in_features)}`.
Source: LoRA, arXiv:2106.09685; rsLoRA's scaling alpha/sqrt(r), arXiv:2312.03732.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loraserve.errors import AdapterRefused

Shapes = Mapping[str, tuple[int, int]]
"""What the adapter layer knows of a base: {target: (out_features, in_features)}."""


@dataclass(frozen=True, eq=False)
class LoraWeight:
    """One low-rank update: ΔW = scaling · B A, with A (r, in) and B (out, r), as they were trained."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """ΔW (out, in) in float32."""
        return self.scaling * (self.B.float() @ self.A.float())


@dataclass(frozen=True, eq=False)
class Adapter:
    """A complete adapter: {target: LoraWeight}. Immutable; a retrained adapter is another object."""

    weights: Mapping[str, LoraWeight]
    name: str = ""

    @cached_property
    def digest(self) -> str:
        """sha256 over targets, scalings, shapes and values: equal exactly when the adapters compute the same."""
        sha = hashlib.sha256()
        for target in sorted(self.weights):
            weight = self.weights[target]
            sha.update(f"{target}|{weight.scaling!r}|{tuple(weight.A.shape)}|{tuple(weight.B.shape)}|".encode())
            for tensor in (weight.A, weight.B):
                sha.update(str(tensor.dtype).encode())
                sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for w in self.weights.values() for t in (w.A, w.B))

    @property
    def max_rank(self) -> int:
        return max((w.r for w in self.weights.values()), default=0)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Adapter":
        """The same adapter with A and B on `device` in `dtype`."""
        moved = {t: LoraWeight(w.A.to(device, dtype), w.B.to(device, dtype), w.scaling) for t, w in self.weights.items()}
        return Adapter(moved, self.name)


def find_problems(adapter: Adapter, shapes: Shapes) -> list[str]:
    """List everything that makes `adapter` unusable on a base with `shapes`; empty means it is sound.

    Checked: no targets, unknown targets, shapes of A and B, NaN or Inf, every B zero (it would do nothing).
    """
    problems = []
    if not adapter.weights:
        problems.append("it has no weights")
    unknown = sorted(set(adapter.weights) - set(shapes))
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        problems.append(f"the base has no linear layer {shown}")
    for target, weight in adapter.weights.items():
        for label, tensor in (("A", weight.A), ("B", weight.B)):
            if not torch.isfinite(tensor).all():
                problems.append(f"{target}: lora_{label} contains NaN or Inf")
        if weight.A.ndim != 2 or weight.B.ndim != 2 or weight.A.shape[0] != weight.B.shape[1] or weight.r == 0:
            problems.append(f"{target}: lora_A {tuple(weight.A.shape)} and lora_B {tuple(weight.B.shape)} do not fit")
        elif target in shapes and (weight.B.shape[0], weight.A.shape[1]) != tuple(shapes[target]):
            have, want = (weight.B.shape[0], weight.A.shape[1]), tuple(shapes[target])
            problems.append(f"{target}: made for a layer of shape {have}, this base has {want}")
    if adapter.weights and not any(w.B.count_nonzero() for w in adapter.weights.values()):
        problems.append("every lora_B is zero: it would change nothing (an untrained adapter?)")
    return problems


def check_adapter(adapter: Adapter, shapes: Shapes) -> None:
    """Raise AdapterRefused with every problem `find_problems` reports."""
    if problems := find_problems(adapter, shapes):
        raise AdapterRefused(adapter.name or "(unnamed)", problems)
