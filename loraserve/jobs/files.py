"""Uploaded training files and the metrics of finished jobs, in one folder:

    file-<id>.jsonl     the content, as it came
    file-<id>.json      name, size and purpose, written last: a file is there when this is

What a client calls its file is never part of a path.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from loraserve.errors import NotFound
from loraserve.jobs.ids import is_id, new_id
from loraserve.lora.files import storage_errors, write_file

PREFIX = "file"
LONGEST_NAME = 255


class FileNotFound(NotFound):
    code = "file_not_found"
    kind = "file"


@dataclass(frozen=True)
class StoredFile:
    """What is known of a file. Field names are OpenAI's."""

    id: str
    bytes: int
    created_at: int
    """Seconds since 1970."""
    filename: str
    """What the client calls it."""
    purpose: str


class FileStore:
    """Files by id under `root`, which need not exist yet; any number of processes may use it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, content: IO[bytes], filename: str, purpose: str) -> StoredFile:
        """Store what `content` holds. Raises StorageError, and then nothing is left of it."""
        file_id = new_id(PREFIX)
        path, scratch = self._content(file_id), self.root / f".{file_id}"
        with storage_errors(f"store {filename!r} in {self.root}"):
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                with open(scratch, "xb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
                    size = file.tell()
                os.replace(scratch, path)
                stored = StoredFile(file_id, size, int(time.time()), plain_name(filename), purpose)
                write_file(self._facts(file_id), json.dumps(asdict(stored)).encode())
            except BaseException:
                scratch.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise
        return stored

    def get(self, file_id: str, *, param: str | None = None) -> StoredFile:
        """Raises FileNotFound."""
        if is_id(PREFIX, file_id):
            with suppress(OSError, ValueError, TypeError):
                return StoredFile(**json.loads(self._facts(file_id).read_bytes()))
        raise FileNotFound(file_id, param=param)

    def path(self, file_id: str) -> Path:
        """Where the content of a file lies. Raises FileNotFound."""
        return self._content(self.get(file_id).id)

    def iterate(self) -> Iterator[str]:
        """The ids of all files, the newest first."""
        found = (path.name.removesuffix(".json") for path in self.root.glob(f"{PREFIX}-*.json"))
        yield from sorted((file_id for file_id in found if is_id(PREFIX, file_id)), reverse=True)

    def remove(self, file_id: str) -> None:
        """Raises FileNotFound."""
        self.get(file_id)
        with storage_errors(f"remove {file_id} from {self.root}"):
            self._facts(file_id).unlink(missing_ok=True)
            self._content(file_id).unlink(missing_ok=True)

    def _facts(self, file_id: str) -> Path:
        return self.root / f"{file_id}.json"

    def _content(self, file_id: str) -> Path:
        return self.root / f"{file_id}.jsonl"


def plain_name(filename: str) -> str:
    """The last part of a client's path, in printable characters."""
    last = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(c if c.isprintable() else "_" for c in last)[:LONGEST_NAME] or "file"
