"""`adapter_config.json`: which layers an adapter changes, at which rank and scale, with PEFT's meaning of every field.

    scaling(t) = alpha(t) / r(t), or alpha(t) / sqrt(r(t)) with `use_rslora`

where r(t) and alpha(t) come from the first key of `rank_pattern` / `alpha_pattern` that matches the module path t as
`(.*\\.)?(key)$`, else from `r` and `lora_alpha`. A list of `target_modules` matches whole paths and their last parts, a
string is a regex for the whole path. `fan_in_fan_out` concerns layers that store (in, out); PEFT ignores it on a linear
layer, and every layer here is one. What changes the result and is not here is refused by name.
Source: PEFT 0.21 `LoraConfig`, `check_target_module_exists`, `get_pattern_key`. Knows no files and no tensors.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loraserve.errors import AdapterRefused, InvalidRequest, did_you_mean
from loraserve.lora.fields import Fields
from loraserve.lora.patterns import Pattern

if TYPE_CHECKING:
    from loraserve.lora.adapter import Adapter, Shapes

ALL_LINEAR = "all-linear"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PRESETS = (ALL_LINEAR, "all", "attention", "minimind")


@dataclass(frozen=True)
class LoraConfig:
    """An adapter's settings under PEFT's names. `target_modules` is a list of names or a regex."""

    r: int
    lora_alpha: float
    target_modules: Sequence[str] | str
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    exclude_modules: Sequence[str] | str = ()
    layers_to_transform: Sequence[int] | None = None
    layers_pattern: Sequence[str] = ()
    lora_dropout: float = 0.0
    base_model_name_or_path: str | None = None
    revision: str | None = None
    ignored: tuple[str, ...] = ()
    """Fields of a newer PEFT that were set to a number or a text, which by PEFT's habit belong to a switch left off."""

    @classmethod
    def from_peft(cls, data: Mapping[str, Any], name: str = "adapter") -> "LoraConfig":
        """Read the content of an `adapter_config.json`.

        Raises:
            AdapterRefused: for fields that are missing, wrong or not supported; all of them are named.
        """
        fields = Fields(data)
        fields.refuse_unsupported()
        if data.get("target_modules") is None:
            fields.problems.append("adapter_config.json: target_modules is missing")
        config = cls(
            r=fields.integer("r", 8, minimum=1),
            lora_alpha=fields.number("lora_alpha", 8),
            target_modules=fields.names_or_regex("target_modules"),
            rank_pattern=fields.pattern("rank_pattern", integers=True),
            alpha_pattern=fields.pattern("alpha_pattern", integers=False),
            use_rslora=bool(data.get("use_rslora")),
            use_dora=bool(data.get("use_dora")),
            fan_in_fan_out=bool(data.get("fan_in_fan_out")),
            exclude_modules=fields.names_or_regex("exclude_modules"),
            layers_to_transform=fields.layers("layers_to_transform"),
            layers_pattern=fields.regexes("layers_pattern"),
            lora_dropout=fields.number("lora_dropout", 0.0, zero=True),
            base_model_name_or_path=fields.text("base_model_name_or_path"),
            revision=fields.text("revision"),
            ignored=fields.unknown(),
        )
        if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
            fields.problems.append("adapter_config.json: layers_to_transform needs target_modules to be a list")
        if fields.problems:
            raise AdapterRefused(name, fields.problems)
        return config

    @classmethod
    def describing(cls, adapter: "Adapter", shapes: "Shapes | None" = None, base: str | None = None) -> "LoraConfig":
        """The config under which PEFT gives each target of `adapter` its own rank and scaling."""
        ranks = {target: w.r for target, w in adapter.weights.items()}
        alphas = {target: _tidy(w.scaling * w.r) for target, w in adapter.weights.items()}
        r, alpha = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)[0][0]
        return cls(
            r=r,
            lora_alpha=alpha,
            target_modules=tuple(compact_targets(adapter.weights, shapes or {})),
            rank_pattern={re.escape(t): rank for t, rank in ranks.items() if rank != r},
            alpha_pattern={re.escape(t): value for t, value in alphas.items() if value != alpha},
            use_dora=adapter.is_dora,
            base_model_name_or_path=base,
        )

    def to_peft(self) -> dict[str, Any]:
        """The content of an `adapter_config.json` that PEFT and vLLM read as this config."""
        names = self.target_modules
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model_name_or_path,
            "revision": self.revision,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "target_modules": names if isinstance(names, str) else list(names),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "use_rslora": self.use_rslora,
            "fan_in_fan_out": self.fan_in_fan_out,
            "exclude_modules": _list_or_none(self.exclude_modules),
            "layers_to_transform": None if self.layers_to_transform is None else list(self.layers_to_transform),
            "layers_pattern": _list_or_none(self.layers_pattern),
            "lora_dropout": self.lora_dropout,
            "bias": "none",
            "use_dora": self.use_dora,
            "modules_to_save": None,
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def rank_of(self, target: str) -> int:
        """r of one module."""
        return next((r for pattern, r in self._ranks if pattern.match(target)), self.r)

    def alpha_of(self, target: str) -> float:
        """lora_alpha of one module."""
        return next((alpha for pattern, alpha in self._alphas if pattern.match(target)), self.lora_alpha)

    def scaling_of(self, target: str) -> float:
        """The factor on B A of one module."""
        r = self.rank_of(target)
        return self.alpha_of(target) / (math.sqrt(r) if self.use_rslora else r)

    def matches(self, target: str) -> bool:
        """Whether PEFT would put an adapter on the module path `target`."""
        if _selects(self.exclude_modules, target):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            return _is_all_linear(target)
        if not _selects(self.target_modules, target):
            return False
        if isinstance(self.target_modules, str) or target in self.target_modules or not self.layers_to_transform:
            return True
        layer = self._layer_of(target)
        return layer is not None and layer in self.layers_to_transform

    def _layer_of(self, target: str) -> int | None:
        expressions = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in self.layers_pattern]
        for expression in expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            if match := Pattern(expression).match(target):
                return int(match["idx"])
        return None

    @cached_property
    def _ranks(self) -> list[tuple[Pattern, int]]:
        return [(module_pattern(key), value) for key, value in self.rank_pattern.items()]

    @cached_property
    def _alphas(self) -> list[tuple[Pattern, float]]:
        return [(module_pattern(key), value) for key, value in self.alpha_pattern.items()]


def module_pattern(key: str) -> Pattern:
    """What a key of `rank_pattern` or `alpha_pattern` matches. Raises ValueError if it is not a regex."""
    return Pattern(rf"(.*\.)?({key})$")


def parse_targets(text: str) -> str | list[str]:
    """Read a selection written as one text: a preset or a regex as it is, module names between commas as a list."""
    if text in PRESETS or not re.fullmatch(r"[\w.]+(,[\w.]+)*", text):
        return text
    return text.split(",")


def expand_targets(selection: str | Sequence[str], shapes: "Shapes") -> list[str]:
    """The module paths of a base that `selection` names.

    Args:
        selection: `all-linear` (as PEFT means it: no lm_head, no router), `all` (that and lm_head), `attention`,
            `minimind` (upstream's: the square layers), a list as in PEFT's target_modules, or a regex for whole paths.

    Raises:
        InvalidRequest: nothing matches, or a name of the list matches nothing.
    """
    if isinstance(selection, str):
        found = [target for target in shapes if _in_preset(selection, target, shapes[target])]
        if not found:
            raise InvalidRequest(
                f"target_modules {selection!r} matches no layer of this base: give {', '.join(PRESETS)}, "
                f"layer names such as {', '.join(_leaves(shapes)[:4])}, or a regex for whole module paths",
                param="target_modules",
            )
        return found
    for name in selection:
        if not any(_selects((name,), target) for target in shapes):
            hint = did_you_mean(name, _leaves(shapes)) or f"it has {', '.join(_leaves(shapes))}"
            raise InvalidRequest(f"this base has no layer named {name!r}; {hint}", param="target_modules")
    return [target for target in shapes if _selects(tuple(selection), target)]


def compact_targets(targets: Iterable[str], shapes: "Shapes") -> list[str]:
    """The shortest `target_modules` list that selects exactly `targets` on a base: last parts where all are chosen."""
    chosen = set(targets)
    whole = {leaf for leaf in _leaves(shapes) if all(t in chosen for t in shapes if _selects((leaf,), t))}
    return list(dict.fromkeys(leaf if (leaf := t.rpartition(".")[2]) in whole else t for t in targets))


def _selects(names: Sequence[str] | str, target: str) -> bool:
    if isinstance(names, str):
        return Pattern(names).covers(target)
    return f".{target}".endswith(_endings(tuple(names)))


@functools.lru_cache(maxsize=64)
def _endings(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names)


def _in_preset(selection: str, target: str, shape: tuple[int, int]) -> bool:
    if selection == ALL_LINEAR:
        return _is_all_linear(target)
    if selection == "all":
        return target == "lm_head" or _is_all_linear(target)
    if selection == "attention":
        return _selects(ATTENTION, target)
    if selection == "minimind":
        return shape[0] == shape[1]
    try:
        return _selects(selection, target)
    except ValueError as error:
        raise InvalidRequest(f"target_modules {selection!r} is not a regex: {error}", param="target_modules") from None


def _is_all_linear(target: str) -> bool:
    """Every linear layer but the output layer and a mixture's router."""
    return target.rpartition(".")[2] not in ("lm_head", "gate")


def _leaves(shapes: "Shapes") -> list[str]:
    return list(dict.fromkeys(target.rpartition(".")[2] for target in shapes))


def _tidy(value: float) -> float:
    return int(value) if value == int(value) else value


def _list_or_none(names: Sequence[str] | str) -> list[str] | str | None:
    return names if isinstance(names, str) else list(names) or None
