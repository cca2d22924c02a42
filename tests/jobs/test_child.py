"""A job's process."""

from pathlib import Path

import pytest

from loraserve.jobs.child import Child


def test_a_job_trains_alone_whatever_its_server_is_a_part_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a child that takes itself for the second of four, and leaves it to the first one to speak."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    child = Child("job", ["loraserve", "train", "--epochs=many"], tmp_path / "log")
    while child.poll() is None:
        pass
    assert child.poll() == 2 and "'many' is not a valid integer" in child.failure()
