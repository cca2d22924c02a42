"""PEFT directories: `adapter_config.json` and `adapter_model.safetensors` with PEFT's keys.

    base_model.model.<module path>.lora_A.weight   (r, in)
    base_model.model.<module path>.lora_B.weight   (out, r)
    base_model.model.<module path>.lora_magnitude_vector   (out,), of DoRA

Reading trusts nothing: the header is checked before any tensor is allocated, files are read and never mapped (a file
that shrinks under a mapping kills the process), pickles are not opened, and all problems are reported at once.
Knows a base only as `Shapes`, and nothing of names and versions.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from loraserve.errors import AdapterRefused
from loraserve.lora.adapter import (
    Adapter,
    LoraWeight,
    Shapes,
    find_size_problems,
    find_value_problems,
    list_some,
)
from loraserve.lora.config import LoraConfig
from loraserve.lora.files import storage_errors, write_file
from loraserve.lora.header import WEIGHTS_FILE, read_file, read_header

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."

_KEY = re.compile(r"base_model\.model\.(?P<target>.+)\.lora_(?P<half>[AB])\.weight")
_MAGNITUDE = re.compile(r"base_model\.model\.(?P<target>.+)\.lora_magnitude_vector")
_DTYPES = ("F32", "F16", "BF16", "F64")
_MAX_CONFIG = 2 << 20
_MAX_UNSOUND = 256 << 20
"""A file with a fault in its header is read on, to report faults of its values too, only up to this size."""

Sizes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass
class Scan:
    """What config and header of an adapter say, without its values. `problems` is empty for a sound one."""

    config: LoraConfig | None = None
    sizes: Sizes = field(default_factory=dict)
    """{target: (shape of A, shape of B)}."""
    magnitudes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """{target: shape of DoRA's magnitude}."""
    size_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        halves = sum(math.prod(a) + math.prod(b) for a, b in self.sizes.values())
        return halves + sum(math.prod(shape) for shape in self.magnitudes.values())

    @property
    def rank(self) -> int:
        """The largest rank of any target."""
        return max((a[0] for a, _ in self.sizes.values() if a), default=0)


def scan_adapter(path: Path, name: str = "", shapes: Shapes | None = None) -> Scan:
    """Read config and header of a PEFT directory; cheap whatever the adapter's size. Never raises for bad content."""
    scan = Scan()
    if not path.is_dir():
        scan.problems.append(f"{path} is not a directory with {CONFIG_FILE} and {WEIGHTS_FILE}")
        return scan
    try:
        scan.config = LoraConfig.from_peft(_read_config(path / CONFIG_FILE), name)
    except AdapterRefused as refusal:
        scan.problems += refusal.problems
    try:
        header, scan.size_bytes = read_header(path / WEIGHTS_FILE)
    except AdapterRefused as refusal:
        scan.problems += refusal.problems
        return scan
    _pair_keys(header, scan, shapes)
    scan.problems += find_size_problems(scan.sizes, shapes)
    if scan.config is not None:
        try:
            _compare_with_config(scan, scan.config, shapes)
        except AdapterRefused as refusal:  # a regex of it does not come to an end
            scan.problems += refusal.problems
            scan.config = None
    return scan


def read_adapter(
    path: Path, name: str = "", shapes: Shapes | None = None, sha256: str | None = None, *, trusted: bool = False
) -> tuple[Adapter, LoraConfig]:
    """Read a PEFT directory.

    Args:
        path: the directory.
        name: the adapter's name, for messages and `Adapter.name`.
        shapes: the base's layers; None skips the comparison with a base.
        sha256: what the weights file must hash to; None skips the comparison.
        trusted: these very files were read before and found sound: neither hash nor values are looked at again.

    Raises:
        AdapterRefused: it cannot be read, would do nothing, or the wrong thing; `problems` lists everything found.
    """
    scan = scan_adapter(path, name, shapes)
    problems = scan.problems
    weights: dict[str, LoraWeight] = {}
    if scan.sizes and (not problems or scan.size_bytes <= _MAX_UNSOUND):
        found, faults = None, []
        with ThreadPoolExecutor(1) as beside:  # hashing takes as long as all the rest, and lets it go on
            try:
                data = read_file(path / WEIGHTS_FILE, scan.size_bytes)
                found = beside.submit(hashlib.sha256, data) if sha256 is not None and not trusted else None
                tensors = safetensors.torch.load(data)
                del data
                weights = _weights_of(tensors, scan)
                faults = [] if trusted else find_value_problems(Adapter(weights))
            except (SafetensorError, AdapterRefused, KeyError, ValueError) as error:
                faults = [f"{WEIGHTS_FILE} cannot be read ({error})"]
        if found is not None and found.result().hexdigest() != sha256:
            problems.append(f"{WEIGHTS_FILE} does not have the sha256 it was published with: changed or damaged")
        problems += faults
    if problems or scan.config is None:
        raise AdapterRefused(name or path.name, problems)
    return Adapter(weights, name), scan.config


def write_adapter(path: Path, adapter: Adapter, config: LoraConfig) -> None:
    """Write `adapter` as a PEFT directory; each file is replaced whole.

    Raises:
        AdapterRefused: `config` does not give every target the rank, scaling and magnitude that `adapter` has.
        StorageError: writing failed; a file that was there is as before.
    """
    problems = []
    for target, weight in adapter.weights.items():
        if config.use_dora != (weight.magnitude is not None):
            problems.append(f"{target} has {'no' if config.use_dora else 'a'} magnitude, unlike use_dora in its config")
        if not config.matches(target):
            problems.append(f"its config does not target {target}")
        elif config.rank_of(target) != weight.r or not math.isclose(
            config.scaling_of(target), weight.scaling, rel_tol=1e-6
        ):
            problems.append(
                f"{target} has rank {weight.r} and scaling {weight.scaling:g}, its config says "
                f"{config.rank_of(target)} and {config.scaling_of(target):g}"
            )
    if problems:
        raise AdapterRefused(adapter.name or path.name, problems)
    tensors = {}
    for target, weight in adapter.weights.items():
        tensors[f"{PREFIX}{target}.lora_A.weight"] = weight.A.detach().cpu().clone().contiguous()
        tensors[f"{PREFIX}{target}.lora_B.weight"] = weight.B.detach().cpu().clone().contiguous()
        if weight.magnitude is not None:
            tensors[f"{PREFIX}{target}.lora_magnitude_vector"] = weight.magnitude.detach().cpu().clone()
    with storage_errors(f"write the adapter to {path}"):
        path.mkdir(parents=True, exist_ok=True)
        write_file(path / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
        write_file(path / CONFIG_FILE, json.dumps(config.to_peft(), indent=2, ensure_ascii=False).encode() + b"\n")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_file(path, _MAX_CONFIG))
    except (ValueError, RecursionError) as error:
        raise AdapterRefused("", [f"{path.name} is not JSON ({error})"]) from None
    if not isinstance(data, dict):
        raise AdapterRefused("", [f"{path.name} is not a JSON object"])
    return data


def _pair_keys(header: Mapping[str, Any], scan: Scan, shapes: Shapes | None) -> None:
    """Sort a header's keys into A and B of targets; whatever is left over is a problem."""
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    left, odd = [], []
    for key, entry in header.items():
        match = _KEY.fullmatch(key)
        if magnitude := _MAGNITUDE.fullmatch(key):
            scan.magnitudes[magnitude["target"]] = tuple(entry["shape"])
            if entry["dtype"] not in _DTYPES:
                odd.append(f"{key} ({entry['dtype']})")
        elif match and ".lora_" not in match["target"] and not match["target"].endswith(".base_layer"):
            halves.setdefault(match["target"], {})[match["half"]] = tuple(entry["shape"])
            if entry["dtype"] not in _DTYPES:
                odd.append(f"{key} ({entry['dtype']})")
        elif key == f"{PREFIX}lm_head.base_layer.weight":
            # PEFT saves a copy of the frozen head beside an adapter on it.
            if shapes is not None and tuple(entry["shape"]) != tuple(shapes["lm_head"]):
                scan.problems.append(f"it carries a resized lm_head {tuple(entry['shape'])}, not {shapes['lm_head']}")
            scan.warnings.append("it carries a copy of the base's lm_head, which is not used")
        else:
            left.append(key)
    if odd:
        scan.problems.append(f"tensors must be float32, float16, bfloat16 or float64, not {list_some(odd)}")
    if left:
        scan.problems.append(f"keys that are not A and B of a linear layer ({_explain(left)}): {list_some(left)}")
    single = [f"{target}.lora_{'B' if 'A' in found else 'A'}" for target, found in halves.items() if len(found) < 2]
    if single:
        scan.problems.append(f"missing: {list_some(single)}")
    scan.sizes = {target: (found["A"], found["B"]) for target, found in halves.items() if len(found) == 2}


def _explain(keys: list[str]) -> str:
    """What kind of adapter left-over keys belong to, as far as it can be told."""
    kinds = {
        "lora_embedding_": "an adapter on embeddings",
        ".experts.base_layer.lora_": "an adapter on fused experts",
        ".experts.lora_": "an adapter on fused experts",
        ".lora_B.bias": "lora_bias",
        "modules_to_save": "retrained modules",
        "embed_tokens.weight": "retrained or resized embeddings",
    }
    for mark, kind in kinds.items():
        if any(mark in key for key in keys):
            return kind
    return f"PEFT's begin with {PREFIX!r} and end in .lora_A.weight or .lora_B.weight"


def _compare_with_config(scan: Scan, config: LoraConfig, shapes: Shapes | None) -> None:
    extra = [target for target in scan.sizes if not config.matches(target)]
    if extra:
        scan.problems.append(f"weights for layers that target_modules does not name: {list_some(extra)}")
    ranks = [
        f"{target} has rank {a[0]}, {CONFIG_FILE} says {config.rank_of(target)}"
        for target, (a, _) in scan.sizes.items()
        if a and a[0] != config.rank_of(target)
    ]
    if ranks:
        scan.problems.append(list_some(ranks))
    if scan.magnitudes and not config.use_dora:
        scan.problems.append(f"it has DoRA's lora_magnitude_vector, but {CONFIG_FILE} does not say use_dora")
    elif config.use_dora and (bare := [target for target in scan.sizes if target not in scan.magnitudes]):
        scan.problems.append(f"use_dora needs a lora_magnitude_vector, which is missing for {list_some(bare)}")
    if stray := [target for target in scan.magnitudes if target not in scan.sizes]:
        scan.problems.append(f"lora_magnitude_vector without lora_A and lora_B: {list_some(stray)}")
    for target, shape in scan.magnitudes.items():
        if target in scan.sizes and shape != scan.sizes[target][1][:1]:
            scan.problems.append(
                f"{target}: lora_magnitude_vector {shape} and lora_B {scan.sizes[target][1]} do not fit"
            )
    absent = [target for target in shapes or () if config.matches(target) and target not in scan.sizes]
    if absent:
        scan.warnings.append(f"no weights for {list_some(absent)}, though target_modules names it")
    if config.ignored:
        scan.warnings.append(f"fields of {CONFIG_FILE} this version does not know: {', '.join(config.ignored)}")


def _weights_of(tensors: Mapping[str, torch.Tensor], scan: Scan) -> dict[str, LoraWeight]:
    weights = {}
    for target in scan.sizes:
        A, B = tensors[f"{PREFIX}{target}.lora_A.weight"], tensors[f"{PREFIX}{target}.lora_B.weight"]
        if A.dtype == torch.float64 or B.dtype != A.dtype:  # PEFT computes these in float32
            A, B = A.float(), B.float()
        magnitude = tensors[f"{PREFIX}{target}.lora_magnitude_vector"].float() if target in scan.magnitudes else None
        weights[target] = LoraWeight(A, B, scan.config.scaling_of(target) if scan.config else 1.0, magnitude)
    return weights
