"""Opening an adapter's files without trusting them: regular files only, and a safetensors header before its tensors.

Files are read, never mapped: a file that shrinks under a mapping kills the process. What the header claims is compared
with the size of the file before anything is allocated for it.
Source: the safetensors format, 8 bytes little-endian N, N bytes of JSON, then the tensors without gaps.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from loraserve.errors import AdapterRefused

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
_MAX_HEADER = 16 << 20


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes, symlinks not followed. Raises AdapterRefused."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise AdapterRefused("", [f"{path.name} is too large ({size} bytes)"])
        return file.read()


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Read a safetensors header.

    Returns:
        {key: {"dtype", "shape", "data_offsets"}} and the size of the file in bytes.

    Raises:
        AdapterRefused: not a safetensors file, cut short, a pickle under its name, or only a pickle beside it.
    """
    if not os.path.lexists(path) and os.path.lexists(path.with_name(PICKLE_FILE)):
        advice = f"convert it with PEFT's save_pretrained to {path.name}"
        raise AdapterRefused("", [f"{PICKLE_FILE} is a pickle, which can run code when opened: {advice}"])
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
            raise AdapterRefused("", [f"{path.name} is a pickle under a false name, which can run code when opened"])
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
            fault = f"its header claims {length} bytes, the file has {size}" if len(start) == 8 else f"{size} bytes"
            raise AdapterRefused("", [f"{path.name} is not a safetensors file, or cut short ({fault})"])
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            header = None
    problem = _find_problem(header, size - 8 - length)
    if problem:
        raise AdapterRefused("", [f"{path.name}: {problem}"])
    assert isinstance(header, dict)
    header.pop("__metadata__", None)
    return header, size


def _open(path: Path) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise AdapterRefused("", [f"{path.name} is missing"]) from None
    except OSError as error:
        reason = "it is a symlink" if path.is_symlink() else error.strerror
        raise AdapterRefused("", [f"{path.name} cannot be opened ({reason})"]) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterRefused("", [f"{path.name} is not a file"])
    return open(descriptor, "rb")


def _find_problem(header: object, available: int) -> str | None:
    if not isinstance(header, dict):
        return "its header is not a JSON object"
    end = 0
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            shape, (begin, stop) = entry["shape"], entry["data_offsets"]
            sound = isinstance(entry["dtype"], str) and all(type(n) is int and n >= 0 for n in [*shape, begin, stop])
        except (TypeError, KeyError, ValueError):
            sound = False
        if not sound:
            return f"its header's entry for {key!r} is not of the format"
        end = max(end, stop)
    if end != available:
        return f"cut short or damaged: its header describes {end} bytes of tensors, the file has {available}"
    return None
