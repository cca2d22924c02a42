"""`loraserve.json`: where an adapter comes from. Lies beside PEFT's two files, which do not need it."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraserve.errors import AdapterRefused, InvalidRequest
from loraserve.lora.header import read_file

MANIFEST_FILE = "loraserve.json"
_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class Manifest:
    """An adapter's origin; everything may be missing in an adapter that others made."""

    base_fingerprint: str | None = None
    """`sha256:<hex>` of the base it was trained on."""
    base_name: str | None = None
    sha256: str | None = None
    """Of `adapter_model.safetensors`, in hex; set when a version is published."""
    config_sha256: str | None = None
    """Of `adapter_config.json`."""
    created: str | None = None
    """ISO 8601, UTC."""
    parents: tuple[str, ...] = ()
    """What it was made from, as `name@sha256:<hex>`."""
    data_sha256: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    """What is doubtful about how it was trained."""
    description: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Manifest":
        """Take the fields that are known; raises InvalidRequest naming those of the wrong type."""
        texts = ("base_fingerprint", "base_name", "sha256", "config_sha256", "created", "data_sha256", "description")
        wrong = [name for name in texts if not isinstance(data.get(name), str | None)]
        wrong += [name for name in ("recipe", "metrics") if not isinstance(data.get(name, {}), Mapping)]
        lists = {name: data.get(name) or () for name in ("parents", "warnings")}
        for name, items in lists.items():
            if not isinstance(items, list | tuple) or not all(isinstance(text, str) for text in items):
                wrong.append(name)
        if wrong:
            raise InvalidRequest(f"manifest fields of the wrong type: {', '.join(wrong)}")
        known = {f.name: data[f.name] for f in fields(cls) if data.get(f.name) is not None}
        return cls(**known | {name: tuple(items) for name, items in lists.items()})

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, default=str).encode() + b"\n"


def read_manifest(folder: Path) -> tuple[Manifest, str | None]:
    """Read the manifest in an adapter's directory.

    Returns:
        The manifest, an empty one where there is none, and a warning where it cannot be read.
    """
    path = folder / MANIFEST_FILE
    if not path.is_symlink() and not path.exists():
        return Manifest(), None
    try:
        data = json.loads(read_file(path, _MAX_BYTES))
        return Manifest.from_dict(data if isinstance(data, dict) else {}), None
    except (AdapterRefused, InvalidRequest, ValueError, RecursionError) as error:
        return Manifest(), f"{MANIFEST_FILE} cannot be read and is ignored ({error})"


def now() -> str:
    """The present moment as `created` has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sha256_of(path: Path) -> str:
    """The sha256 of a file in hex; empty where there is none."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
