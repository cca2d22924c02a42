"""Which bases are at hand, without loading them: the bundled one, those in the hub's local cache and in directories."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from loraserve.base.hf_config import MODEL_TYPES
from loraserve.base.resolve import BUNDLED, bundled_path

WEIGHTS = (".safetensors", ".bin", ".pth")


@dataclass(frozen=True)
class Entry:
    """A base that `--base` can load."""

    ref: str
    """What to write after `--base`."""
    path: Path
    architecture: str
    format: str
    """`hf` or `minimind`."""
    size_bytes: int
    """Of the weights on disk."""


def find_bases(directories: Iterable[Path] = ()) -> list[Entry]:
    """List the bundled base, what the hub's cache holds, and the bases in or directly below `directories`.

    What is not a base, or one that loraserve cannot run, is left out.
    """
    found = [_directory(bundled_path(), BUNDLED), *(_directory(path, ref) for ref, path in _cached())]
    for directory in directories:
        found += [_directory(directory, str(directory)) or _pickle(directory)]
        if directory.is_dir():
            found += [_directory(child, str(child)) or _pickle(child) for child in sorted(directory.iterdir())]
    return [entry for entry in found if entry]


def _directory(path: Path, ref: str) -> Entry | None:
    """A Hugging Face directory."""
    try:
        raw = json.loads((path / "config.json").read_text("utf-8"))
        weights = [file for file in path.iterdir() if file.suffix in WEIGHTS]
        kind = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if kind not in MODEL_TYPES or not weights:
        return None
    return Entry(ref, path, kind, "hf", sum(file.stat().st_size for file in weights))


def _pickle(path: Path) -> Entry | None:
    """A MiniMind `.pth`; an adapter or anything else in such a file is not a base."""
    if path.suffix != ".pth" or not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        names = set(state)
    except Exception:  # torch raises many kinds for a file that is not a plain state dict
        return None
    if not any(name.endswith("model.embed_tokens.weight") for name in names):
        return None
    return Entry(str(path), path, "minimind", "minimind", path.stat().st_size)


def _cached() -> Iterator[tuple[str, Path]]:
    """(ref, directory) of every revision in the hub's cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model":
            continue
        for revision in sorted(repo.revisions, key=lambda revision: revision.commit_hash):
            names = sorted(revision.refs) or [revision.commit_hash]
            ref = repo.repo_id if "main" in names else f"{repo.repo_id}@{names[0]}"
            yield ref, revision.snapshot_path
