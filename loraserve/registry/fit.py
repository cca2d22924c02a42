"""Whether an adapter fits the base it is to run on: the layers' shapes, and which base it was trained on."""

from dataclasses import dataclass
from pathlib import Path

from loraserve.errors import AdapterRefused
from loraserve.lora.adapter import Shapes
from loraserve.lora.peft import read_adapter
from loraserve.registry.manifest import MANIFEST_FILE, Manifest, read_manifest


@dataclass(frozen=True)
class Fit:
    """The base of a registry, as far as it is known."""

    shapes: Shapes | None
    fingerprint: str | None
    allow_mismatch: bool
    """Take adapters of a base with other weights; never of other shapes."""

    def compare(self, manifest: Manifest) -> tuple[list[str], list[str]]:
        """Problems, which refuse an adapter, and warnings about the base it was trained on."""
        if self.fingerprint is None or manifest.base_fingerprint == self.fingerprint:
            return [], []
        if manifest.base_fingerprint is None:
            return [], [f"it does not say which base it was trained on (no base_fingerprint in {MANIFEST_FILE})"]
        made_for = f"trained on another base ({manifest.base_name or manifest.base_fingerprint[:19]})"
        if self.allow_mismatch:
            return [], [f"{made_for}, allowed by --allow-base-mismatch"]
        return [f"{made_for}; --allow-base-mismatch takes it all the same"], []

    def check(self, path: Path, name: str) -> Manifest:
        """Read all of a version and return its manifest.

        Raises AdapterRefused with everything found if it cannot be used on this base.
        """
        manifest, _ = read_manifest(path)
        problems = self.compare(manifest)[0]
        try:
            read_adapter(path, name, self.shapes, manifest.sha256)
        except AdapterRefused as refusal:
            problems += refusal.problems
        if problems:
            raise AdapterRefused(name, problems)
        return manifest
