"""`train`, `train_all`, `sweep`: from dialogue files to published adapters, on one frozen base.

    read and check the data → initial adapters, or the checkpoint of interrupted runs → optimizer steps, with periodic
    checkpoints and validation → cards → publish

The model runs exactly as it serves: one flat batch, one `LoraBatch`, whose A and B are parameters here. Several runs
share each pass, every row with its own adapter, and a run alone is the case of one; a run that is done, or whose loss
is no number, leaves the batch and the others go on. On a CPU runs that were killed anywhere and resumed publish the
same weights as ones that were not; a GPU's attention kernels may add up in another order.

One run keeps its state in `<folder>/<name>`. Several keep theirs in the folder of the first one's name: one checkpoint,
so that they are all at the same step of the set, and a folder of each one's own for its tokens and metrics.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from loraserve.base.load import Base
from loraserve.errors import InvalidRequest, LoraserveError, NotBetter, TrainingFailed, TrainingInterrupted
from loraserve.registry import Registry
from loraserve.train.allocator import give_back_large_tensors
from loraserve.train.checkpoint import METRICS, discard, exclusive, load_states, resumable, save_states
from loraserve.train.dataset import discard_dataset
from loraserve.train.memory import plan_for
from loraserve.train.options import TrainOptions
from loraserve.train.publish import TrainResult, publish
from loraserve.train.run import Run
from loraserve.train.signals import stop_signals
from loraserve.train.step import advance_together
from loraserve.train.summary import show_sweep

WORK_FOLDER = ".training"
PUBLISHED = "published"


def train(base: Base, registry: Registry, options: TrainOptions, stream: TextIO) -> TrainResult:
    """Train an adapter and publish it under `options.name`.

    Args:
        base: with or without its weights: those still to come are read as memory asks for, see `plan_for`.
        stream: gets a progress bar if it is a terminal, log lines otherwise.

    Raises:
        InvalidRequest: an option that cannot be, or a checkpoint of another recipe to resume.
        DataError: a file with unusable rows, unless they are skipped.
        Conflict: another process is training this name.
        TrainingFailed: the loss is not a number; nothing is published.
        NotBetter: the validation loss is not below the base's and options.publish is `better`; the state is saved.
        TrainingInterrupted: SIGINT or SIGTERM; the state is saved.
        StorageError: a checkpoint or the adapter could not be written; the last good checkpoint stays.
    """
    (outcome,) = train_all(base, registry, [options], stream)
    if isinstance(outcome, LoraserveError):
        raise outcome
    assert outcome is not None  # a run alone leaves no state when it is published
    return outcome


def train_all(
    base: Base, registry: Registry, options: Sequence[TrainOptions], stream: TextIO
) -> list[TrainResult | TrainingFailed | NotBetter | None]:
    """Train several adapters at once, each as it would be alone, and publish each under its name.

    Args:
        options: of each run. What is not one adapter's own (memory_budget, quantize, save_interval, save_dir, resume)
            is the first one's.

    Returns:
        of each what was published, or why it was not; None if it was published before the set was resumed. Unless all
        are published the state is kept, and resuming the same set goes on with the others.

    Raises:
        as `train`, but for what is one run's alone.
    """
    names = [each.name for each in options]
    for name, count in Counter(names).items():
        if count > 1:
            raise InvalidRequest(f"{count} runs have the name {name!r}; give each a name of its own", param="name")
    with _trained(base, registry, options, names, stream) as trained:
        outcomes: list[TrainResult | TrainingFailed | NotBetter | None] = []
        for run in trained.runs:
            outcomes.append(trained.failures.get(run.label))
            if run.ended:
                continue
            if run.label:
                print(f"\n{run.label}:", file=stream, flush=True)
            try:
                outcomes[-1] = publish(run)
            except NotBetter as error:
                outcomes[-1] = error
                continue
            run.ended = PUBLISHED
            if run.label:
                trained.save()
        if all(run.ended == PUBLISHED for run in trained.runs):
            trained.discard()
        return outcomes


def sweep(base: Base, registry: Registry, options: TrainOptions, rates: Sequence[float], stream: TextIO) -> TrainResult:
    """Train `options` at each of several learning rates at once; publish what does best on validation.

    Args:
        rates: two or more different ones.

    Returns:
        what was published; `lr_sweep` of its metrics has the validation loss at each rate, None where it was no number.

    Raises:
        as `train`; TrainingFailed if it fails at every rate.
    """
    if not options.val_split and options.val_data is None:
        raise InvalidRequest(
            "a learning rate is chosen by the validation loss: add --val-split 0.1 or --val-data FILE", param="lr_sweep"
        )
    if len(rates) < 2 or len(set(rates)) < len(rates):
        raise InvalidRequest("lr_sweep takes two or more different learning rates", param="lr_sweep")
    each = [dataclasses.replace(options, learning_rate=rate) for rate in rates]
    with _trained(base, registry, each, [f"lr-{rate}" for rate in rates], stream) as trained:
        able = [run for run in trained.runs if not run.ended and run.best.loss is not None]
        if not able:
            raise next(
                iter(trained.failures.values()),
                TrainingFailed("at no rate the validation loss is a number; try lower ones"),
            )
        best = min(able, key=lambda run: run.best.loss or 0.0)
        losses = {f"{run.options.learning_rate}": run.best.loss if run in able else None for run in trained.runs}
        show_sweep(stream, losses, f"{best.options.learning_rate}")
        result = publish(best, {"lr_sweep": losses})
        trained.discard()
        return result


class _Trained:
    """Runs that share passes, and their one checkpoint in `folder`."""

    def __init__(self, runs: Sequence[Run], folder: Path) -> None:
        self.runs, self.folder = runs, folder
        self.failures: dict[str, TrainingFailed] = {}
        """By label."""

    def save(self) -> None:
        save_states(self.folder, [run.state() for run in self.runs])

    def discard(self) -> None:
        for run in self.runs:
            discard_dataset(run.data_folder)
            discard(run.folder)
        discard(self.folder)

    def loop(self) -> None:
        """Run all to their last steps; raises TrainingInterrupted."""
        for run in self.runs:
            if not run.metrics.records:
                run.validate()
        begun = time.monotonic()
        started = {run.label: begun - run.seconds for run in self.runs}
        interval = self.runs[0].options.save_interval
        with stop_signals() as stop:
            while (active := self._active()) and not stop.requested:
                before = active[0].optimizer.step
                windows = [run.window() for run in active]
                results = advance_together([run.optimizer for run in active], windows, lambda: bool(stop.requested))
                if results is None:
                    break
                now = time.monotonic()
                for run, result in zip(active, results, strict=True):
                    if isinstance(result, TrainingFailed):
                        self._fail(run, result)
                    else:
                        run.record(result, now - started[run.label])
                if active[0].optimizer.step // interval > before // interval:
                    self.save()
            if len(self.failures) < len(self.runs):
                self.save()
        if active := self._active():
            where = ", ".join(
                f"{run.label and f'{run.label!r} '}after step {run.optimizer.step} of {run.total}" for run in active
            )
            raise TrainingInterrupted(
                f"stopped by {stop.requested} {where}; the state is saved in {self.folder}; run the same command with "
                "--resume to go on"
            )

    def _active(self) -> list[Run]:
        return [run for run in self.runs if not run.finished]

    def _fail(self, run: Run, error: TrainingFailed) -> None:
        self.failures[run.label] = error
        run.ended = str(error)
        if run.label:
            run.progress.note(f"failed: {error}")


@contextmanager
def _trained(
    base: Base, registry: Registry, options: Sequence[TrainOptions], labels: Sequence[str], stream: TextIO
) -> Iterator[_Trained]:
    """The runs of `options` at their ends; while they last no other process may train their names."""
    for each in options:
        each.check()
    if base.int8:
        raise InvalidRequest(
            "dtype int8 is for serving; train in float32, bfloat16 or float16, with --quantize int8 on 8-bit weights",
            param="dtype",
        )
    alone, lead = len(options) == 1, options[0]
    if lead.report_to and not alone:
        raise InvalidRequest("--report-to takes one run; train them one by one, or leave it out", param="report_to")
    work = registry.root / WORK_FOLDER
    folder = (lead.save_dir or work) / lead.name
    with ExitStack() as stack:
        for name in dict.fromkeys(each.name for each in options):
            stack.enter_context(exclusive(name, {work, folder.parent}))
        folders = [folder] if alone else [folder / label for label in labels]
        named = [""] if alone else labels
        sweeping = not alone and len({each.name for each in options}) == 1
        runs = [
            Run(base, registry, each, own, folder if sweeping else own, stream, label)
            for each, own, label in zip(options, folders, named, strict=True)
        ]
        if lead.memory_budget is not None:
            give_back_large_tensors()
        batch = [length for run in runs for length in run.dataset.longest(run.options.batch_size)]
        plan = plan_for(base, [run.weights for run in runs], batch, lead.memory_budget, lead.quantize)
        base.load_weights(plan.quantize)
        if plan.packed:
            base.model.pack_for_training()
        states = load_states(folder, {run.label: run.identity for run in runs}) if lead.resume else None
        if states is None:
            for stale in {path.parent for path in folder.glob(f"*/{METRICS}")} - set(folders):  # of another set
                discard_dataset(stale)
                discard(stale)
            for each_folder in {folder, *folders}:
                discard(each_folder)
        if not alone:
            print(f"training {len(runs)} adapters at once; {plan}", file=stream, flush=True)
        trained = _Trained(runs, folder)
        with resumable(folder):
            with ExitStack() as opened:
                for i, run in enumerate(runs):
                    run.begin(plan, states[i] if states else None)
                    opened.callback(run.close)
                    if run.ended and run.ended != PUBLISHED:
                        trained.failures[run.label] = TrainingFailed(run.ended, param="learning_rate")
                trained.loop()
            yield trained
