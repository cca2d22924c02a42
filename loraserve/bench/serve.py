"""Throughput and latency of the engine beside transformers + PEFT: A B A B in one run, medians and ratios."""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from loraserve.bench.contestant import Case
from loraserve.bench.models import make_models
from loraserve.errors import LoraserveError

CASES = {
    "1 client, base": Case(1, 0),
    "16 clients, base": Case(16, 0),
    "1 client, one adapter": Case(1, 1),
    "16 clients, 8 adapters": Case(16, 8),
}
PEERS = {"peft": ("transformers", "peft")}


def run(*, repeats: int = 5, dtype: str = "bfloat16", peers: tuple[str, ...] = ("peft",), r: int = 8) -> dict[str, Any]:
    """Measure every case `repeats` times on loraserve and on each installed peer, in turn.

    Returns:
        `machine`, `dtype` and per case the medians of tokens/s, time to first token (ms) and peak memory (MB) of each
        contestant, and the ratio of loraserve's tokens/s to each peer's.
    """
    rivals = [peer for peer in peers if all(importlib.util.find_spec(module) for module in PEERS[peer])]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        base, adapters = make_models(Path(folder), 8, r)
        contestants = {name: stack.enter_context(_process(name, base, adapters, dtype)) for name in ["ours", *rivals]}
        table: dict[str, Any] = {}
        for title, case in CASES.items():
            samples: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
            for repeat in range(-1, repeats):  # the first is a warm-up
                for name, process in contestants.items():
                    figures = _ask(name, process, Case(**{**asdict(case), "seed": repeat + 1}))
                    if repeat >= 0:
                        samples[name].append(figures)
            table[title] = {name: _medians(rows) for name, rows in samples.items()}
            for rival in rivals:
                ours, theirs = table[title]["ours"]["tokens_per_s"], table[title][rival]["tokens_per_s"]
                table[title][f"ours/{rival}"] = round(ours / theirs, 2)
    return {"machine": machine(), "dtype": dtype, "repeats": repeats, "cases": table}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


@contextmanager
def _process(name: str, base: Path, adapters: Path, dtype: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", f"loraserve.bench.{name}", "--base", str(base), "--adapters", str(adapters)]
    with subprocess.Popen(
        [*command, "--dtype", dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            _pipe(process.stdin).close()
            process.wait()


def _ask(name: str, process: subprocess.Popen[str], case: Case) -> dict[str, Any]:
    print(json.dumps(asdict(case)), file=_pipe(process.stdin), flush=True)
    line = _pipe(process.stdout).readline()
    if not line:
        raise LoraserveError(
            f"the benchmark's process for {name!r} ended with code {process.wait()}; see its output above"
        )
    return json.loads(line)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    keys = ("tokens_per_s", "ttft_ms", "peak_rss_mb")
    return {key: round(statistics.median(row[key] for row in rows), 1) for key in keys}
