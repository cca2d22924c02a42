"""Writing files so that a crash at any byte leaves the old content or the new, and never half of either.

New content goes to a scratch file beside the target, is synced, and takes the target's name by `os.replace`. Scratch
names begin with a dot, so no reader mistakes one for a file of an adapter.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraserve.errors import StorageError

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space there"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place where you may write"),
}
"""By the system's error."""


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Turn an OSError within into a StorageError that says what could not be done, and what helps.

    Args:
        action: as in 'publish adapter x'; of nested ones the outermost is told, for that is what the user asked for.
    """
    try:
        yield
    except (OSError, StorageError) as failure:
        error = failure if isinstance(failure, OSError) else failure.__cause__
        if not isinstance(error, OSError):
            raise
        where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
        what = f"cannot {action}: {error.strerror or error}{where}; nothing was changed"
        raise StorageError("; ".join(filter(None, (what, REMEDIES.get(error.errno or 0))))) from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which holds its old content or all of the new at any moment. Raises OSError."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(scratch, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content to `target` with the guarantees of `write_file`, however large. Raises OSError."""
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(source, "rb") as reader, open(scratch, "xb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
            writer.flush()
            os.fsync(writer.fileno())
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)
