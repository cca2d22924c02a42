"""OpenMP's helpers belong to the engine's thread alone: more of them than cores would double the time of a step."""

import subprocess
import sys
from pathlib import Path

import pytest

from loraserve.kernels.threads import apart

COUNT = """
import os, time, torch
from loraserve import LLM, SamplingParams
before = len(os.listdir("/proc/self/task"))
with LLM(adapters_dir={adapters!r}) as llm:
    llm.chat([{{"role": "user", "content": "hello"}}], "pirate", SamplingParams(max_tokens=4))
    for _ in range(50):  # a thread's helpers end a moment after it
        more = len(os.listdir("/proc/self/task")) - before
        if more == 2:
            break
        time.sleep(0.1)
    print(more)
"""


def test_only_the_engine_has_helpers() -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("threads are counted as Linux shows them")
    script = COUNT.format(adapters=str(Path(__file__).parents[2] / "adapters"))
    command = ["env", "OMP_NUM_THREADS=2", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2", "the engine's thread and its helper, and nobody else's"


def test_apart_returns_and_raises_what_the_function_does() -> None:
    assert apart(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        apart(divmod, 7, 0)
