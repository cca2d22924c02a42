"""The queue of training jobs: each is checked and then trained by a process of its own, one after the other.

    validating_files → queued → running → succeeded, failed or cancelled

One thread looks after the processes. Everything it knows is on disk, in `.jobs` and `.files` of the adapters'
directory, so a server that is started again goes on where the last one ended, in whatever way: queued jobs stay queued,
and one that ran is resumed from its last saved state. A lock keeps two servers from training the same jobs. A run has
an adapters directory of its own; what it has made is published from there by this process, and only if no adapter has
its name, so a job never replaces one it does not own.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock

from loraserve.errors import AdapterRefused, Conflict, LoraserveError, QueueFull
from loraserve.jobs.child import Child, end_orphan
from loraserve.jobs.command import train_arguments
from loraserve.jobs.files import FileNotFound, FileStore
from loraserve.jobs.job import Job, JobStore
from loraserve.jobs.progress import Progress
from loraserve.lora.files import storage_errors
from loraserve.registry import Record, Registry
from loraserve.train.check import PAIRS
from loraserve.train.checkpoint import METRICS
from loraserve.train.trainer import WORK_FOLDER

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
RETRY_SECONDS = 5.0
"""After a look that failed, for instance because the disk is full."""
MAX_WAITING = 16
"""Unfinished jobs, the running one included."""
COME_BACK_SECONDS = 60
RESULTS = "fine-tune-results"


class JobQueue:
    """Trains jobs while it is entered as a context.

    Args:
        registry: where the adapters go; checked against the base that is trained on.
        base_options: how `loraserve train` is told which base that is.
    """

    def __init__(self, registry: Registry, base_options: Sequence[str]) -> None:
        self.files = FileStore(registry.root / ".files")
        self.jobs = JobStore(registry.root / ".jobs")
        self._registry, self._base_options = registry, tuple(base_options)
        self._changing = threading.RLock()
        self._unfinished: dict[str, Job] = {}
        self._check: Child | None = None
        self._run: tuple[Child, Progress] | None = None
        self._owned: filelock.FileLock | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="loraserve-jobs", daemon=True)

    def __enter__(self) -> "JobQueue":
        """Go on with the jobs that there are; without any, nothing is written until the first comes."""
        if self.jobs.root.is_dir():
            try:
                self._own()
            except LoraserveError as error:
                log.warning("no training by this server for now: %s", error)
        return self

    def __exit__(self, *error: object) -> None:
        """Stop; a run saves its state, and the next server goes on with it."""
        self._closing.set()
        if self._owned is None:
            return
        self._thread.join()
        if self._check is not None:
            self._check.kill()
        if self._run is not None:
            self._run[0].stop()
        self._owned.release()

    def add(self, job: Job) -> None:
        """Take a job into the queue.

        Raises:
            Conflict: an adapter or another job has its name; or another server trains in this directory.
            QueueFull: MAX_WAITING jobs are unfinished.
            StorageError: it could not be written.
        """
        with self._changing:
            self._own()
            if self._is_taken(job.name):
                raise Conflict(
                    f"an adapter named {job.name!r} exists already, and training would replace it; "
                    "remove or rename it, or choose another suffix",
                    param="suffix",
                )
            if any(other.name == job.name for other in self._unfinished.values()):
                raise Conflict(f"another job is making {job.name!r}; choose another suffix", param="suffix")
            if len(self._unfinished) >= MAX_WAITING:
                raise QueueFull(f"{MAX_WAITING} jobs are unfinished; try again later", retry_after=COME_BACK_SECONDS)
            self.jobs.save(job)
            self.jobs.log(job, f"Created job {job.id}: adapter {job.name!r} from {job.training_file}")
            self._unfinished[job.id] = job

    def cancel(self, job_id: str) -> Job:
        """End a job now. Raises JobNotFound, and Conflict if it has ended already."""
        with self._changing:
            self.jobs.get(job_id)
            self._own()
            job = self._unfinished.get(job_id)
            if job is None:
                raise Conflict(f"job {job_id} has ended already, as {self.jobs.get(job_id).status}")
            self._kill(job)
            return self._end(job, "cancelled", "The job was cancelled")

    def reader_of(self, file_id: str) -> str | None:
        """The id of an unfinished job that needs a file."""
        with self._changing:
            return next((job.id for job in self._unfinished.values() if file_id in job.files), None)

    def _own(self) -> None:
        """Become the one server that trains in this directory, and take over what there is to do."""
        if self._owned is not None:
            return
        with storage_errors(f"train in {self._registry.root}"):
            self.jobs.root.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.jobs.root / ".lock", timeout=0)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise Conflict(f"another server trains in {self._registry.root}; send it the job") from None
        unfinished = [job for job in self.jobs.iterate() if not job.ended]
        for job in reversed(unfinished):
            self._unfinished[job.id] = job
            if job.base_fingerprint != self._registry.fingerprint:
                self._fail(job, "base_changed", f"the server now has another base than {job.model!r}", "model")
            elif job.status == "running":
                self._set(replace(job, status="queued"), "The server was started again")
        self._owned = lock
        self._thread.start()

    def _look_after(self) -> None:
        pause = LOOK_SECONDS
        while not self._closing.wait(pause):
            pause = LOOK_SECONDS
            try:
                with self._changing:
                    self._look()
            except Exception:
                log.exception("looking after training jobs failed; trying again in %g s", RETRY_SECONDS)
                pause = RETRY_SECONDS

    def _look(self) -> None:
        if self._check is not None and self._check.poll() is not None:
            self._checked(self._check)
            self._check = None
        if self._run is not None:
            self._follow(*self._run)
        if self._check is None and (job := self._next("validating_files")):
            self._begin(job, self._validate)
        if self._run is None and (job := self._next("queued")):
            self._begin(job, self._train)

    def _begin(self, job: Job, action: Callable[[Job], None]) -> None:
        try:
            action(job)
        except FileNotFound as error:  # removed by hand
            self._fail(job, "file_not_found", str(error), "training_file")

    def _next(self, status: str) -> Job | None:
        return next((job for job in self._unfinished.values() if job.status == status), None)

    def _validate(self, job: Job) -> None:
        files = [str(self.files.path(file_id)) for file_id in job.files]
        arguments = ["loraserve.train.check", *([PAIRS] if job.objective == "dpo" else []), *files]
        self._check = Child(job.id, arguments, self.jobs.folder(job.id) / "log")

    def _checked(self, child: Child) -> None:
        job = self._unfinished[child.job_id]
        if child.poll() == 0:
            self._set(replace(job, status="queued"), "Files validated, the job is queued")
            return
        reason = child.failure()
        param = "validation_file" if job.training_file not in reason else "training_file"
        self._fail(job, f"invalid_{param}", reason, param)

    def _train(self, job: Job) -> None:
        """Begin to train, or go on."""
        if job.process is not None:
            end_orphan(job.process)
            if made := self._made(job):
                self._publish(job, made)
                return
        if self._is_taken(job.name):
            self._fail_as_taken(job)
            return
        arguments = train_arguments(job, self.files, self._work(job), self._base_options)
        told = [event["data"] for event in self.jobs.events(job.id) if event["data"]]
        message = "Training started" if job.process is None else "Training goes on from the last saved state"
        child = Child(job.id, arguments, self.jobs.folder(job.id) / "log")
        self._run = child, Progress(self._work(job) / WORK_FOLDER / job.name / METRICS, told)
        self._unfinished[job.id] = job = replace(job, status="running", process=child.identity)
        self._set(job, message)

    def _follow(self, child: Child, progress: Progress) -> None:
        """Tell what is new of the run, and end its job when it is over."""
        job, status = self._unfinished[child.job_id], child.poll()
        self._tell(job, progress)
        if status is None:
            return
        if made := self._made(job):
            progress.path = made.path / METRICS  # where the last lines are now
            self._tell(job, progress)
            self._publish(job, made)
        else:
            self._fail(job, "training_failed", child.failure(), None)
        self._run = None

    def _tell(self, job: Job, progress: Progress) -> None:
        for message, data in progress.news():
            self.jobs.log(job, message, data=data)

    def _kill(self, job: Job) -> None:
        """End a job's process, if it has one."""
        if self._check is not None and self._check.job_id == job.id:
            self._check.kill()
            self._check = None
        if self._run is not None and self._run[0].job_id == job.id:
            self._run[0].kill()
            self._run = None
        elif job.process is not None:
            end_orphan(job.process)

    def _made(self, job: Job) -> Record | None:
        """The adapter that a job's process has made, if it came that far."""
        try:
            return Registry(self._work(job)).get(job.name)
        except LoraserveError:
            return None

    def _publish(self, job: Job, made: Record) -> None:
        """End a job with its adapter in the registry, unless the name was taken meanwhile."""
        if not self._is_published(job, made):
            if self._is_taken(job.name):
                self._fail_as_taken(job)
                return
            try:
                self._registry.import_(made.path, job.name)
            except AdapterRefused as error:
                self._fail(job, "training_failed", str(error), None)
                return
        with open(made.path / METRICS, "rb") as file:
            results = self.files.add(file, f"{job.name}-metrics.jsonl", RESULTS)
        tokens = made.manifest.metrics.get("tokens")
        message = f"Adapter {job.name!r} is published and answers as model={job.name!r}"
        self._end(job, "succeeded", message, trained_tokens=tokens, result_files=(results.id,))

    def _is_published(self, job: Job, made: Record) -> bool:
        """Whether a server published it and ended before it could say so."""
        try:
            return self._registry.get(job.name).manifest.sha256 == made.manifest.sha256
        except LoraserveError:
            return False

    def _is_taken(self, name: str) -> bool:
        return os.path.lexists(self._registry.root / name)

    def _fail_as_taken(self, job: Job) -> None:
        reason = f"an adapter named {job.name!r} was made meanwhile, and this one would replace it"
        self._fail(job, "name_taken", reason, "suffix")

    def _fail(self, job: Job, code: str, message: str, param: str | None) -> None:
        error = {"code": code, "message": message, "param": param}
        self._end(job, "failed", message, level="error", error=error)

    def _end(self, job: Job, status: str, message: str, *, level: str = "info", **changes: Any) -> Job:
        job = replace(job, status=status, finished_at=int(time.time()), **changes)
        self._set(job, message, level=level)
        shutil.rmtree(self._work(job), ignore_errors=True)
        return job

    def _work(self, job: Job) -> Path:
        """The run's own adapters directory."""
        return self.jobs.folder(job.id) / "run"

    def _set(self, job: Job, message: str, *, level: str = "info") -> None:
        """Write a job's new state, its event first: whoever sees that a job has ended sees all of its events."""
        self.jobs.log(job, message, level=level)
        self.jobs.save(job)
        self._unfinished[job.id] = job
        if job.ended:
            del self._unfinished[job.id]
