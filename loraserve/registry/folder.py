"""One adapter's directory: numbered versions, which one is current, and the files PEFT and vLLM read at its top.

    NAME/adapter_config.json …   hard links of the current version's files (copies where links fail)
    NAME/.versions/<n>/          one PEFT directory per version, written once
    NAME/.current                the number that readers follow; replaced with os.replace
    NAME/.linked                 which version the top-level files show, and their stat when they were linked
    NAME/.kept/<n>/              a copy of the current version's PEFT files: who writes into a top-level file in place
                                 writes into the version too, for they are one file

A version is complete and synced before `.current` names it, and `.current` is replaced before the top level follows, so
a crash at any byte leaves the old version or the new. Whatever writes here expects the registry's lock to be held.
A directory without `.versions` is a plain PEFT directory that somebody dropped in.
"""

import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loraserve.lora.files import copy_file, sync_directory, write_file
from loraserve.lora.header import WEIGHTS_FILE
from loraserve.lora.peft import CONFIG_FILE
from loraserve.registry.manifest import MANIFEST_FILE

WATCHED = (CONFIG_FILE, WEIGHTS_FILE)
State = tuple[int, int, int]
"""inode, size and mtime of a file: equal as long as nobody wrote to it."""

_SCRATCH = re.compile(r"\..+\.[0-9a-f]{8}")


@dataclass(frozen=True)
class Linked:
    """What the top level showed when it was last refreshed."""

    version: int
    files: dict[str, State]


class AdapterFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._text = str(path)

    def signature(self) -> tuple[object, ...] | None:
        """Changes whenever a version is published or a top-level file of it is touched; None if this is no adapter."""
        try:
            if not stat.S_ISDIR(os.lstat(self._text).st_mode):
                return None
        except OSError:
            return None
        current = state_of(f"{self._text}/.current")
        config = state_of(f"{self._text}/{CONFIG_FILE}")
        if current is None and config is None:
            return None
        return current, config, state_of(f"{self._text}/{WEIGHTS_FILE}"), state_of(f"{self._text}/{MANIFEST_FILE}")

    def current(self) -> int | None:
        """The version readers follow; None for a plain PEFT directory."""
        try:
            number = int((self.path / ".current").read_text("ascii"))
        except (OSError, ValueError):
            return None
        return number if self._is_version(number) else None

    def numbers(self) -> list[int]:
        """The versions there are, in order."""
        try:
            names = os.listdir(self.path / ".versions")
        except OSError:
            return []
        return sorted(n for name in names if name.isascii() and name.isdigit() and self._is_version(n := int(name)))

    def version_path(self, number: int) -> Path:
        return self.path / ".versions" / str(number)

    def add(self, staged: Path) -> int:
        """Make a complete directory the next version, by renaming it, and the current one.

        Raises OSError; then the current version is what it was, and `staged` may be gone.
        """
        number = max(self.numbers(), default=0) + 1
        self.path.mkdir(parents=True, exist_ok=True)
        versions = self.path / ".versions"
        versions.mkdir(exist_ok=True)
        sync_directory(staged)
        os.rename(staged, self.version_path(number))
        sync_directory(versions)
        sync_directory(self.path.parent)
        try:
            self.switch(number)
        except OSError:
            if self.current() != number:
                shutil.rmtree(self.version_path(number), ignore_errors=True)
            raise
        return number

    def switch(self, number: int) -> None:
        """Make a version the current one. Raises OSError; then the current version is what it was."""
        self._keep(number)
        write_file(self.path / ".current", b"%d\n" % number)
        with suppress(OSError):  # readers follow .current already; the next one refreshes the top level
            self.link(number)

    def link(self, number: int) -> None:
        """Let the top level show a version: its files there, files of the version shown before gone. Raises OSError."""
        before = self.linked()
        files = {}
        for source in _plain_files(self.version_path(number)):
            target = self.path / source.name
            _place(source, target)
            files[source.name] = state_of(target)
        for name, state in (before.files if before else {}).items():
            if name not in files and state_of(self.path / name) == state:
                (self.path / name).unlink()
        for entry in self.path.iterdir():
            if _SCRATCH.fullmatch(entry.name) and entry.is_file():
                entry.unlink()
        sync_directory(self.path)
        write_file(self.path / ".linked", json.dumps({"version": number, "files": files}).encode())
        for kept in self._kept_folders():
            if kept.name != str(number):
                shutil.rmtree(kept, ignore_errors=True)

    def linked(self) -> Linked | None:
        """What the top level showed when it was last refreshed; None if that is not known."""
        try:
            data = json.loads((self.path / ".linked").read_bytes())
            files = {str(name): (int(a), int(b), int(c)) for name, (a, b, c) in data["files"].items()}
            return Linked(int(data["version"]), files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def in_step(self) -> bool:
        """Whether the top level shows the current version, untouched."""
        linked = self.linked()
        return (
            linked is not None
            and linked.version == self.current()
            and all(state_of(self.path / name) == linked.files.get(name) for name in WATCHED)
        )

    def has_own_files(self) -> bool:
        """Whether both PEFT files lie at the top level, as files."""
        files = [self.path / name for name in WATCHED]
        return all(file.is_file() and not file.is_symlink() for file in files)

    def kept_path(self, number: int) -> Path:
        return self.path / ".kept" / str(number)

    def _keep(self, number: int) -> None:
        target = self.kept_path(number)
        if target.is_dir():
            return
        scratch = target.with_name(f".{uuid.uuid4().hex}")
        scratch.mkdir(parents=True)
        try:
            for name in WATCHED:
                copy_file(self.version_path(number) / name, scratch / name)
            os.rename(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _kept_folders(self) -> Iterator[Path]:
        yield from (self.path / ".kept").iterdir() if (self.path / ".kept").is_dir() else ()

    def _is_version(self, number: int) -> bool:
        try:
            folders = (self.path / ".versions", self.version_path(number))
            return all(stat.S_ISDIR(os.lstat(folder).st_mode) for folder in folders)
        except OSError:
            return False


def is_adapter(path: str) -> bool:
    """Whether a directory of the registry holds an adapter; at most two stat calls."""
    return os.path.lexists(f"{path}/{CONFIG_FILE}") or os.path.lexists(f"{path}/.current")


def state_of(path: Path | str) -> State | None:
    """The state of a file, symlinks not followed; None where there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def listed(numbers: list[int]) -> str:
    """Version numbers in words."""
    if not numbers:
        return "no versions, it was never published"
    return f"version{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _plain_files(folder: Path) -> list[Path]:
    files = [entry for entry in folder.iterdir() if entry.is_file() and not entry.is_symlink()]
    return sorted(entry for entry in files if not entry.name.startswith("."))


def _place(source: Path, target: Path) -> None:
    """Give `target` the file `source`: as a hard link, or as a copy where the file system cannot."""
    if state_of(target) == state_of(source):
        return
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        try:
            os.link(source, scratch)
        except OSError:
            shutil.copyfile(source, scratch)
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
