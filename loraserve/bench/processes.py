"""Contestants as processes: started, asked one case at a time, their memory watched from outside, and ended.

What one prints beside its figures goes to a log, whose end is part of the error if it fails.
"""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from loraserve.bench.contestant import Case
from loraserve.bench.contestants import Contestant, Field, Peers
from loraserve.errors import LoraserveError

WATCH_EVERY = 0.2
"""Seconds between two looks at the memory of a process and its children."""
PATIENCE = 30.0
"""Seconds that a contestant has to end when told to."""


class Process:
    """A running contestant.

    Raises:
        LoraserveError: it ended instead of answering; the message names it and has its last lines.
    """

    def __init__(self, name: str, popen: "subprocess.Popen[str]", log: Path) -> None:
        self.name = name
        self._popen = popen
        self._log = log
        self._peak = 0
        hello = self._read()
        self.version: str = hello["version"]
        self._pid: int = hello["pid"]

    def ask(self, case: Case) -> dict[str, Any]:
        """Run a case; return its figures and `peak_rss_mb`, the most memory that the process tree held meanwhile."""
        assert self._popen.stdin
        with _watched(self._pid) as peak:
            with suppress(BrokenPipeError):  # it has ended, as reading will find
                print(json.dumps(asdict(case)), file=self._popen.stdin, flush=True)
            figures = self._read()
        return figures | {"peak_rss_mb": peak[0] / 2**20}

    def _read(self) -> dict[str, Any]:
        assert self._popen.stdout
        line = self._popen.stdout.readline()
        if not line:
            code = self._popen.wait()
            last = "\n".join(self._log.read_text("utf-8", "replace").strip().splitlines()[-12:])
            raise LoraserveError(f"contestant {self.name!r} ended with code {code}; its last words:\n{last}")
        return json.loads(line)


@contextmanager
def started(contestant: Contestant, field: Field, peers: Peers, logs: Path) -> Iterator[Process]:
    """Run a contestant for the duration of a `with` block; it is ready when the block begins."""
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{contestant.name}-{field.num_adapters}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            contestant.command(field, peers),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **contestant.environment(peers)},
        ) as popen,
    ):
        try:
            yield Process(contestant.name, popen, log)
        finally:
            _end(popen)


def _end(popen: "subprocess.Popen[str]") -> None:
    """Close its stdin, which tells it to end; end it and all it started if it does not."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(popen.pid).children(recursive=True)
    assert popen.stdin
    with suppress(BrokenPipeError):
        popen.stdin.close()
    try:
        popen.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        popen.kill()


@contextmanager
def _watched(pid: int) -> Iterator[list[int]]:
    """Hand out a list of one number: the most bytes that `pid` and its children were seen to hold."""
    peak = [_resident(pid)]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_EVERY):
            peak[0] = max(peak[0], _resident(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], _resident(pid))


def _resident(pid: int) -> int:
    """Bytes of a process and all below it; memory that they share counts for each."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total
