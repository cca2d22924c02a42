"""`train`: from a dialogue file to a published adapter, on a frozen base.

    read and check the data → initial adapter, or the checkpoint of an interrupted run → optimizer steps, with periodic
    checkpoints and validation → card → publish

The model runs exactly as it serves: one flat batch, one `LoraBatch`, whose A and B are parameters here. On a CPU a run
that was killed anywhere and resumed publishes the same weights as one that was not; a GPU's attention kernels may add
up in another order.
"""

import functools
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from loraserve.base.load import Base
from loraserve.errors import InvalidRequest, NotBetter, TrainingInterrupted
from loraserve.lora.adapter import Adapter, LoraWeight
from loraserve.lora.stack import AdapterStack
from loraserve.registry import Record, Registry
from loraserve.train.batch import PackedBatch, pack
from loraserve.train.best import BestWeights
from loraserve.train.card import CURVE, loss_curve, write_card
from loraserve.train.checkpoint import METRICS, RunState, discard, exclusive, load_state, resumable, save_state
from loraserve.train.data import Encoder
from loraserve.train.dataset import discard_dataset, open_dataset
from loraserve.train.figures import figures_of
from loraserve.train.general import perplexity
from loraserve.train.initial import start
from loraserve.train.memory import plan_for
from loraserve.train.options import TrainOptions
from loraserve.train.preference import Preference, validate
from loraserve.train.report import Metrics, Progress
from loraserve.train.reporters import Reports
from loraserve.train.samples import Comparison, compare
from loraserve.train.signals import stop_signals
from loraserve.train.step import AdapterOptimizer
from loraserve.train.summary import show_summary
from loraserve.train.tokens import REJECTED
from loraserve.train.verdict import warnings_of

WORK_FOLDER = ".training"
NUM_SAMPLE_ANSWERS = 3


@dataclass(frozen=True)
class TrainResult:
    """A finished run: what was published, and its figures as the card and the manifest have them."""

    record: Record
    metrics: dict[str, Any]


def train(base: Base, registry: Registry, options: TrainOptions, stream: TextIO) -> TrainResult:
    """Train an adapter and publish it under `options.name`.

    Args:
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
    options.check()
    if base.int8:
        raise InvalidRequest("dtype int8 is for serving; train in float32, bfloat16 or float16", param="dtype")
    work = registry.root / WORK_FOLDER
    folder = (options.save_dir or work) / options.name
    with exclusive(options.name, {work, folder.parent}):
        run = _Run(base, registry, options, folder, stream)
        with resumable(folder):
            try:
                run.loop()
            finally:
                run.close()
            result = run.publish()
        discard_dataset(folder)
        discard(folder)
        return result


class _Run:
    def __init__(self, base: Base, registry: Registry, options: TrainOptions, folder: Path, stream: TextIO) -> None:
        self.base, self.registry, self.options, self.folder = base, registry, options, folder
        self.stream = stream
        encoder = Encoder(base.tokenizer, base.template, base.config.max_position_embeddings, options.max_seq_len)
        note = functools.partial(print, file=stream, flush=True)
        self.data, self.facts, self.dataset, val_sha256 = open_dataset(options, encoder, folder, note)
        self.per_epoch = options.steps_per_epoch(len(self.dataset))
        self.total = self.per_epoch * options.epochs
        self.start = start(options, base, registry)
        self.weights = self.start.weights
        dpo = options.objective == "dpo"
        self.preference = Preference(options.beta, self.start.reference()) if dpo else None
        batch = self.dataset.longest(options.batch_size)
        self.plan = plan_for(base, self.weights, batch, options.memory_budget)
        self.optimizer = AdapterOptimizer(
            base.model,
            self.weights,
            total_steps=self.total,
            peak_learning_rate=options.learning_rate,
            lora_plus_ratio=options.lora_plus_ratio,
            grad_clip=options.grad_clip,
            accumulation_steps=options.accumulation_steps,
            loss_reduction=options.loss_reduction,
            checkpointing=self.plan.checkpointing,
            max_rows=self.plan.max_rows,
            preference=self.preference,
        )
        self.best = BestWeights(self.weights)
        self.recipe = options.recipe() | self.start.recipe | {"dtype": str(base.dtype).removeprefix("torch.")}
        hashes = {"data_sha256": self.data.sha256, "val_data_sha256": val_sha256}
        self.identity = self.recipe | hashes | {"base_fingerprint": base.fingerprint}
        state = load_state(folder, self.identity) if options.resume else None
        self.seconds = 0.0
        if state is not None:
            self.optimizer.load(state.step, state.weights, state.optimizer, state.scaler)
            self.seconds = state.seconds
            self.best.load(state.best)
        else:
            discard(folder)
        done = self.optimizer.step
        self.reports = Reports(
            options.report_to,
            name=options.name,
            project=options.report_project,
            recipe=self.recipe,
            run_ids=state.run_ids if state else {},
            step=done,
        )
        self.metrics = Metrics(folder / METRICS, done=done)
        self.progress = Progress(
            stream, total=self.total, epochs=options.epochs, done=done, log_interval=options.log_interval
        )
        self._announce(state, encoder.limit)

    def _announce(self, state: RunState | None, limit: int) -> None:
        parameters = sum(w.A.numel() + w.B.numel() for w in self.weights.values())
        held_out = f" and {self.dataset.num_val} for validation" if self.dataset.num_val else ""
        self.progress.note(
            f"training {self.options.name!r}: {parameters:,} parameters in {len(self.weights)} layers "
            f"({100 * parameters / self.base.config.num_parameters:.2f}% of {self.base.name}), "
            f"{len(self.dataset)} {self.options.rows_are}{held_out}, "
            f"{self.total} steps on {self.base.device} in {self.recipe['dtype']}"
        )
        self.progress.note(str(self.plan))
        if self.facts.rejections.rows:
            rejected = f"{self.facts.rejections.rows:,} rows left out, in full in {self.folder / REJECTED}"
            self.progress.note(f"{rejected}: {self.facts.rejections}")
        if self.facts.truncated:
            self.progress.note(f"{self.facts.truncated} {self.options.rows_are} were cut at {limit} tokens")
        for field, rows in self.facts.left_out.items():
            self.progress.note(
                f"warning: the base's chat template does not show {field!r} of {rows:,} {self.options.rows_are}"
            )
        if state is not None:
            self.progress.note(f"resuming after step {state.step} of {self.total}")
        elif self.options.resume:
            self.progress.note(f"no checkpoint in {self.folder}: starting from the beginning")

    def loop(self) -> None:
        """Run to the last step; see `train` for what it raises."""
        options, started = self.options, time.monotonic() - self.seconds
        if not self.metrics.records:
            self._validate()
        with stop_signals() as stop:
            while not self._finished() and not stop.requested:
                before = self.optimizer.step
                records = self.optimizer.advance(self._window(), stop=lambda: bool(stop.requested))
                self.seconds = time.monotonic() - started
                for record in records:
                    entry = {k: v for k, v in asdict(record).items() if v is not None or k == "grad_norm"}
                    entry |= {"epoch": (record.step - 1) // self.per_epoch + 1, "seconds": round(self.seconds, 3)}
                    self._log(entry)
                if not records:
                    break
                self.progress.advance(records)
                if self.optimizer.step % self.per_epoch == 0:
                    self._validate()
                if self.optimizer.step // options.save_interval > before // options.save_interval:
                    self._save()
            self._save()
        if not self._finished():
            raise TrainingInterrupted(
                f"stopped by {stop.requested} after step {self.optimizer.step} of {self.total}; the state is saved in "
                f"{self.folder}; run the same command with --resume to go on"
            )

    def _finished(self) -> bool:
        """Whether all steps are done, or validation has not improved for the epochs of `patience`."""
        patience, step = self.options.patience, self.optimizer.step
        tired = patience is not None and step - self.best.step >= patience * self.per_epoch
        return step >= self.total or tired

    def _window(self) -> list[PackedBatch]:
        """The micro-batches of the next optimizer step; a window does not reach into the next epoch."""
        epoch, first = divmod(self.optimizer.step, self.per_epoch)
        size, order = self.options.batch_size, self.dataset.order(epoch)
        last = min(first + self.options.accumulation_steps, self.per_epoch)
        rows = [order[i * size : (i + 1) * size].tolist() for i in range(first, last)]
        group = self.dataset.samples_per_row
        return [pack([s for row in batch for s in self.dataset.samples(epoch, row)], group) for batch in rows]

    def _validate(self) -> None:
        if not self.dataset.num_val:
            return
        step, stack = self.optimizer.step, self.optimizer.stack
        loss, accuracy = self._judge(stack if step else None)
        self._log({"step": step, "val_loss": loss} | ({} if accuracy is None else {"val_accuracy": accuracy}))
        right = "" if accuracy is None else f", accuracy {accuracy:.0%}"
        self.progress.note(f"validation after step {step}/{self.total}: loss {loss:.4f}{right}")
        if step:
            self.best.offer(step, loss)
            return
        initial = self._judge(stack)[0] if self.start.parent else None
        if initial is not None:
            self.progress.note(f"validation of {self.options.init_from!r}: loss {initial:.4f}")
        self.best.begin(loss, initial)

    def _judge(self, stack: AdapterStack | None) -> tuple[float, float | None]:
        rows, size, group = range(self.dataset.num_val), self.options.batch_size, self.dataset.samples_per_row
        samples = ([s for row in rows[i : i + size] for s in self.dataset.val_samples(row)] for i in rows[::size])
        batches = (part for each in samples for part in pack(each, group).split(self.plan.max_rows))
        return validate(self.base.model, batches, stack, self.preference)

    def _log(self, record: dict[str, Any]) -> None:
        self.metrics.add(record)
        self.reports.add(record)

    def _save(self) -> None:
        state = RunState(
            recipe=self.identity,
            seconds=self.seconds,
            run_ids=self.reports.run_ids,
            best=self.best.state(),
            **self.optimizer.state(),
        )
        save_state(self.folder, state)

    def close(self) -> None:
        self.progress.close()
        self.metrics.close()
        self.reports.close()

    def publish(self) -> TrainResult:
        """Judge the best weights, say how they do, and publish them if they are to be."""
        self.best.restore()
        metrics = self._figures()
        warnings = warnings_of(
            metrics,
            [loss for _, loss in self.metrics.losses],
            self.metrics.val_losses,
            per_epoch=self.per_epoch,
            learning_rate=self.options.learning_rate,
        )
        answers = compare(self.base, (None, self.weights), self.dataset.dialogues(), NUM_SAMPLE_ANSWERS)
        show_summary(self.stream, metrics, answers, warnings)
        if self.best.is_better is False and self.options.publish == "better":
            before = f"the base's loss is {metrics['val_loss_base']}"
            if self.start.parent:
                before += f", that of {self.options.init_from!r} is {metrics['val_loss_initial']},"
            raise NotBetter(
                f"{self.options.name!r} was not published: on validation {before} "
                f"and the adapter's {metrics['val_loss']}; try another --learning-rate, or more and different "
                f"dialogues; the state is in {self.folder}, and the same command with --resume --publish always "
                "publishes it"
            )
        return self._publish(metrics, answers, warnings)

    def _publish(self, metrics: dict[str, Any], answers: list[Comparison], warnings: list[str]) -> TrainResult:
        trained = {
            target: LoraWeight(weight.A.detach().cpu(), weight.B.detach().cpu(), weight.scaling)
            for target, weight in self.weights.items()
        }
        rejections = self.facts.rejections
        card = write_card(self.options.name, self.base.name, self.recipe, metrics, rejections, answers, warnings)
        manifest = {
            "base_fingerprint": self.base.fingerprint,
            "base_name": self.base.name,
            "parents": [self.start.parent] if self.start.parent else [],
            "data_sha256": self.data.sha256,
            "recipe": self.recipe,
            "metrics": metrics,
            "warnings": warnings,
            "description": f"trained on {len(self.dataset)} {self.options.rows_are} of {self.data.name}",
        }
        files: dict[str, bytes | Path] = {
            "README.md": card.encode(),
            CURVE: loss_curve(self.metrics.losses, self.metrics.val_losses, self.best.step),
            METRICS: self.metrics.path,
        }
        adapter = Adapter(trained, self.options.name)
        record = self.registry.publish(self.options.name, adapter, self.start.config, manifest, files)
        return TrainResult(record, metrics)

    def _figures(self) -> dict[str, Any]:
        return figures_of(self.metrics.records, self.best, self.per_epoch, self.seconds) | {
            "perplexity_base": round(perplexity(self.base, None), 3),
            "perplexity": round(perplexity(self.base, self.optimizer.stack), 3),
            "dialogues": len(self.dataset),
            "rejected_rows": self.facts.rejections.rows,
            "num_parameters": sum(w.A.numel() + w.B.numel() for w in self.weights.values()),
        }
