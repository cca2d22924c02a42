"""What an adapter is in memory: for each target linear, A (r, in), B (out, r) and a scaling.

    y = W x + weight · scaling · B (A x)

and for DoRA a magnitude m (out,) besides; see `lora/dora.py`.
Targets are module paths of the base (`model.layers.0.self_attn.q_proj`, `model.layers.1.mlp.experts.3.up_proj`,
`lm_head`). This module knows the base only as `{target: (out_features, in_features)}`.
Source: LoRA, arXiv:2106.09685; rsLoRA's scaling alpha/sqrt(r), arXiv:2312.03732.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from loraserve.kernels.threads import apart

MAX_SCALING = 1e4
"""No trained adapter has lora_alpha / r beyond it; a larger one only overflows."""

Shapes = Mapping[str, tuple[int, int]]
"""What the adapter layer knows of a base: {target: (out_features, in_features)}."""


@dataclass(frozen=True, eq=False)
class LoraWeight:
    """One low-rank update: ΔW = scaling · B A, with A (r, in) and B (out, r), as they were trained."""

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    """m (out,) of DoRA, as it was trained. It cannot be computed with before `dora.prepared` has seen the base."""
    gain: Tensor | None = None
    """g - 1 (out,) of DoRA prepared for a base; B is then g ⊙ B."""

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def named_tensors(self) -> dict[str, Tensor]:
        """All of its numbers, by field."""
        fields = {"A": self.A, "B": self.B, "magnitude": self.magnitude, "gain": self.gain}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    @property
    def tensors(self) -> list[Tensor]:
        """All of its numbers."""
        return list(self.named_tensors.values())

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> "LoraWeight":
        """The same with `function` of each tensor in its place."""
        made = {name: function(tensor) for name, tensor in self.named_tensors.items()}
        return LoraWeight(made["A"], made["B"], self.scaling, made.get("magnitude"), made.get("gain"))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "LoraWeight":
        """The same on `device`, in `dtype` or its own; B lies there by columns, as a delta reads it."""
        magnitude, gain = (t if t is None else t.to(device, dtype or t.dtype) for t in (self.magnitude, self.gain))
        A = self.A.to(device, dtype or self.A.dtype).contiguous()
        B = self.B.to(device, dtype or self.B.dtype).T.contiguous().T
        return replace(self, A=A, B=B, magnitude=magnitude, gain=gain)

    def delta(self) -> Tensor:
        """ΔW (out, in) in float32."""
        return self.scaling * (self.B.float() @ self.A.float())


@dataclass(frozen=True, eq=False)
class Adapter:
    """A complete adapter: {target: LoraWeight}. Immutable; a retrained adapter is another object."""

    weights: Mapping[str, LoraWeight]
    name: str = ""
    known_digest: str | None = None

    @cached_property
    def digest(self) -> str:
        """sha256 over targets, scalings, shapes and values: equal exactly when the adapters compute the same."""
        if self.known_digest is not None:
            return self.known_digest
        sha = hashlib.sha256()
        for target in sorted(self.weights):
            weight = self.weights[target]
            sha.update(f"{target}|{weight.scaling!r}|{tuple(weight.A.shape)}|{tuple(weight.B.shape)}|".encode())
            for tensor in weight.tensors:
                sha.update(str(tensor.dtype).encode())
                sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    @cached_property
    def num_bytes(self) -> int:
        """Of all its tensors. Asked for often, of every adapter on the device, while the engine waits."""
        return sum(t.numel() * t.element_size() for w in self.weights.values() for t in w.tensors)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Adapter":
        """The same adapter with its tensors on `device` in `dtype`; see `LoraWeight.to`."""
        return Adapter({target: weight.to(device, dtype) for target, weight in self.weights.items()}, self.name)

    @cached_property
    def is_dora(self) -> bool:
        """Whether a target has a magnitude, prepared for a base or not."""
        return any(w.magnitude is not None or w.gain is not None for w in self.weights.values())


def find_size_problems(
    sizes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]], shapes: Shapes | None
) -> list[str]:
    """What makes an adapter of these sizes unusable: no targets, unknown targets, shapes that do not fit.

    Args:
        sizes: {target: (shape of A, shape of B)}.
        shapes: the base's layers; None checks only that each A fits its B.
    """
    problems = [] if sizes else ["it has no weights"]
    if shapes is not None and (unknown := sorted(sizes.keys() - shapes.keys())):
        problems.append(f"the base has no linear layer {list_some(unknown)}")
    misfits: dict[tuple[str, str], list[str]] = {}
    for target, (a, b) in sizes.items():
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0:
            problems.append(f"{target}: lora_A {a} and lora_B {b} do not fit")
        elif shapes is not None and target in shapes and (b[0], a[1]) != tuple(shapes[target]):
            fault = f"made for a layer of shape {(b[0], a[1])}, this base has {tuple(shapes[target])}"
            misfits.setdefault((target.rpartition(".")[2], fault), []).append(target)
    problems += [f"{list_some(targets)}: {fault}" for (_, fault), targets in misfits.items()]
    return problems


def find_value_problems(adapter: Adapter) -> list[str]:
    """What makes an adapter of these values unusable: NaN or Inf, an absurd scaling, every A or every B zero."""
    return apart(_find_value_problems, adapter)  # HTTP's threads, too, come here


@torch.no_grad()
def _find_value_problems(adapter: Adapter) -> list[str]:
    problems = []
    for label in ("A", "B"):
        if _surely_finite([w.A if label == "A" else w.B for w in adapter.weights.values()]):
            continue
        bad = [t for t, w in adapter.weights.items() if not torch.isfinite(w.A if label == "A" else w.B).all()]
        if bad:
            problems.append(f"{list_some(bad)}: lora_{label} contains NaN or Inf")
    magnitudes = {t: w.magnitude for t, w in adapter.weights.items() if w.magnitude is not None}
    if bad := [t for t, magnitude in magnitudes.items() if not torch.isfinite(magnitude).all()]:
        problems.append(f"{list_some(bad)}: lora_magnitude_vector contains NaN or Inf")
    if absurd := [t for t, w in adapter.weights.items() if not 0 < abs(w.scaling) <= MAX_SCALING]:
        problems.append(f"{list_some(absurd)}: a scaling of {adapter.weights[absurd[0]].scaling:g} is no use")
    for label in ("A", "B"):
        tensors = [w.A if label == "A" else w.B for w in adapter.weights.values()]
        if tensors and not magnitudes and not any(tensor.count_nonzero() for tensor in tensors):
            problems.append(f"every lora_{label} is zero: it would change nothing (an untrained adapter?)")
    return problems


def _surely_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor has NaN or Inf, in one pass: they survive a sum. One that overflows proves nothing."""
    return bool(tensors) and bool(torch.stack([t.sum(dtype=torch.float32) for t in tensors]).isfinite().all())


def list_some(names: Sequence[str], limit: int = 3) -> str:
    """Join names for a message, the first few by name and the rest by number."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
