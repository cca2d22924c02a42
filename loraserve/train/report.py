"""What a run shows while it goes: a progress bar on a terminal, plain lines elsewhere, and the losses as JSON lines."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from loraserve.lora.files import storage_errors
from loraserve.train.step import StepRecord


class Progress:
    """Shows loss, tokens/s and time left.

    Args:
        stream: where to write; a terminal gets a bar, anything else a line about every `log_interval` micro-batches.
        done: micro-batches an earlier, interrupted run has done.
        label: what each line begins with, where several runs write.
    """

    def __init__(
        self, stream: TextIO, *, total: int, epochs: int, done: int, log_interval: int, label: str = ""
    ) -> None:
        self._label = f"{label}: " if label else ""
        self._stream, self._total, self._first, self._done = stream, total, done, done
        self._epochs, self._per_epoch, self._interval = epochs, total // epochs, log_interval
        self._started = self._last_time = time.monotonic()
        self._unshown: list[StepRecord] = []
        self._bar = None
        if stream.isatty():
            from tqdm import tqdm

            known_width = os.get_terminal_size(stream.fileno()).columns > 0
            self._bar = tqdm(
                desc=label or None,
                total=total,
                initial=done,
                file=stream,
                unit="step",
                dynamic_ncols=known_width,
                ncols=None if known_width else 80,
            )

    def note(self, text: str) -> None:
        """Write a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(self._label + text, file=self._stream)
        else:
            print(self._label + text, file=self._stream, flush=True)

    def advance(self, records: Sequence[StepRecord]) -> None:
        """Count the micro-batches of one optimizer step."""
        due = (self._done + len(records)) // self._interval > self._done // self._interval
        self._done += len(records)
        self._unshown += records
        if self._bar is not None:
            self._bar.update(len(records))
        if due or self._done == self._total:
            self._show(records[-1].lr)

    def _show(self, lr: float) -> None:
        now = time.monotonic()
        rate = sum(record.tokens for record in self._unshown) / max(now - self._last_time, 1e-9)
        losses = f"loss {self._mean('loss'):.4f}"
        if self._unshown[0].pairs:
            losses += f"  margin {self._mean('reward_margin'):.3f}  accuracy {self._mean('accuracy'):.0%}"
        self._last_time, self._unshown = now, []
        if self._bar is not None:
            self._bar.set_postfix_str(f"{losses}, {rate:,.0f} tokens/s")
            return
        left = (self._total - self._done) * (now - self._started) / (self._done - self._first)
        self.note(
            f"epoch {(self._done - 1) // self._per_epoch + 1}/{self._epochs}  step {self._done}/{self._total}  "
            f"{losses}  lr {lr:.2e}  {rate:,.0f} tokens/s  ETA {timedelta(seconds=round(left))}"
        )

    def _mean(self, figure: str) -> float:
        weights = [record.pairs or record.supervised_tokens for record in self._unshown]
        values = [getattr(record, figure) for record in self._unshown]
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Metrics:
    """The losses of a run, kept in memory and in a file of JSON lines.

    Args:
        path: the file; what it holds of an interrupted run up to micro-batch `done` is kept, the rest dropped.
    """

    def __init__(self, path: Path, *, done: int) -> None:
        self.path = path
        with storage_errors(f"write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            self.records, end = _read(self._file, done)
            self._file.truncate(end)

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with storage_errors(f"write {self.path}"):
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # of a record whose writing has failed already
            self._file.close()

    @property
    def losses(self) -> list[tuple[int, float]]:
        """(step, training loss) of every micro-batch."""
        return [(record["step"], record["loss"]) for record in self.records if "loss" in record]

    @property
    def val_losses(self) -> list[tuple[int, float]]:
        return [(record["step"], record["val_loss"]) for record in self.records if "val_loss" in record]


def _read(file: BinaryIO, done: int) -> tuple[list[dict[str, Any]], int]:
    """The records up to micro-batch `done` and where they end; a line torn by a crash ends them."""
    records: list[dict[str, Any]] = []
    file.seek(0)
    end = 0
    for line in file:
        try:
            record = json.loads(line)
            if not line.endswith(b"\n") or record["step"] > done:
                break
        except (ValueError, TypeError, KeyError):
            break
        records.append(record)
        end += len(line)
    return records, end
