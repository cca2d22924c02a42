"""Reading the fields of an `adapter_config.json`, collecting every problem instead of stopping at the first.

A field that would change the result and is not supported is refused by name. A field this version does not know is
refused where it switches something on (true, or an object or list with content); a number or a text is taken to be the
parameter of a switch left off, which is how PEFT has added fields so far, and is reported as ignored.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from loraserve.lora.patterns import Pattern

HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base's weights as they are, so that the saved A and B are all of the adapter."""

UNSUPPORTED = {
    "modules_to_save": "whole retrained layers",
    "target_parameters": "adapters on fused expert tensors; target the experts' linear layers one by one",
    "lora_bias": "a bias on lora_B",
    "trainable_token_indices": "retrained token embeddings",
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron layers",
    "ensure_weight_tying": "adapters on tied embeddings",
}
KNOWN = {
    *UNSUPPORTED,
    *("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *(
        "fan_in_fan_out",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "base_model_name_or_path",
    ),
    *("revision", "bias", "init_lora_weights", "peft_type"),
    # Without influence on what a saved adapter computes.
    *("task_type", "inference_mode", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
}


class Fields:
    """One config's fields; the getters return something usable and add what is wrong to `problems`."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.problems: list[str] = []

    def refuse_unsupported(self) -> None:
        """Report every field that is set to something this package cannot do."""
        data = self.data
        if data.get("peft_type", "LORA") != "LORA":
            self._add(f"peft_type {_shown(data['peft_type'])} is not supported, only LORA is")
        if data.get("bias") not in (None, "none"):
            self._add(f"bias={_shown(data['bias'])} is not supported: biases of the base stay as they are")
        init = data.get("init_lora_weights")
        if not isinstance(init, bool | str | None) or init not in HARMLESS_INITS:
            self._add(
                f"init_lora_weights={_shown(init)} is not supported: such a start moves part of the base's weights "
                "into the adapter; save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
            )
        for name, meaning in UNSUPPORTED.items():
            if data.get(name):
                self._add(f"{name} is not supported ({meaning})")
        for name in data.keys() - KNOWN:
            if data[name] is True or (isinstance(data[name], dict | list) and data[name]):
                self._add(f"{name} is not a field this version knows")

    def unknown(self) -> tuple[str, ...]:
        """Fields nobody here knows that are set to a number or a text."""
        unknown = sorted(self.data.keys() - KNOWN)
        return tuple(
            name for name in unknown if self.data[name] and not isinstance(self.data[name], bool | dict | list)
        )

    def integer(self, name: str, default: int, minimum: int) -> int:
        value: Any = self.data.get(name, default)
        if not _is_integer(value) or value < minimum:
            self._add(f"{name} must be a whole number of at least {minimum}, not {_shown(value)}")
            return default
        return int(value)

    def number(self, name: str, default: float, zero: bool = False) -> float:
        value: int | float = self.data.get(name, default)
        if not _is_number(value) or (value == 0 and not zero):
            self._add(f"{name} must be a {'' if zero else 'nonzero '}number, not {_shown(value)}")
            return default
        return value

    def text(self, name: str) -> str | None:
        value = self.data.get(name)
        return value if isinstance(value, str) and value else None

    def names_or_regex(self, name: str) -> tuple[str, ...] | str:
        value = self.data.get(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return value if self._compiles(name, value) else ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._add(f"{name} must be a list of names or a regex, not {_shown(value)}")
            return ()
        return tuple(value)

    def regexes(self, name: str) -> tuple[str, ...]:
        value = self.data.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._add(f"{name} must be a name or a list of names, not {_shown(value)}")
            return ()
        return tuple(item for item in value if self._compiles(name, item))

    def layers(self, name: str) -> tuple[int, ...] | None:
        value = self.data.get(name)
        if value is None or value == []:
            return None
        value = [value] if _is_integer(value) else value
        if not isinstance(value, list) or not all(_is_integer(item) for item in value):
            self._add(f"{name} must be a layer number or a list of them, not {_shown(value)}")
            return None
        return tuple(value)

    def pattern(self, name: str, integers: bool) -> dict[str, Any]:
        value = self.data.get(name) or {}
        if not isinstance(value, dict):
            self._add(f"{name} must be an object from module names to numbers, not {_shown(value)}")
            return {}
        wanted = "a whole number of at least 1" if integers else "a nonzero number"
        for key, item in value.items():
            sound = (_is_integer(item) and item >= 1) if integers else (_is_number(item) and item != 0)
            if not sound:
                self._add(f"{name}[{_shown(key)}] must be {wanted}, not {_shown(item)}")
        return {key: item for key, item in value.items() if self._compiles(name, key)}

    def _compiles(self, name: str, expression: str) -> bool:
        try:
            Pattern(expression)
        except ValueError as error:
            self._add(f"{name}: {_shown(expression)} is not a regex ({error})")
            return False
        return True

    def _add(self, problem: str) -> None:
        self.problems.append(f"adapter_config.json: {problem}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and not math.isnan(value)


def _shown(value: object) -> str:
    return reprlib.repr(value)
