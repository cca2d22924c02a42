"""Files that somebody changed by hand at an adapter's top level become its next version, if they are an adapter.

Runs under the registry's lock. What is not an adapter (a file still being copied, a broken one) stays where it is, and
the current version goes on being served. Hard links make one file of a top-level file and its version's, so who writes
in place overwrites the version as well; it is restored from the copy kept beside it, and `rollback` finds it intact.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from loraserve.errors import AdapterRefused
from loraserve.lora.adapter import Shapes
from loraserve.lora.files import copy_file, write_file
from loraserve.lora.header import WEIGHTS_FILE
from loraserve.lora.peft import CONFIG_FILE, read_adapter
from loraserve.registry.folder import WATCHED, AdapterFolder, state_of
from loraserve.registry.manifest import MANIFEST_FILE, Manifest, now, read_manifest, sha256_of

EXTRA_SUFFIXES = (".md", ".png", ".svg", ".jsonl")
"""What goes along with an adapter besides its own three files: the card, pictures, the training log."""
_MAX_EXTRA = 16 << 20


def settle(folder: AdapterFolder, staging: Path, shapes: Shapes | None = None) -> str | None:
    """Bring the top level and the versions in step.

    Args:
        shapes: of the base that a changed adapter must fit; None for any base.
        staging: where a directory for the next version may be made, on the same file system.

    Returns:
        Why a change by hand could not be adopted, or None.
    """
    current = folder.current()
    if current is None or folder.in_step():
        return None
    linked = folder.linked()
    changed = [name for name in WATCHED if linked is None or state_of(folder.path / name) != linked.files.get(name)]
    if (linked is not None and linked.version != current) or any(
        state_of(folder.path / name) is None for name in WATCHED
    ):
        folder.link(current)  # a crash came between .current and the top level, or files were deleted
        return None
    manifest, _ = read_manifest(folder.version_path(current))
    known = {CONFIG_FILE: manifest.config_sha256, WEIGHTS_FILE: manifest.sha256}
    if all((folder.path / name).is_file() and sha256_of(folder.path / name) == known[name] for name in changed):
        folder.link(current)  # touched, or copied along with the whole registry
        return None
    try:
        if symlinks := [name for name in WATCHED if (folder.path / name).is_symlink()]:
            raise AdapterRefused(folder.path.name, [f"{name} is a symlink, which is not followed" for name in symlinks])
        collect(folder.path, staging)
        read_adapter(staging, folder.path.name, shapes)
    except AdapterRefused as refusal:
        shutil.rmtree(staging, ignore_errors=True)
        heal(folder, current)
        return f"files changed by hand are not an adapter, version {current} is used ({'; '.join(refusal.problems)})"
    seal(staging, _manifest_of_change(staging, folder.path.name, manifest))
    heal(folder, current)
    folder.add(staging)
    return None


def adopt_dropped(folder: AdapterFolder, staging: Path) -> None:
    """Make the files of a directory that was dropped in its version 1, whatever they are worth. Raises OSError."""
    collect(folder.path, staging)
    seal(staging, read_manifest(staging)[0])
    folder.add(staging)


def heal(folder: AdapterFolder, number: int) -> None:
    """Restore a version's files that were overwritten through a hard link, where the copy kept is the right one."""
    manifest, _ = read_manifest(folder.version_path(number))
    for name, expected in ((CONFIG_FILE, manifest.config_sha256), (WEIGHTS_FILE, manifest.sha256)):
        kept, file = folder.kept_path(number) / name, folder.version_path(number) / name
        if expected and kept.is_file() and sha256_of(file) != expected == sha256_of(kept):
            copy_file(kept, file)


def collect(source: Path, target: Path) -> None:
    """Copy an adapter's files from a directory into a new one.

    Raises:
        AdapterRefused: one of PEFT's two files is missing or not a file.
        OSError: copying failed; `target` is incomplete.
    """
    target.mkdir(parents=True)
    missing = [name for name in WATCHED if not (source / name).is_file()]
    if missing:
        if WEIGHTS_FILE in missing and (source / "adapter_model.bin").exists():
            read_adapter(source, source.name)  # says why it is not taken and what to do
        raise AdapterRefused(source.name, [f"{name} is missing in {source}" for name in missing])
    for entry in source.iterdir():
        extra = entry.suffix in EXTRA_SUFFIXES and not entry.is_symlink() and not entry.name.startswith(".")
        wanted = entry.name in (*WATCHED, MANIFEST_FILE) or (extra and entry.stat().st_size <= _MAX_EXTRA)
        if wanted and entry.is_file():
            copy_file(entry, target / entry.name)


def seal(staging: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a complete directory: its files' hashes, and the time where none is given."""
    manifest = replace(
        manifest,
        sha256=sha256_of(staging / WEIGHTS_FILE),
        config_sha256=sha256_of(staging / CONFIG_FILE),
        created=manifest.created or now(),
    )
    write_file(staging / MANIFEST_FILE, manifest.to_json())
    return manifest


def _manifest_of_change(staging: Path, name: str, before: Manifest) -> Manifest:
    weights = sha256_of(staging / WEIGHTS_FILE)
    brought, _ = read_manifest(staging)
    if brought.sha256 == weights and brought != before:
        return brought  # the files came with a manifest of their own
    parents = (f"{name}@sha256:{before.sha256}",) if before.sha256 else ()
    if before.sha256 == weights:
        return replace(before, created=None, parents=parents, description="config changed by hand")
    return Manifest(parents=parents, description="weights changed by hand")
