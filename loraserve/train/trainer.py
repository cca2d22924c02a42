"""`train`, `train_all`, `sweep`: from dialogue files to published adapters, on one frozen base.

    read and check the data → initial adapters, or the checkpoint of interrupted runs → optimizer steps, with periodic
    checkpoints and validation → cards → publish

The model runs exactly as it serves: one flat batch, one `LoraBatch`, whose A and B are parameters here. Several runs
share each pass, every row with its own adapter, and a run alone is the case of one; a run that is done, or whose loss
is no number, leaves the batch and the others go on. On a CPU runs that were killed anywhere and resumed publish the
same weights as ones that were not; a GPU's attention kernels may add up in another order.

One run keeps its state in `<folder>/<name>`. Several keep theirs in the folder of the first one's name: one checkpoint,
so that they are all at the same step of the set, and a folder of each one's own for its tokens and metrics.

Several processes (`ranks`) go through all of this together, each with its share of the rows. The leading one alone
locks, writes and publishes; what it found or published holds for all.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from loraserve.base.load import Base
from loraserve.errors import InvalidRequest, LoraserveError, NotBetter, TrainingFailed, TrainingInterrupted
from loraserve.registry import Registry
from loraserve.train.allocator import give_back_large_tensors
from loraserve.train.checkpoint import discard, exclusive, load_or_clear, resumable, save_states, saved_quantize
from loraserve.train.dataset import discard_dataset
from loraserve.train.general import perplexity
from loraserve.train.memory import Plan
from loraserve.train.options import TrainOptions
from loraserve.train.publish import TrainResult, publish
from loraserve.train.ranks import ALONE, Ranks
from loraserve.train.run import Run
from loraserve.train.shares import largest_share, plan_together
from loraserve.train.signals import stop_signals
from loraserve.train.step import advance_together
from loraserve.train.summary import show_sweep

WORK_FOLDER = ".training"
PUBLISHED = "published"


def train(base: Base, registry: Registry, options: TrainOptions, stream: TextIO, ranks: Ranks = ALONE) -> TrainResult:
    """Train an adapter and publish it under `options.name`.

    Args:
        base: with or without its weights: those still to come are read as memory asks for, see `plan_for`.
        stream: gets a progress bar if it is a terminal, log lines otherwise.
        ranks: the processes that train it together, each of which calls this with the same options.

    Raises:
        InvalidRequest: an option that cannot be, or a checkpoint of another recipe to resume.
        DataError: a file with unusable rows, unless they are skipped.
        Conflict: another process is training this name.
        TrainingFailed: the loss is not a number; nothing is published.
        NotBetter: the validation loss is not below the base's and options.publish is `better`; the state is saved.
        TrainingInterrupted: SIGINT or SIGTERM; the state is saved.
        StorageError: a checkpoint or the adapter could not be written; the last good checkpoint stays.
        ProcessLost: another process is gone; the last good checkpoint stays.
    """
    (outcome,) = train_all(base, registry, [options], stream, ranks)
    if isinstance(outcome, LoraserveError):
        raise outcome
    assert outcome is not None  # a run alone leaves no state when it is published
    return outcome


def train_all(
    base: Base, registry: Registry, options: Sequence[TrainOptions], stream: TextIO, ranks: Ranks = ALONE
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
    with _trained(base, registry, options, names, stream, ranks) as trained:
        return ranks.from_lead(lambda: _publish_all(trained, stream))


def _publish_all(trained: "_Trained", stream: TextIO) -> list[TrainResult | TrainingFailed | NotBetter | None]:
    outcomes: list[TrainResult | TrainingFailed | NotBetter | None] = []
    before: float | None = None
    for run in trained.runs:
        outcomes.append(trained.failures.get(run.label))
        if run.ended:
            continue
        before = perplexity(run.base, None) if before is None else before
        if run.label:
            print(f"\n{run.label}:", file=stream, flush=True)
        try:
            outcomes[-1] = publish(run, before)
        except NotBetter as error:
            outcomes[-1] = error
            continue
        run.ended = PUBLISHED
        if run.label:
            trained.save()
    if all(run.ended == PUBLISHED for run in trained.runs):
        trained.discard()
    return outcomes


def sweep(
    base: Base,
    registry: Registry,
    options: TrainOptions,
    rates: Sequence[float],
    stream: TextIO,
    ranks: Ranks = ALONE,
) -> TrainResult:
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
    with _trained(base, registry, each, [f"lr-{rate}" for rate in rates], stream, ranks) as trained:
        able = [run for run in trained.runs if not run.ended and run.best.loss is not None]
        if not able:
            raise next(
                iter(trained.failures.values()),
                TrainingFailed("at no rate the validation loss is a number; try lower ones"),
            )
        best = min(able, key=lambda run: run.best.loss or 0.0)
        losses = {f"{run.options.learning_rate}": run.best.loss if run in able else None for run in trained.runs}
        show_sweep(stream, losses, f"{best.options.learning_rate}")
        result = ranks.from_lead(lambda: publish(best, perplexity(base, None), {"lr_sweep": losses}))
        trained.discard()
        return result


class _Trained:
    """Runs that share passes, and their one checkpoint in `folder`, which the leading rank keeps."""

    def __init__(self, runs: Sequence[Run], folder: Path, ranks: Ranks) -> None:
        self.runs, self.folder, self.ranks = runs, folder, ranks
        self.failures: dict[str, TrainingFailed] = {}
        """By label."""

    def save(self) -> None:
        if self.ranks.leads:
            save_states(self.folder, [run.state() for run in self.runs])

    def discard(self) -> None:
        if not self.ranks.leads:
            return
        for run in self.runs:
            discard_dataset(run.data_folder)
            discard(run.folder)
        discard(self.folder)

    def loop(self) -> None:
        """Run all to their last steps; raises TrainingInterrupted."""
        for run in self.runs:
            if run.best.base_loss is None:
                run.validate()
        begun = time.monotonic()
        started = {run.label: begun - run.seconds for run in self.runs}
        interval = self.runs[0].options.save_interval
        with stop_signals() as stop:
            while active := self._active():
                before = active[0].optimizer.step
                windows = [run.window() for run in active]
                optimizers = [run.optimizer for run in active]
                results = advance_together(optimizers, windows, lambda: bool(stop.requested), self.ranks)
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
            self.ranks.wait()  # for what is saved, before anybody ends
        if active := self._active():
            asked = next(filter(None, self.ranks.gather(stop.requested)), None)
            where = ", ".join(
                f"{run.label and f'{run.label!r} '}after step {run.optimizer.step} of {run.total}" for run in active
            )
            raise TrainingInterrupted(
                f"stopped by {asked} {where}; the state is saved in {self.folder}; run the same command with "
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
    base: Base,
    registry: Registry,
    options: Sequence[TrainOptions],
    labels: Sequence[str],
    stream: TextIO,
    ranks: Ranks,
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
    folders = [folder] if alone else [folder / label for label in labels]
    named = [""] if alone else labels
    sweeping = not alone and len({each.name for each in options}) == 1
    with ExitStack() as stack:
        with ranks.lead_first():
            for name in dict.fromkeys(each.name for each in options) if ranks.leads else ():
                stack.enter_context(exclusive(name, {work, folder.parent}))
            runs = [
                Run(base, registry, each, own, folder if sweeping else own, stream, label, ranks)
                for each, own, label in zip(options, folders, named, strict=True)
            ]
        if lead.memory_budget is not None:
            give_back_large_tensors()
        plan = _plan(base, runs, folder, ranks)
        base.load_weights(plan.quantize)
        if plan.packed:
            base.model.pack_for_training()
        for run in runs:
            run.measure()
        identities = {run.label: run.identity for run in runs}
        _check_alike(identities, ranks)
        states = ranks.from_lead(lambda: load_or_clear(folder, folders, identities if lead.resume else None))
        if not alone:
            print(f"training {len(runs)} adapters at once; {plan}", file=stream, flush=True)
        trained = _Trained(runs, folder, ranks)
        with resumable(folder):
            with ExitStack() as opened:
                for i, run in enumerate(runs):
                    run.begin(plan, states[i] if states else None)
                    opened.callback(run.close)
                    if run.ended and run.ended != PUBLISHED:
                        trained.failures[run.label] = TrainingFailed(run.ended, param="learning_rate")
                trained.loop()
            yield trained


def _plan(base: Base, runs: Sequence[Run], folder: Path, ranks: Ranks) -> Plan:
    """How the runs take their steps; those of a checkpoint go on in its bits if no others are asked for."""
    lead = runs[0].options
    saved = ranks.from_lead(lambda: saved_quantize(folder) if lead.resume else None)
    how = saved if saved and lead.quantize == "auto" else lead.quantize
    batch = [length for run in runs for length in run.dataset.longest(run.options.batch_size)]
    share = largest_share(batch, max(run.options.accumulation_steps for run in runs), ranks.size)
    return plan_together(base, [run.weights for run in runs], share, lead.memory_budget, how, ranks)


def _check_alike(identities: Mapping[str, dict[str, Any]], ranks: Ranks) -> None:
    lead = ranks.from_lead(lambda: identities)
    if lead != identities:
        keys = {key for label, own in identities.items() for key in own if lead.get(label, {}).get(key) != own[key]}
        what = ", ".join(sorted(keys)) or "set of runs"
        raise InvalidRequest(
            f"process {ranks.rank} has another {what} than process 0; give all of them the same files and options"
        )
