"""What a training job is, and its folder `<id>/`:

job.json        the job, replaced atomically
events.jsonl    what happened, one JSON object per line
log             what its process wrote
run/            the unfinished run's state, as `loraserve train` keeps it; gone when the job has ended
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraserve.errors import NotFound
from loraserve.jobs.ids import is_id, new_id
from loraserve.lora.files import storage_errors, write_file

PREFIX, EVENT = "ftjob", "ftevent"
ENDED = ("succeeded", "failed", "cancelled")


class JobNotFound(NotFound):
    code = "job_not_found"
    kind = "fine-tuning job"


@dataclass(frozen=True)
class Job:
    """One training job; status and field names are OpenAI's."""

    id: str
    created_at: int
    """Seconds since 1970."""
    model: str
    base_fingerprint: str
    name: str
    """Of the adapter that it makes."""
    suffix: str | None
    training_file: str
    validation_file: str | None
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    seed: int
    rank: int | None = None
    alpha: float | None = None
    targets: str | list[str] | None = None
    rslora: bool = False
    dora: bool = False
    lora_plus_ratio: float | None = None
    val_split: float | None = None
    objective: str = "sft"
    """As `loraserve train` has it."""
    beta: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    status: str = "validating_files"
    """validating_files, queued, running, succeeded, failed or cancelled."""
    process: Sequence[float] | None = None
    """Pid and start time of the process that trains it."""
    finished_at: int | None = None
    error: Mapping[str, str | None] | None = None
    """{"code", "message", "param"}"""
    trained_tokens: int | None = None
    result_files: Sequence[str] = ()

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def files(self) -> list[str]:
        """The ids of the files it reads."""
        return [self.training_file, *([self.validation_file] if self.validation_file else [])]


class JobStore:
    """Jobs by id under `root`, which need not exist yet. One process writes, any number read."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, job_id: str) -> Path:
        return self.root / job_id

    def get(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        if is_id(PREFIX, job_id):
            with suppress(OSError, ValueError, TypeError):
                return Job(**json.loads((self.folder(job_id) / "job.json").read_bytes()))
        raise JobNotFound(job_id)

    def iterate(self) -> Iterator[Job]:
        """All jobs, the newest first."""
        for path in sorted(self.root.glob(f"{PREFIX}-*"), reverse=True):
            with suppress(JobNotFound):
                yield self.get(path.name)

    def save(self, job: Job) -> None:
        """Raises StorageError; the job on disk is then what it was."""
        folder = self.folder(job.id)
        with storage_errors(f"save job {job.id} in {self.root}"):
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / "job.json", json.dumps(dataclasses.asdict(job)).encode())

    def log(self, job: Job, message: str, *, level: str = "info", data: Mapping[str, Any] | None = None) -> None:
        """Add an event. Raises StorageError."""
        event = {
            "id": new_id(EVENT),
            "object": "fine_tuning.job.event",
            "created_at": int(time.time()),
            "level": level,
            "message": message,
            "type": "message" if data is None else "metrics",
            "data": data,
        }
        with (
            storage_errors(f"write the events of job {job.id}"),
            open(self.folder(job.id) / "events.jsonl", "ab") as file,
        ):
            file.write(b"\n" + json.dumps(event).encode())  # the line break first: a crash may have torn the last line

    def events(self, job_id: str) -> list[dict[str, Any]]:
        """The events of a job, the oldest first."""
        try:
            lines = (self.folder(job_id) / "events.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            with suppress(ValueError):  # torn by a crash
                found.append(json.loads(line))
        return found
