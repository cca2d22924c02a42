"""Adapters by name, in a directory: drop-in PEFT directories, atomic versioned publishing, import and export."""

from loraserve.registry.manifest import Manifest
from loraserve.registry.record import Record
from loraserve.registry.store import Registry
from loraserve.registry.verify import Problem

__all__ = ["Manifest", "Problem", "Record", "Registry"]
