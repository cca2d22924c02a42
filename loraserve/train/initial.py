"""The adapter a run starts from: A random, B zero, so that the first answer is the base's.

A is drawn as PEFT draws it, uniform within ±1/sqrt(in_features), or as MiniMind does, from N(0, 0.02).
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from loraserve.lora.adapter import LoraWeight, Shapes
from loraserve.lora.config import LoraConfig

MINIMIND_STD = 0.02


def initial_weights(
    targets: Sequence[str], shapes: Shapes, config: LoraConfig, *, normal: bool, seed: int, device: torch.device
) -> dict[str, LoraWeight]:
    """Make trainable float32 weights for `targets`, the same for the same seed on every device.

    Args:
        normal: draw A from N(0, 0.02) and not from PEFT's uniform distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for target in targets:
        out_features, in_features = shapes[target]
        r = config.rank_of(target)
        A = torch.empty(r, in_features)
        if normal:
            A.normal_(0.0, MINIMIND_STD, generator=generator)
        else:
            bound = 1 / math.sqrt(in_features)
            A.uniform_(-bound, bound, generator=generator)
        B = torch.zeros(out_features, r)
        weights[target] = LoraWeight(
            nn.Parameter(A.to(device)), nn.Parameter(B.to(device)), scaling=config.scaling_of(target)
        )
    return weights
