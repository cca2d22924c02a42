"""A training file row by row: read once from front to back, and any row again by its place.

A file is JSON lines, or one JSON array whose items are rows. It may be larger than memory: no more than a row of it is
held at a time. Rows are bytes here; what they say is the business of `dialogue`.
"""

import hashlib
import mmap
import os
import re
import stat
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loraserve.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_SHOWN_REASONS = 12
MAX_SHOWN_LINES = 8
_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[][{},]', re.DOTALL)  # strings are matched to be passed over


class BadRow(Exception):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class Row:
    """The bytes of one row and where they are."""

    line: int
    """Counted from 1; of a JSON array the item."""
    offset: int
    """In bytes from the beginning of the file."""
    raw: bytes


class DataFile:
    """An open training file. It stays open as long as this object lives.

    Raises:
        DataError: it is missing, cannot be read, or is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(
                    f"{path} is not a file; rows are read more than once, so save them to one", param="data"
                )
            self.num_bytes = status.st_size
            self._state = self._stamp()
            with open(self._descriptor, "rb", closefd=False) as file:
                self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}", param="data") from None

    def rows(self) -> Iterator[Row]:
        """Every row that is not blank, in order.

        Raises:
            DataError: the file is changed meanwhile, or is a JSON array with a wrong end.
        """
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            is_array = file.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()[:1] == b"["
            if is_array:
                yield from _items(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ))
            else:
                file.seek(0)
                offset = 0
                for line, raw in enumerate(file, start=1):
                    if raw.removeprefix(BYTE_ORDER_MARK).strip():
                        yield Row(line, offset, raw)
                    offset += len(raw)
        self._check()

    def row(self, line: int, offset: int, length: int) -> Row:
        """Read one row again. Raises DataError if the file has changed since it was opened."""
        self._check()
        return Row(line, offset, os.pread(self._descriptor, length, offset))

    def _stamp(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def _check(self) -> None:
        if self._stamp() != self._state:
            raise DataError(f"{self.path} was changed while it was in use; start again", param="data")


def _items(data: mmap.mmap) -> Iterator[Row]:
    """The items of a JSON array, cut at its outermost commas. Raises DataError if the array itself is broken."""
    item = depth = start = 0
    for match in _STRUCTURE.finditer(data):
        mark = data[match.start()]
        if mark in b"[{":
            depth += 1
            start = match.end() if depth == 1 else start
        elif mark in b"]},":
            ends_item = depth == 1
            depth -= mark != ord(",")
            if not ends_item:
                continue
            raw = data[start : match.start()]
            if raw.strip() or item or depth:  # an array of nothing has no item
                item += 1
                yield Row(item, start, raw)
            start = match.end()
            if depth == 0:
                break
    if depth:
        raise DataError(f"the JSON array does not end: a quote or bracket is missing after item {item}", param="data")
    if data[start : start + 4096].strip():
        raise DataError(f"the JSON array ends after item {item}, and more follows it", param="data")


@dataclass
class Reason:
    """How many rows cannot be used for one reason, and the first of their lines."""

    rows: int = 0
    lines: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.lines))
        more = f" and {self.rows - len(self.lines):,} more" if self.rows > len(self.lines) else ""
        return f"{'line' if self.rows == 1 else 'lines'} {shown}{more}"


@dataclass
class Rejections:
    """What is wrong with a file, so that one message can say all of it. Takes no more room however bad the file is."""

    rows: int = 0
    reasons: dict[str, Reason] = field(default_factory=dict)
    others: int = 0
    """Rows whose reasons are beyond the first twelve kinds."""

    def add(self, line: int, why: str) -> None:
        self.rows += 1
        if why not in self.reasons and len(self.reasons) == MAX_SHOWN_REASONS:
            self.others += 1
            return
        reason = self.reasons.setdefault(why, Reason())
        reason.rows += 1
        if len(reason.lines) < MAX_SHOWN_LINES:
            reason.lines.append(line)

    def __str__(self) -> str:
        parts = [f"{reason}: {why}" for why, reason in self.reasons.items()]
        return "; ".join([*parts, *([f"and {self.others:,} more with other problems"] if self.others else [])])
