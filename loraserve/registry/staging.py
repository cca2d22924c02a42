"""The writers' side of the registry's directory: one lock for all processes, and a place to build what is not ready."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from loraserve.errors import Conflict
from loraserve.lora.files import storage_errors

PATIENCE = 60.0
"""Seconds a writer waits for another."""


class Staging:
    """`.lock` and `.staging` under the registry's root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder = root / ".staging"

    @contextmanager
    def locked(self, action: str, patience: float = PATIENCE) -> Iterator[None]:
        """Be the only writer in any process and thread; whatever an earlier one left behind is removed first.

        Args:
            action: for messages, as in 'publish adapter x'.
            patience: seconds to wait for another writer.

        Raises:
            Conflict: another writer held the lock for longer.
            StorageError: any OSError within.
        """
        with storage_errors(f"{action} in {self.root}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.root / ".lock", timeout=patience)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise Conflict(f"cannot {action}: another process is writing to {self.root}; try again") from None
            try:
                self.clean()
                yield
            finally:
                lock.release()

    def place(self, name: str) -> Path:
        """A free path for a directory that will be renamed into place, or removed."""
        return self._folder / f"{name}.{uuid.uuid4().hex}"

    def clean(self) -> None:
        """Remove everything unfinished; with the lock held it belongs to nobody."""
        for entry in os.scandir(self._folder):
            shutil.rmtree(entry.path, ignore_errors=True)
