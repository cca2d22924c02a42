"""One adapter in training: its data, its optimizer, what it logs, and the best weights so far.

It neither steps nor saves by itself: `trainer` does both, for one run or for several at once.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from loraserve.base.load import Base
from loraserve.lora.stack import AdapterStack
from loraserve.registry import Registry
from loraserve.train.batch import PackedBatch, pack
from loraserve.train.best import BestWeights
from loraserve.train.checkpoint import METRICS, RunState
from loraserve.train.data import Encoder
from loraserve.train.dataset import open_dataset
from loraserve.train.dora import measured
from loraserve.train.initial import start
from loraserve.train.memory import Plan
from loraserve.train.options import TrainOptions
from loraserve.train.preference import Preference, validate
from loraserve.train.ranks import ALONE, Ranks
from loraserve.train.report import Metrics, Progress
from loraserve.train.reporters import Reports
from loraserve.train.step import AdapterOptimizer, StepRecord
from loraserve.train.tokens import REJECTED


class Run:
    """A run whose data is read and checked; `measure` and then `begin` make it ready to step.

    Args:
        folder: for its metrics.
        data_folder: for its tokens; runs on the same files may share one.
        stream: gets a progress bar if it is a terminal, log lines otherwise.
        label: by which its lines are known among those of other runs; empty for a run alone.
        ranks: the processes that train it together; the leading one alone has `reports` and `metrics`.
    """

    optimizer: AdapterOptimizer
    reports: Reports
    metrics: Metrics
    progress: Progress

    def __init__(
        self,
        base: Base,
        registry: Registry,
        options: TrainOptions,
        folder: Path,
        data_folder: Path,
        stream: TextIO,
        label: str = "",
        ranks: Ranks = ALONE,
    ) -> None:
        self.base, self.registry, self.options = base, registry, options
        self.folder, self.data_folder = folder, data_folder
        self.stream, self.label, self.ranks = stream, label, ranks
        self.seconds = 0.0
        self.ended = ""
        """Why it takes no further part, whatever its step: it failed, or is published already."""
        self._encoder = Encoder(base.tokenizer, base.template, base.config.max_position_embeddings, options.max_seq_len)
        note = functools.partial(print, file=stream, flush=True)
        self.data, self.facts, self.dataset, val_sha256 = open_dataset(options, self._encoder, data_folder, note)
        self.per_epoch = options.steps_per_epoch(len(self.dataset))
        self.total = self.per_epoch * options.epochs
        self.start = start(options, base, registry)
        self.weights = self.start.weights
        self.preference: Preference | None = None
        self._reference = self.start.copy() if options.objective == "dpo" else None
        self.best = BestWeights(self.weights)
        self._hashes = {"data_sha256": self.data.sha256, "val_data_sha256": val_sha256}

    def measure(self) -> None:
        """Take what the run starts from by the base's weights, which are there now. Raises as `Start.measure` does."""
        self.start.measure(self.base.weight_of)
        if self.options.objective == "dpo":
            before, self._reference = self._reference, None
            stack = None if before is None else AdapterStack([measured(before, self.base.weight_of)])
            self.preference = Preference(self.options.beta, stack)

    @property
    def recipe(self) -> dict[str, Any]:
        """What decides the adapter; complete once the base has its weights."""
        weights = {"dtype": str(self.base.dtype).removeprefix("torch."), "quantize": self.base.model.quantized}
        return self.options.recipe() | self.start.recipe | weights

    @property
    def identity(self) -> dict[str, Any]:
        """By which a checkpoint is known as this run's."""
        return self.recipe | self._hashes | {"base_fingerprint": self.base.fingerprint}

    def begin(self, plan: Plan, state: RunState | None) -> None:
        """Be as after the last step of `state`, or before the first, open what it logs to, and say what it does."""
        options = self.options
        self.plan = plan
        self.optimizer = AdapterOptimizer(
            self.base.model,
            self.weights,
            weight_of=self.base.weight_of,
            total_steps=self.total,
            peak_learning_rate=options.learning_rate,
            lora_plus_ratio=options.lora_plus_ratio,
            grad_clip=options.grad_clip,
            accumulation_steps=options.accumulation_steps,
            loss_reduction=options.loss_reduction,
            checkpointing=plan.checkpointing,
            max_rows=plan.max_rows,
            preference=self.preference,
        )
        if state is not None:
            self.optimizer.load(state.step, state.weights, state.optimizer, state.scaler)
            self.seconds, self.ended = state.seconds, state.ended
            self.best.load(state.best)
        if self.ranks.leads:
            self._open_records(state)
        self.progress = Progress(
            self.stream,
            total=self.total,
            epochs=options.epochs,
            done=self.optimizer.step,
            log_interval=options.log_interval,
            label=self.label,
        )
        self._announce(state)

    def _open_records(self, state: RunState | None) -> None:
        self.reports = Reports(
            self.options.report_to,
            name=self.options.name,
            project=self.options.report_project,
            recipe=self.recipe,
            run_ids=state.run_ids if state else {},
            step=self.optimizer.step,
        )
        self.metrics = Metrics(self.folder / METRICS, done=self.optimizer.step)

    def _announce(self, state: RunState | None) -> None:
        parameters = sum(w.num_parameters for w in self.weights.values())
        held_out = f" and {self.dataset.num_val} for validation" if self.dataset.num_val else ""
        self.progress.note(
            f"training {self.options.name!r}: {parameters:,} parameters in {len(self.weights)} layers "
            f"({100 * parameters / self.base.config.num_parameters:.2f}% of {self.base.name}), "
            f"{len(self.dataset)} {self.options.rows_are}{held_out}, "
            f"{self.total} steps on {self.base.device} in {self.recipe['dtype']}"
            f"{', the base in ' + self.base.model.quantized if self.base.model.quantized else ''}"
        )
        if not self.label:
            self.progress.note(str(self.plan))
        if self.facts.rejections.rows:
            rejected = f"{self.facts.rejections.rows:,} rows left out, in full in {self.data_folder / REJECTED}"
            self.progress.note(f"{rejected}: {self.facts.rejections}")
        if self.facts.truncated:
            self.progress.note(
                f"{self.facts.truncated} {self.options.rows_are} were cut at {self._encoder.limit} tokens"
            )
        for field, rows in self.facts.left_out.items():
            self.progress.note(
                f"warning: the base's chat template does not show {field!r} of {rows:,} {self.options.rows_are}"
            )
        if state is not None:
            self.progress.note(f"resuming after step {state.step} of {self.total}{self.ended and f': {self.ended}'}")
        elif self.options.resume:
            self.progress.note(f"no checkpoint in {self.folder}: starting from the beginning")

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or validation has not improved for the epochs of `patience`."""
        patience, step = self.options.patience, self.optimizer.step
        tired = patience is not None and step - self.best.step >= patience * self.per_epoch
        return bool(self.ended) or step >= self.total or tired

    def window(self) -> list[PackedBatch]:
        """The micro-batches of the next optimizer step; a window does not reach into the next epoch."""
        epoch, first = divmod(self.optimizer.step, self.per_epoch)
        size, order = self.options.batch_size, self.dataset.order(epoch)
        last = min(first + self.options.accumulation_steps, self.per_epoch)
        rows = [order[i * size : (i + 1) * size].tolist() for i in range(first, last)]
        group = self.dataset.samples_per_row
        return [pack([s for row in batch for s in self.dataset.samples(epoch, row)], group) for batch in rows]

    def record(self, records: Sequence[StepRecord], seconds: float) -> None:
        """Take note of an optimizer step, `seconds` after the start of the run, and validate at the end of an epoch."""
        self.seconds = seconds
        for record in records:
            entry = {k: v for k, v in asdict(record).items() if v is not None or k == "grad_norm"}
            entry |= {"epoch": (record.step - 1) // self.per_epoch + 1, "seconds": round(seconds, 3)}
            self._log(entry)
        self.progress.advance(records)
        if self.optimizer.step % self.per_epoch == 0:
            self.validate()

    def validate(self) -> None:
        """Judge the weights on what is held out, if anything is; before the first step the base."""
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
        size, group = max(1, self.options.batch_size // self.ranks.size), self.dataset.samples_per_row
        rows = range(self.dataset.num_val)[self.ranks.rank :: self.ranks.size]
        parts = (rows[i : i + size] for i in range(0, len(rows), size))
        samples = ([s for row in part for s in self.dataset.val_samples(row)] for part in parts)
        batches = (part for each in samples for part in pack(each, group).split(self.plan.max_rows))
        return validate(self.base.model, batches, stack, self.preference, self.ranks)

    def _log(self, record: dict[str, Any]) -> None:
        if self.ranks.leads:
            self.metrics.add(record)
            self.reports.add(record)

    def state(self) -> RunState:
        return RunState(
            name=self.label,
            ended=self.ended,
            recipe=self.identity,
            seconds=self.seconds,
            run_ids=self.reports.run_ids,
            best=self.best.state(),
            **self.optimizer.state(),
        )

    def close(self) -> None:
        self.progress.close()
        if self.ranks.leads:
            self.metrics.close()
            self.reports.close()
