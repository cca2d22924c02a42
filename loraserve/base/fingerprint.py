"""The identity of a base: a sha256 over its canonical tensors in float16.

A `.pth` and its Hugging Face export, experts fused or not, have the same fingerprint, for they hold the same model.
Hashing a large base takes a second, so results are remembered by path, size and modification time, on disk and, where
that cannot be, by the process.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from loraserve.base.checkpoint import Checkpoint

_computed: dict[str, str] = {}


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return `sha256:<hex>` of a checkpoint, from the cache where its files have not changed since."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraserve" / "fingerprints.json"
    key = _state_of(checkpoint.path)
    try:
        known = json.loads(cache.read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    if isinstance(remembered := known.get(key, _computed.get(key)), str):
        return remembered
    value = _computed[key] = compute(checkpoint)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        scratch = cache.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(dict(list(known.items())[-99:]) | {key: value}), "utf-8")
        os.replace(scratch, cache)
    except OSError:
        pass  # the cache only saves time
    return value


def compute(checkpoint: Checkpoint) -> str:
    """Hash the tensors in order of their names: name, shape and float16 bytes each."""
    sha = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name]
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(tensor.to(torch.float16).contiguous().view(torch.uint8).numpy().data)
    return f"sha256:{sha.hexdigest()}"


def _state_of(path: Path) -> str:
    """Everything that changes when the weights do."""
    suffixes = (".safetensors", ".bin", ".json")
    files = sorted(f for f in path.iterdir() if f.suffix in suffixes) if path.is_dir() else [path]
    parts = [f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files]
    return f"{path.resolve()}|{'|'.join(parts)}"
