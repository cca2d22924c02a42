import json
from pathlib import Path
from typing import Any

from loraserve.jobs.progress import Progress


def write(path: Path, records: list[dict[str, Any]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


def losses(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1 / step} for step in steps]


def told(progress: Progress) -> list[int]:
    return [data["step"] for _, data in progress.news()]


def test_a_line_is_told_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    progress = Progress(path, [])
    assert told(progress) == [], "there is no file yet"
    write(path, losses(1, 2), tail='{"step": 3, "lo')
    assert told(progress) == [1, 2]
    write(path, losses(1, 2, 3))
    assert told(progress) == [3]
    assert told(progress) == []


def test_long_runs_are_told_in_ever_larger_steps(tmp_path: Path) -> None:
    write(tmp_path / "m", losses(*range(1, 10_001)))
    steps = told(Progress(tmp_path / "m", []))
    assert steps == [*range(1, 100), *range(100, 1000, 10), *range(1000, 10_000, 100), 10_000]


def test_every_validation_is_told_beside_the_step_of_its_number(tmp_path: Path) -> None:
    write(
        tmp_path / "m",
        [{"step": 1234, "val_loss": 0.5}, {"step": 1300, "loss": 0.25}, {"step": 1300, "val_loss": 0.75}],
    )
    assert list(Progress(tmp_path / "m", []).news()) == [
        ("Step 1234: validation loss=0.5000", {"step": 1234, "valid_loss": 0.5}),
        ("Step 1300: training loss=0.2500", {"step": 1300, "train_loss": 0.25}),
        ("Step 1300: validation loss=0.7500", {"step": 1300, "valid_loss": 0.75}),
    ]


def test_a_run_that_goes_on_from_an_earlier_step_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m"
    write(path, losses(*range(1, 8)))
    progress = Progress(path, [{"step": step, "train_loss": 1 / step} for step in range(1, 6)])
    assert told(progress) == [6, 7]
    write(path, losses(1, 2, 3))  # the resumed run cuts the file back to its last checkpoint
    assert told(progress) == []
    write(path, losses(*range(1, 10)))
    assert told(progress) == [8, 9]
