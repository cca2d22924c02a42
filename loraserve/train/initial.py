"""The adapter a run starts from: a new one, whose first answers are the base's, or one that was trained before.

Of a new one B is zero, and A is drawn as PEFT draws it, uniform within ±1/sqrt(in_features), or as MiniMind does, from
N(0, 0.02). DoRA's magnitudes are the norms of the base's own outputs, by the weights that it computes with: of a base
in fewer bits the dequantised ones, as in PEFT.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraserve.base.load import Base
from loraserve.errors import AdapterNotFound, AdapterRefused, InvalidRequest
from loraserve.lora.adapter import Adapter, LoraWeight, Shapes, list_some
from loraserve.lora.config import ALL_LINEAR, LoraConfig, compact_targets, expand_targets, module_pattern
from loraserve.lora.dora import WeightOf, prepared
from loraserve.lora.header import WEIGHTS_FILE
from loraserve.lora.peft import read_adapter
from loraserve.registry import Registry
from loraserve.registry.manifest import read_manifest, sha256_of
from loraserve.train.dora import row_squares
from loraserve.train.options import TrainOptions, in_order

MINIMIND_STD = 0.02


@dataclass(frozen=True)
class Start:
    """What a run trains, as it is before the first step."""

    config: LoraConfig
    weights: dict[str, LoraWeight]
    """Float32 parameters on the base's device; a new adapter's magnitudes are zero until `measure`."""
    recipe: dict[str, Any]
    """What goes into the run's recipe in place of the options' own."""
    parent: str | None = None
    """The adapter it goes on with, as `Manifest.parents` has it."""

    @torch.no_grad()
    def measure(self, weight_of: WeightOf) -> None:
        """Give a new DoRA adapter its magnitudes; B must be zero.

        Args:
            weight_of: the base's weights, as training computes with them.

        Raises:
            InvalidRequest: an output without weights has no length to give it.
            AdapterRefused: the same of the adapter it goes on with, whose magnitudes stay as they are.
        """
        if self.parent is not None:
            prepared(Adapter(self.weights, self.parent.rpartition("@")[0]), weight_of)
            return
        empty = []
        for target, weight in self.weights.items():
            if weight.magnitude is None:
                continue
            weight.magnitude.copy_(row_squares(weight_of(target)).sqrt())
            if not weight.magnitude.all():
                empty.append(target)
        if empty:
            raise InvalidRequest(
                f"{list_some(empty)}: DoRA divides by the length of each output's weights, and some are all zero here; "
                "leave such layers out of --targets, or train without --dora",
                param="use_dora",
            )

    def copy(self) -> dict[str, LoraWeight] | None:
        """The adapter it goes on with, to stay as it is; None of a new one, which is the base."""
        if self.parent is None:
            return None
        return {target: w.map(lambda tensor: tensor.detach().clone()) for target, w in self.weights.items()}


def start(options: TrainOptions, base: Base, registry: Registry) -> Start:
    """Make a new adapter, or take up the one that `options.init_from` names.

    Raises:
        InvalidRequest: targets or patterns that match no layer, or are no regex.
        AdapterNotFound: init_from is neither in the registry nor a directory.
        AdapterRefused: it cannot be read, or was made for another base.
    """
    if options.init_from is not None:
        return _continued(options.init_from, base, registry)
    targets = expand_targets(ALL_LINEAR if options.targets is None else options.targets, base.shapes)
    for name, pattern in (("rank_pattern", options.rank_pattern), ("alpha_pattern", options.alpha_pattern)):
        _check_pattern(name, pattern, targets)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=tuple(compact_targets(targets, base.shapes)),
        rank_pattern=options.rank_pattern,
        alpha_pattern=options.alpha_pattern,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        base_model_name_or_path=base.name,
    )
    normal = options.targets == "minimind"
    weights = initial_weights(targets, base.shapes, config, normal=normal, seed=options.seed, device=base.device)
    return Start(config, weights, {})


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
        magnitude = nn.Parameter(torch.zeros(out_features, device=device)) if config.use_dora else None
        weights[target] = LoraWeight(
            nn.Parameter(A.to(device)),
            nn.Parameter(B.to(device)),
            scaling=config.scaling_of(target),
            magnitude=magnitude,
        )
    return weights


def _check_pattern(name: str, pattern: Mapping[str, float], targets: Sequence[str]) -> None:
    for key in pattern:
        try:
            matches = any(module_pattern(key).match(target) for target in targets)
        except ValueError as error:
            raise InvalidRequest(f"{name}: {key!r} is not a regex: {error}", param=name) from None
        if not matches:
            leaves = dict.fromkeys(target.rpartition(".")[2] for target in targets)
            raise InvalidRequest(
                f"{name}: {key!r} matches no layer that is trained: give a name such as {', '.join([*leaves][:4])}, or "
                "a regex for the end of a module path",
                param=name,
            )


def _continued(source: str, base: Base, registry: Registry) -> Start:
    if registry.has(source):
        # Not the run's own registry: it refuses another base with the advice to allow it, which training does not.
        path, name = Registry(registry.root, base.shapes).get(source).path, source
    elif Path(source).is_dir():
        path, name = Path(source), Path(source).resolve().name
    else:
        hint = "--init-from takes an adapter's name or its directory"
        raise AdapterNotFound(source, registry.names(), param="init_from", hint=hint)
    manifest, _ = read_manifest(path)
    if manifest.base_fingerprint not in (None, base.fingerprint):
        made_for = manifest.base_name or manifest.base_fingerprint
        raise AdapterRefused(name, [f"trained on another base ({made_for}); go on with it on that --base"])
    adapter, config = read_adapter(path, name, base.shapes, manifest.sha256)
    config = replace(config, base_model_name_or_path=base.name, revision=None, lora_dropout=0.0, ignored=())
    weights = {
        target: weight.map(lambda tensor: nn.Parameter(tensor.to(base.device, torch.float32, copy=True)))
        for target, weight in adapter.weights.items()
    }
    parent = f"{name}@sha256:{sha256_of(path / WEIGHTS_FILE)}"
    names = config.target_modules
    recipe = {
        "init_from": parent,
        "targets": names if isinstance(names, str) else list(names),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "rank_pattern": in_order(config.rank_pattern),
        "alpha_pattern": in_order(config.alpha_pattern),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }
    return Start(config, weights, recipe, parent)
