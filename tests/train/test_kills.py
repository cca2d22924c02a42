"""Runs that end at any moment, by SIGKILL, lose little and change nothing: not the adapter that is there, not the next."""

import multiprocessing
import os
import random
import re
import signal
import time

import pytest
import torch

from loraserve.cli.main import main
from loraserve.registry import Registry
from tests.train.test_train_command import arguments, run  # noqa: F401

INTERVAL, STEPS = 5, 60
FORKS = multiprocessing.get_context("forkserver")
"""Its processes start with torch imported, so that thirty of them take no minute."""


def command(line, log):
    """`loraserve train` as a process of its own, whose output goes to a file."""
    torch.set_num_threads(1)
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(["train", *line])


@pytest.fixture
def start(tmp_path):
    FORKS.set_forkserver_preload(["loraserve.train.trainer", "matplotlib.figure", "tests.train.test_kills"])
    processes = []

    def begin(line):
        log = tmp_path / f"log-{len(processes)}"
        log.touch()
        processes.append(FORKS.Process(target=command, args=(line, log)))
        processes[-1].start()
        return processes[-1], log

    yield begin
    for process in processes:
        process.kill()
        process.join()


def weights_of(registry):
    """The bytes of the published weights, once the registry has read and checked all of them."""
    assert not registry.verify(), registry.verify()
    registry.load("robot")
    return (registry.get("robot").path / "adapter_model.safetensors").read_bytes()


def last_step(log, before):
    """The step a run has come to, which is not more than an interval behind what the one before it had."""
    resumed = re.search(r"resuming after step (\d+)", log)
    first = int(resumed[1]) if resumed else 0
    if resumed or "starting from the beginning" in log:
        assert first >= before - INTERVAL
    return max([first, *map(int, re.findall(r"step (\d+)/\d+  loss", log))]) if log else before


MODES = {
    "alone": "",
    "DoRA": "--dora",
    "int8": "--quantize int8",
    "a set": "--name robot --data {data} --name second",
    "a sweep": "--lr-sweep 1e-3,3e-3",
}


@pytest.mark.parametrize(
    ("mode", "kills"),
    [
        ("alone", 4),
        pytest.param("alone", 30, marks=pytest.mark.slow),
        *(pytest.param(mode, 8, marks=pytest.mark.slow) for mode in list(MODES)[1:]),
    ],
)
def test_a_run_killed_at_any_moment_loses_a_save_interval_at_most(start, arguments, tmp_path, mode, kills):  # noqa: F811
    """Catches a checkpoint or version that is half written, steps counted twice, and a lock that outlives its process."""
    settings = [*arguments, "--epochs", "15", "--log-interval", "1", "--save-interval", str(INTERVAL)]
    settings += ["--val-split", "0.1", "--publish", "always"]
    settings += MODES[mode].format(data=arguments[arguments.index("--data") + 1]).split()
    assert run(*settings, "--adapters-dir", tmp_path / "whole").exit_code == 0
    expected = weights_of(Registry(tmp_path / "whole"))
    registry = Registry(tmp_path / "adapters")
    assert run(*settings, "--epochs", "1").exit_code == 0
    current = weights_of(registry)
    assert current != expected

    rng, reached, killed = random.Random(0), 0, 0
    while killed < kills:
        process, log = start([*settings, "--resume"])
        wanted = rng.choice([0, rng.randint(reached, STEPS), rng.randint(reached, STEPS), STEPS])
        while process.is_alive() and wanted > 0 and last_step(log.read_text(), reached) < wanted:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02 if 0 < wanted < STEPS else 0.6))  # starting and publishing take longer
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), log.read_text()
        killed += process.exitcode != 0
        reached = last_step(log.read_text(), reached)
        weights = weights_of(registry)
        assert weights in (current, expected)
        if weights == expected:
            assert reached == STEPS or current == expected
            current = expected
        checkpoint = tmp_path / "adapters" / ".training" / "robot" / "checkpoint.pt"
        if not checkpoint.exists():  # the next is a run of its own
            assert reached <= INTERVAL or current == expected
            reached = 0
    assert run(*settings, "--resume").exit_code == 0
    assert weights_of(registry) == expected
    assert all(path.suffix == ".lock" for path in (tmp_path / "adapters" / ".training").iterdir())
