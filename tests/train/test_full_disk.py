"""A disk that is full at any write of a run: an error that says where and what to do, nothing lost, and a resume."""

import contextlib
import json
import resource

import pytest

from loraserve.registry import Registry
from tests.train.test_kills import weights_of
from tests.train.test_train_command import arguments, run  # noqa: F401


@contextlib.contextmanager
def files_up_to(num_bytes):
    """Let no write go beyond `num_bytes` of a file, as on a disk that has no more: the system's error is EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def line(arguments, dialogue_file):  # noqa: F811
    """A run whose files, in the order in which it writes them, become larger: so a limit meets each of them."""
    with dialogue_file.open("a") as file:
        file.write(json.dumps({"text": "x" * 2500}) + "\n")
    extra = "--on-bad-row skip --targets down_proj --rank 1 --epochs 8 --val-split 0.1 --publish always --resume"
    return [*arguments, *extra.split()]


def test_a_full_disk_is_told_at_every_write_and_a_run_goes_on_when_there_is_room(line, tmp_path):
    assert run(*line, "--adapters-dir", tmp_path / "whole").exit_code == 0
    expected = weights_of(Registry(tmp_path / "whole"))
    registry = Registry(tmp_path / "adapters")
    assert run(*line, "--epochs", "1").exit_code == 0
    old = weights_of(registry)
    assert old != expected
    folder = tmp_path / "adapters" / ".training" / "robot"
    checkpoint = folder / "checkpoint.pt"

    failures, limit = set(), 0
    while True:
        with files_up_to(limit):
            result = run(*line)
        if result.exit_code == 0:
            break
        error = result.stderr.strip().splitlines()[-1]
        assert result.exit_code == 1 and error.startswith("error: cannot "), result.output
        assert "File too large" in error and "free some space there" in error and str(folder.parent.parent) in error
        assert weights_of(registry) == old
        assert ("with --resume to go on" in error) == checkpoint.exists()
        failures.add(
            next(what for what in ("keep the tokens", "metrics.jsonl", "save the run", "publish") if what in error)
        )
        limit = limit * 3 // 2 + 1000
    assert failures == {"keep the tokens", "metrics.jsonl", "save the run", "publish"}
    assert "resuming after step" in result.stderr and weights_of(registry) == expected
    assert not checkpoint.exists()


def test_the_last_checkpoint_outlives_one_that_cannot_be_written(line, tmp_path):
    checkpoint = tmp_path / "adapters" / ".training" / "robot" / "checkpoint.pt"
    with files_up_to(14_000):
        result = run(*line)
    assert result.exit_code == 1 and "cannot publish" in result.stderr, result.stderr
    before = checkpoint.read_bytes()
    with files_up_to(len(before) - 1):
        result = run(*line)
    assert result.exit_code == 1 and "cannot save the run in" in result.stderr
    assert "run the same command with --resume to go on" in result.stderr
    assert [path.read_bytes() for path in checkpoint.parent.glob("*checkpoint.pt*")] == [before]


def test_rejected_rows_that_cannot_be_written_end_the_run_with_nothing_left(line, tmp_path):
    with files_up_to(2400):
        result = run(*line)
    assert result.exit_code == 1 and "cannot keep the tokens of robot.jsonl in" in result.stderr
    assert "give another place with --save-dir" in result.stderr
    assert list((tmp_path / "adapters" / ".training" / "robot").iterdir()) == []
