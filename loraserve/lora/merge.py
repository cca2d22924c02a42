"""Folding adapters into weights, and several adapters into one.

    merged = cast(fp32(W) + Σ weight · scaling · B A)         rounded once, into a new tensor
    DoRA:  cast(fp32(W) + Σ weight · (g ⊙ (W + scaling · B A) - W))
    blend: A = [A₁; A₂; …], B = [w₁·s₁·B₁, w₂·s₂·B₂, …], scaling 1, so that B A = Σ wᵢ·sᵢ·Bᵢ Aᵢ exactly

Source: LoRA, arXiv:2106.09685, section 4.1; the concatenation is PEFT's combination_type="cat".
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from loraserve.errors import AdapterRefused
from loraserve.lora.adapter import Adapter, LoraWeight
from loraserve.lora.dora import gain_of


def merged_weight(
    weight: Tensor, updates: Sequence[tuple[LoraWeight, float]], dtype: torch.dtype | None = None
) -> Tensor:
    """Fold updates into one layer's weight.

    Args:
        weight: the pristine W (out, in), as the checkpoint stores it; not modified.
        updates: the adapters' updates for this layer, each with the factor on its ΔW.
        dtype: of the result; W's own by default.

    Returns:
        A new (out, in) tensor; a copy of W where there are no updates.
    """
    pristine = weight.float()
    merged = weight.to(torch.float32, copy=True)
    for update, factor in updates:
        change = update.delta().to(merged.device)
        if update.magnitude is not None:
            gain = gain_of(pristine, update).to(merged.device).unsqueeze(1)  # (out, 1)
            change = gain * change + (gain - 1) * pristine
        merged += factor * change
    return merged.to(dtype or weight.dtype)


def combine(parts: Sequence[tuple[Adapter, float]], name: str = "") -> Adapter:
    """One adapter that computes the blend of several.

    Args:
        parts: adapters, each with the factor on its ΔW; a factor of 0 leaves an adapter out.

    Returns:
        An adapter on the union of the targets, whose rank at each is the sum of the parts' ranks there, in float32.

    Raises:
        AdapterRefused: a part is a DoRA adapter, whose change of W has no low rank.
    """
    if dora := [adapter.name for adapter, factor in parts if factor and adapter.is_dora]:
        fault = (
            "a DoRA adapter cannot be part of one LoRA adapter; serve the blend as a SPEC, or merge it into the base"
        )
        raise AdapterRefused(dora[0], [fault])
    weights = {}
    for target in dict.fromkeys(target for adapter, _ in parts for target in adapter.weights):
        here = [(a.weights[target], factor) for a, factor in parts if factor and target in a.weights]
        if here:
            A = torch.cat([w.A.float() for w, _ in here])  # (Σr, in)
            B = torch.cat([(factor * w.scaling) * w.B.float() for w, factor in here], dim=1)  # (out, Σr)
            weights[target] = LoraWeight(A, B, 1.0)
    return Adapter(weights, name)
