"""Reading an adapter's weights again without checking again what was found sound.

Hash and values are checked when files are first read. As long as nobody writes to them, later loads only read them.
"""

import os
import time
from pathlib import Path

from loraserve.lora.adapter import Adapter, Shapes
from loraserve.lora.header import WEIGHTS_FILE
from loraserve.lora.peft import read_adapter
from loraserve.registry.record import Record

SETTLED = 10**9
"""Nanoseconds since the last change of a file until its times are trusted to tell of the next one."""

Times = tuple[int, int, int, int]


class SoundFiles:
    """What this process has found sound, by adapter."""

    def __init__(self) -> None:
        self._known: dict[str, object] = {}

    def read(self, record: Record, shapes: Shapes | None) -> Adapter | None:
        """Read the weights of a version; None if the file changed meanwhile, so that they prove nothing.

        Raises:
            AdapterRefused: see `read_adapter`.
        """
        before = _times_of(record.path / WEIGHTS_FILE)
        files = (record.signature, record.path, before)
        trusted = before is not None and self._known.get(record.name) == files
        adapter, _ = read_adapter(record.path, record.name, shapes, record.manifest.sha256, trusted=trusted)
        unchanged = before == _times_of(record.path / WEIGHTS_FILE)
        if unchanged and before is not None and time.time_ns() - max(before[2:]) > SETTLED:
            self._known[record.name] = files
        return adapter if unchanged or not trusted else None


def _times_of(path: Path) -> Times | None:
    """inode, size, mtime, and ctime for whoever restores that; None where there is no file."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
