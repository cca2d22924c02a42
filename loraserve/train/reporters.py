"""Where a run's losses go besides its own files: Weights & Biases, SwanLab, Trackio, TensorBoard.

Each is a library of its own and an extra of this package, and is imported only where it is asked for. Whether it works
offline is its own setting: WANDB_MODE=offline, SWANLAB_MODE=offline; Trackio and TensorBoard write to this machine.
TensorBoard's files are in `runs/<name>`, or in TENSORBOARD_LOGGING_DIR instead of `runs`.
"""

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loraserve.errors import InvalidRequest

Record = Mapping[str, float | None]


@dataclass(frozen=True)
class Start:
    """What a reporter is told at its start."""

    name: str
    project: str
    recipe: dict[str, Any]
    run_id: str | None
    """Of the interrupted run that goes on."""
    step: int
    """Micro-batches done."""


class Reporter(Protocol):
    run_id: str | None
    """By which the service knows the run when it is resumed."""

    def log(self, record: Record, step: int) -> None: ...

    def close(self) -> None: ...


class Service:
    """A run of wandb or of a library with its interface."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.run_id: str | None = run.id

    def log(self, record: Record, step: int) -> None:
        self._run.log(dict(record), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    run_id: str | None = None

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, record: Record, step: int) -> None:
        for key, value in record.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


def _wandb(start: Start) -> Reporter:
    import wandb

    named = {"project": start.project, "name": start.name, "config": start.recipe}
    return Service(wandb.init(**named, id=start.run_id, resume="allow" if start.run_id else None))


def _swanlab(start: Start) -> Reporter:
    import swanlab

    named = {"project": start.project, "name": start.name, "config": start.recipe}
    return Service(swanlab.init(**named, id=start.run_id, resume="allow" if start.run_id else None))


def _trackio(start: Start) -> Reporter:
    import trackio

    resume = "allow" if start.run_id else "never"  # it knows runs by their names
    return Service(trackio.init(start.project, start.name, config=start.recipe, resume=resume, embed=False))


def _tensorboard(start: Start) -> Reporter:
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", "runs")) / start.name
    writer = SummaryWriter(str(folder), purge_step=start.step + 1 if start.step else None)
    writer.add_text("recipe", f"```json\n{json.dumps(start.recipe, indent=2)}\n```")
    return TensorBoard(writer)


REPORTERS: dict[str, Callable[[Start], Reporter]] = {
    "wandb": _wandb,
    "swanlab": _swanlab,
    "trackio": _trackio,
    "tensorboard": _tensorboard,
}


def check_installed(names: Sequence[str]) -> None:
    """Raise InvalidRequest for a name that is no reporter's, and with the remedy for a library that is missing."""
    for name in names:
        if name not in REPORTERS:
            raise InvalidRequest(f"report_to is one of {', '.join(REPORTERS)}, not {name!r}", param="report_to")
        try:
            importlib.import_module(name)
        except ImportError:
            message = f"--report-to {name} needs the {name} package: pip install 'loraserve[{name}]'"
            raise InvalidRequest(message, param="report_to") from None


class Reports:
    """The reporters of a run. Raises as `check_installed`, and InvalidRequest if one of them does not start.

    Args:
        run_ids: of an interrupted run, as `run_ids` had them.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        name: str,
        project: str,
        recipe: dict[str, Any],
        run_ids: Mapping[str, str | None],
        step: int,
    ) -> None:
        check_installed(names)
        self._reporters: dict[str, Reporter] = {}
        for each in names:
            start = Start(name, project, recipe, run_ids.get(each), step)
            try:
                self._reporters[each] = REPORTERS[each](start)
            except Exception as error:  # whatever the library raises: no key, no network, no such project
                self.close()
                message = f"--report-to {each} did not start: {error}; log in to it, use it offline, or leave it out"
                raise InvalidRequest(message, param="report_to") from error

    @property
    def run_ids(self) -> dict[str, str | None]:
        return {name: reporter.run_id for name, reporter in self._reporters.items()}

    def add(self, record: Mapping[str, Any]) -> None:
        """Send a record of `Metrics`."""
        values = {key: value for key, value in record.items() if key != "step" and value is not None}
        for reporter in self._reporters.values():
            reporter.log(values, record["step"])

    def close(self) -> None:
        for reporter in self._reporters.values():
            reporter.close()
