"""Services that get a run's losses: each library for real, without a network."""

import json
import struct
import sys

import pytest

from loraserve.errors import InvalidRequest
from loraserve.registry import Registry
from loraserve.train.reporters import REPORTERS, Reports, check_installed
from tests.train.test_train_command import arguments, run  # noqa: F401


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A folder of its own for all that the libraries write."""
    folder = tmp_path / "reports"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name, value in (("WANDB_MODE", "offline"), ("SWANLAB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    for name in ("HOME", "HF_HOME", "TRACKIO_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "SWANLAB_SAVE_DIR"):
        monkeypatch.setenv(name, str(folder))
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # the libraries' own
@pytest.mark.parametrize("name", REPORTERS)
def test_a_library_gets_every_loss(arguments, offline, tmp_path, name):  # noqa: F811
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'loraserve[{name}]'")
    result = run(*arguments, "--report-to", name, "--val-split", "0.2")
    assert result.exit_code == 0, result.stderr
    metrics = Registry(tmp_path / "adapters").get("robot").path / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    values = [record[key] for record in records for key in ("loss", "val_loss") if key in record]
    assert len(values) == 6 + 3  # steps, and validations
    written = b"".join(path.read_bytes() for path in offline.rglob("*") if path.is_file())
    forms = [(json.dumps(value).encode(), struct.pack("<f", value), struct.pack("<d", value)) for value in values]
    assert all(any(form in written for form in each) for each in forms)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_tensorboard_drops_the_steps_that_a_resumed_run_takes_again(offline):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'loraserve[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, losses in ((0, (4.0, 3.0, 2.0)), (1, (2.5,))):
        reports = Reports(["tensorboard"], name="robot", project="p", recipe={}, run_ids={}, step=done)
        for step, loss in enumerate(losses, start=done + 1):
            reports.add({"step": step, "loss": loss, "grad_norm": None})
        reports.close()
    events = EventAccumulator(str(offline / "runs" / "robot")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.0), (2, 2.5)]
    assert events.Tags()["scalars"] == ["loss"]


def test_a_resumed_run_is_the_same_run_of_its_service(offline, monkeypatch):
    given = []

    class Known:
        run_id = "abc"

        def log(self, record, step):
            given.append((record, step))

        def close(self):
            given.append("closed")

    monkeypatch.setitem(REPORTERS, "json", lambda start: (given.append(start.run_id), Known())[1])
    for ids in ({}, {"json": "abc"}):
        reports = Reports(["json"], name="robot", project="p", recipe={}, run_ids=ids, step=0)
        assert reports.run_ids == {"json": "abc"}
        reports.add({"step": 7, "loss": 1.5, "norm": None})
        reports.close()
    assert given == [None, ({"loss": 1.5}, 7), "closed", "abc", ({"loss": 1.5}, 7), "closed"]


def test_a_missing_library_is_told_before_training_with_its_command(arguments, monkeypatch, tmp_path):  # noqa: F811
    for name in REPORTERS:
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
        result = run(*arguments, "--report-to", name)
        assert result.exit_code == 2 and result.stderr.strip().endswith(f"pip install 'loraserve[{name}]'")
    assert "loraserve[wandb]" in run(*arguments, "--use-wandb").stderr
    assert not (tmp_path / "adapters").exists()
    with pytest.raises(InvalidRequest, match="report_to is one of wandb, swanlab, trackio, tensorboard"):
        check_installed(["mlflow"])


def test_a_service_that_does_not_start_ends_the_run_in_one_line(arguments, monkeypatch):  # noqa: F811
    def refuse(start):
        raise PermissionError("no API key")

    monkeypatch.setitem(REPORTERS, "tensorboard", refuse)
    monkeypatch.setattr("loraserve.train.reporters.check_installed", lambda names: None)
    monkeypatch.setitem(sys.modules, "tensorboard", sys)
    result = run(*arguments, "--report-to", "tensorboard")
    assert result.exit_code == 2 and "--report-to tensorboard did not start: no API key; log in" in result.stderr
