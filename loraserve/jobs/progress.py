"""A run's metrics as events, while it writes them.

    {"step": 12, "loss": 1.9, ...}   ->  "Step 12: training loss=1.9000"    {"step", "train_loss"}
    {"step": 12, "val_loss": 2.1}    ->  "Step 12: validation loss=2.1000"  {"step", "valid_loss"}

Every step up to 99, every tenth up to 999, and so on: a few hundred events, however long the run.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


class Progress:
    """What is new in a file of metrics.

    Args:
        path: the file, which need not exist yet; it may be moved between two looks.
        told: data of the events that there are already, of a run that now goes on.
    """

    def __init__(self, path: Path, told: list[Mapping[str, Any]]) -> None:
        self.path = path
        self._told = {_key(data) for data in told}
        self._read = 0  # bytes

    def news(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (message, data) of the events that are due."""
        for line in self._lines():
            with suppress(ValueError, KeyError):  # the middle of a line, after a resumed run has shortened the file
                message, data = _event(json.loads(line))
                if _is_due(data) and _key(data) not in self._told:
                    self._told.add(_key(data))
                    yield message, data

    def _lines(self) -> list[bytes]:
        try:
            with open(self.path, "rb") as file:
                if file.seek(0, 2) < self._read:
                    self._read = 0
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return []
        end = text.rfind(b"\n") + 1  # the last line may be half written
        self._read += end
        return text[:end].splitlines()


def _event(record: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    step = record["step"]
    if "val_loss" in record:
        return f"Step {step}: validation loss={record['val_loss']:.4f}", {
            "step": step,
            "valid_loss": record["val_loss"],
        }
    return f"Step {step}: training loss={record['loss']:.4f}", {"step": step, "train_loss": record["loss"]}


def _key(data: Mapping[str, Any]) -> tuple[int, bool]:
    return data["step"], "valid_loss" in data


def _is_due(data: Mapping[str, Any]) -> bool:
    step = data["step"]
    return "valid_loss" in data or step % 10 ** max(len(str(step)) - 2, 0) == 0
