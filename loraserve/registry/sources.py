"""Where adapters come from and go to: PEFT directories, MiniMind's `.pth` files, blends of other adapters."""

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from loraserve.errors import AdapterRefused, Conflict, InvalidRequest
from loraserve.lora.adapter import Adapter, Shapes
from loraserve.lora.config import LoraConfig
from loraserve.lora.files import copy_file, storage_errors, write_file
from loraserve.lora.header import WEIGHTS_FILE
from loraserve.lora.merge import combine
from loraserve.lora.minimind import read_minimind, write_minimind
from loraserve.lora.peft import write_adapter
from loraserve.lora.spec import Spec, format_spec
from loraserve.registry.adopt import collect
from loraserve.registry.manifest import MANIFEST_FILE, Manifest, sha256_of
from loraserve.registry.record import Record

FORMATS = {"peft": None, "minimind": (16, torch.float16), "minimind2": (8, torch.float32)}


def import_to(target: Path, source: Path, name: str, shapes: Shapes | None) -> None:
    """Make `target` a PEFT directory of the adapter at `source`. Raises AdapterRefused, OSError, StorageError."""
    if source.is_dir():
        collect(source, target)
    elif source.suffix == ".pth" and source.is_file():
        adapter = read_minimind(source, name)
        write_adapter(target, adapter, LoraConfig.describing(adapter, shapes))
        write_file(target / MANIFEST_FILE, Manifest(description=f"imported from {source.name}").to_json())
    elif not os.path.lexists(source):
        raise AdapterRefused(name, [f"{source} does not exist"])
    else:
        raise AdapterRefused(name, [f"{source} is neither a PEFT directory nor a MiniMind .pth file"])


def export_to(out: Path, record: Record, adapter: Adapter, format: str, shapes: Shapes | None) -> Path:
    """Write a version to `out`; see `Registry.export`."""
    if format not in FORMATS:
        raise InvalidRequest(f"no adapter format {format!r}: use {', '.join(FORMATS)}", param="format")
    if os.path.lexists(out) and not (format == "peft" and out.is_dir() and not any(out.iterdir())):
        raise Conflict(f"cannot export to {out}: it exists")
    settings = FORMATS[format]
    if settings is not None:
        if shapes is None:
            raise InvalidRequest("MiniMind's format needs to know the base: give --base", param="base")
        write_minimind(out, adapter, shapes, *settings)
        return out
    scratch = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    with storage_errors(f"export adapter {record.name!r} to {out}"):
        try:
            scratch.mkdir(parents=True)
            for file in record.path.iterdir():
                if file.is_file() and not file.is_symlink() and not file.name.startswith("."):
                    copy_file(file, scratch / file.name)
            os.rename(scratch, out)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return out


def blend_of(
    spec: Spec, records: Sequence[Record], parts: Sequence[tuple[Adapter, float]], name: str, shapes: Shapes | None
) -> tuple[Adapter, LoraConfig, Manifest]:
    """One adapter that computes the blend `spec` of `parts`, with a config and a manifest that names its parents.

    Raises AdapterRefused if every scale is zero.
    """
    adapter = combine(parts, name)
    if not adapter.weights:
        raise AdapterRefused(name, ["every scale of the blend is zero: it would change nothing"])
    bases = {(record.manifest.base_fingerprint, record.manifest.base_name) for record in records}
    fingerprint, base = bases.pop() if len(bases) == 1 else (None, None)
    manifest = Manifest(
        base_fingerprint=fingerprint,
        base_name=base,
        parents=tuple(f"{record.name}@sha256:{sha256_of(record.path / WEIGHTS_FILE)}" for record in records),
        recipe={"blend": format_spec(spec)},
        description=f"blend {format_spec(spec)}",
    )
    return adapter, LoraConfig.describing(adapter, shapes, base), manifest
