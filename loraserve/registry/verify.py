"""Checking what lies in the registry against what was published. Reads only."""

import os
from dataclasses import dataclass
from pathlib import Path

from loraserve.errors import AdapterRefused
from loraserve.lora.header import WEIGHTS_FILE
from loraserve.lora.peft import CONFIG_FILE, read_adapter
from loraserve.lora.spec import BASE, NAME_PATTERN
from loraserve.registry.fit import Fit
from loraserve.registry.folder import AdapterFolder, is_adapter
from loraserve.registry.manifest import read_manifest, sha256_of


@dataclass(frozen=True)
class Problem:
    """Something wrong with an adapter, or with one version of it."""

    name: str
    version: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.name}{f' version {self.version}' if self.version else ''}: {self.message}"


def find_strays(root: Path) -> list[Problem]:
    """Entries of the registry's directory that are not adapters and never listed."""
    problems = []
    for entry in sorted(os.scandir(root), key=lambda e: e.name) if root.is_dir() else ():
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            problems.append(Problem(entry.name, None, "a symlink, which is not followed; import what it points to"))
        elif entry.is_dir() and not is_adapter(entry.path):
            problems.append(Problem(entry.name, None, f"a directory without {CONFIG_FILE}"))
        elif entry.is_dir() and (not NAME_PATTERN.fullmatch(entry.name) or entry.name == BASE):
            problems.append(Problem(entry.name, None, "its name cannot name an adapter; rename the directory"))
    return problems


def find_problems_of(name: str, folder: AdapterFolder, fit: Fit) -> list[Problem]:
    """Everything wrong with one adapter; the base matters only for its current version."""
    current = folder.current()
    problems = []
    for number in folder.numbers() or [0]:
        path = folder.version_path(number) if number else folder.path
        manifest, warning = read_manifest(path)
        found = [warning] if warning else []
        if number and warning is None and not (manifest.sha256 and manifest.config_sha256):
            found.append("its manifest has no hashes")
        if manifest.config_sha256 and sha256_of(path / CONFIG_FILE) != manifest.config_sha256:
            found.append(f"{CONFIG_FILE} does not have the sha256 it was published with: changed or damaged")
        in_use = number == (current or 0)
        try:
            read_adapter(path, name, fit.shapes if in_use else None, manifest.sha256)
        except AdapterRefused as refusal:
            found += refusal.problems
        found += fit.compare(manifest)[0] if in_use else []
        problems += [Problem(name, number or None, message) for message in found]
    if folder.numbers() and current is None:
        problems.append(Problem(name, None, "no version is current; roll back to one"))
    elif current is not None:
        manifest, _ = read_manifest(folder.version_path(current))
        expected = {CONFIG_FILE: manifest.config_sha256, WEIGHTS_FILE: manifest.sha256}
        others = [name for name, sha in expected.items() if sha256_of(folder.path / name) != sha]
        if others:
            told = f"{' and '.join(others)} differ from version {current}; the next use adopts or refreshes them"
            problems.append(Problem(name, None, told))
    return problems
