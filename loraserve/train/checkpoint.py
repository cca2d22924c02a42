"""The state of an unfinished run on disk: enough to go on and end with the same adapter, bit for bit.

Kept in one folder per adapter name, `<adapters-dir>/.training/<name>/` or `<save_dir>/<name>/`:

    checkpoint.pt     of each run weights, the best so far, optimizer state, loss scaler, position; replaced atomically
    metrics.jsonl     the losses so far
    tokens/           the data as token ids, see `tokens`

The position is the number of micro-batches done, always at an optimizer step. Data order and every other random choice
follow from the seed and the position (`data`), so no generator's state is kept. A lock that dies with its process keeps
two runs off one name. Runs that share their passes have one checkpoint, and each its own folder within for the rest.
"""

import io
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from loraserve.errors import CheckpointError, Conflict, InvalidRequest, StorageError
from loraserve.lora.files import storage_errors, write_file
from loraserve.train.dataset import discard_dataset

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class RunState:
    """What is needed to go on after `step` micro-batches."""

    name: str
    """Among the runs of its set; empty for a run alone."""
    ended: str
    """Why it takes no further part; empty if it does."""
    step: int
    recipe: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    seconds: float
    """Time trained so far."""
    best: dict[str, Any]
    """See `BestWeights.state`."""
    run_ids: dict[str, str | None]
    """See `Reports.run_ids`."""


@contextmanager
def exclusive(name: str, folders: Iterable[Path]) -> Iterator[None]:
    """Hold the name `name` in each of `folders`; raises Conflict at once if another process has it."""
    with ExitStack() as stack:
        for folder in sorted(set(folders)):
            with storage_errors(f"lock {name!r} in {folder}"):
                folder.mkdir(parents=True, exist_ok=True)
                lock = filelock.FileLock(folder / f"{name}.lock", timeout=0)
                try:
                    stack.enter_context(lock)
                except filelock.Timeout:
                    raise Conflict(
                        f"another run is training {name!r} in {folder}; wait for it, or choose another --name"
                    ) from None
        yield


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Let a StorageError within say how the run goes on, if there is a checkpoint to go on from."""
    try:
        yield
    except StorageError as error:
        if not (folder / CHECKPOINT).exists():
            raise
        advice = "then run the same command with --resume to go on from the last checkpoint"
        raise StorageError(f"{error}; {advice}", param=error.param) from error


def save_states(folder: Path, states: Sequence[RunState]) -> None:
    """Replace the checkpoint in `folder`. A crash at any moment leaves the old one or the new one."""
    content = io.BytesIO()
    torch.save([{field.name: getattr(state, field.name) for field in fields(state)} for state in states], content)
    with storage_errors(f"save the run in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / CHECKPOINT, content.getvalue())


def saved_quantize(folder: Path) -> str | None:
    """How the runs of the checkpoint in `folder` keep the base, as `--quantize` has it; None if there is no checkpoint.

    Raises CheckpointError: it cannot be read.
    """
    states = _read(folder, mapped=True)
    return None if states is None else states[0].recipe.get("quantize") or "none"


def _read(folder: Path, mapped: bool = False) -> list[RunState] | None:
    """The states in `folder`; `mapped` ones take no memory before they are read."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        return [RunState(**state) for state in torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)]
    except (OSError, RuntimeError, TypeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:150]
        raise CheckpointError(f"{path} cannot be read ({reason}); delete it or train without --resume") from None


def load_states(folder: Path, recipes: Mapping[str, dict[str, Any]]) -> list[RunState] | None:
    """Read the checkpoint in `folder`, None if there is none.

    Args:
        recipes: by the runs' names.

    Raises:
        CheckpointError: it cannot be read.
        InvalidRequest: it is of other runs, or was made with another recipe; every difference is named.
    """
    states = _read(folder)
    if states is None:
        return None
    if (saved := [state.name for state in states]) != list(recipes):
        raise InvalidRequest(
            f"the checkpoint in {folder} is of {_these(saved)} and not of {_these(list(recipes))}; give the command "
            "that it was begun with, or start over without --resume",
            param="resume",
        )
    changed = [
        f"{state.name}{state.name and ': '}{difference}"
        for state in states
        for difference in _differences(state.recipe, recipes[state.name])
    ]
    if changed:
        raise InvalidRequest(
            f"the run in {folder} cannot be resumed with another recipe: {'; '.join(changed)}; "
            "use the same options, or start over without --resume",
            param="resume",
        )
    return states


def load_or_clear(
    folder: Path, folders: Iterable[Path], recipes: Mapping[str, dict[str, Any]] | None
) -> list[RunState] | None:
    """What to go on from, see `load_states`; if that is nothing, or recipes are not given, the folders are cleared.

    Args:
        folders: of each run, which may be `folder` itself.
    """
    states = None if recipes is None else load_states(folder, recipes)
    if states is None:
        own = {folder, *folders}
        for stale in {path.parent for path in folder.glob(f"*/{METRICS}")} - own:  # of another set
            discard_dataset(stale)
            discard(stale)
        for each in own:
            discard(each)
    return states


def _these(names: Sequence[str]) -> str:
    return f"{', '.join(names)} at once" if len(names) > 1 else "one run alone"


def _differences(saved: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    keys = [*recipe, *(key for key in saved if key not in recipe)]
    return [
        f"{key} was {saved.get(key)!r} and is {recipe.get(key)!r}" for key in keys if saved.get(key) != recipe.get(key)
    ]


def discard(folder: Path) -> None:
    """Remove what an ended run left in `folder`, and the folder if nothing else is in it."""
    with storage_errors(f"clear {folder}"):
        for path in (folder / CHECKPOINT, folder / METRICS, *folder.glob(f".{CHECKPOINT}.*")):
            path.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
