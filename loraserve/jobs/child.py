"""The process of a job: nicer than the server, deaf to its terminal, and its last words.

It has a session of its own, so Ctrl-C ends the server alone, which then stops it in order. It trains alone, even if the
server was started as one of several processes, as in a cluster.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from loraserve.lora.files import storage_errors
from loraserve.train.environment import outside_of_runs

NICENESS = 10
PATIENCE = 30.0
"""Seconds a run may take to save its state."""
ERROR = "error: "
"""How the command line begins the line that says why it failed."""


class Child:
    """`python -m` with `arguments`, started at once; what it prints is added to the file `log`.

    Raises StorageError if it cannot be started.
    """

    def __init__(self, job_id: str, arguments: Sequence[str], log: Path) -> None:
        self.job_id, self._log = job_id, log
        with storage_errors(f"start the process of job {job_id}"), open(log, "ab") as file:
            self._first = file.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, env=outside_of_runs(),
            )  # fmt: skip
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)

    @property
    def identity(self) -> tuple[int, float]:
        """Its pid and start time, by which a later server knows it."""
        return self._process.pid, psutil.Process(self._process.pid).create_time()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Let it save its state and end; kill it if that takes longer than PATIENCE."""
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()

    def failure(self) -> str:
        """Why it ended, in the words of its last error if there are any."""
        with open(self._log, "rb") as file:
            file.seek(self._first)
            lines = file.read().decode("utf-8", "replace").splitlines()
        errors = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
        if errors:
            return "; ".join(errors)
        status = self._process.returncode
        if status < 0:
            reason = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
            return f"the training process was ended by {signal.Signals(-status).name}{reason}"
        return f"the training process ended with status {status}; the server's folder {self._log.parent} has its log"


def end_orphan(identity: Sequence[float]) -> None:
    """Stop a process that outlived the server which started it, if it is still there."""
    pid, started = identity
    with suppress(psutil.Error):
        process = psutil.Process(int(pid))
        if process.create_time() != started:  # another process has the number now
            return
        process.terminate()
        try:
            process.wait(PATIENCE)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE)
