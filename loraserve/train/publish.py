"""The end of a run: its best weights are judged, shown and published with their card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraserve.errors import NotBetter
from loraserve.lora.adapter import Adapter
from loraserve.registry import Record
from loraserve.train.card import CURVE, loss_curve, write_card
from loraserve.train.checkpoint import METRICS
from loraserve.train.figures import figures_of
from loraserve.train.general import perplexity
from loraserve.train.run import Run
from loraserve.train.samples import Comparison, compare
from loraserve.train.summary import show_summary
from loraserve.train.verdict import warnings_of

NUM_SAMPLE_ANSWERS = 3


@dataclass(frozen=True)
class TrainResult:
    """A finished run: what was published, and its figures as the card and the manifest have them."""

    record: Record
    metrics: dict[str, Any]


def publish(run: Run, perplexity_base: float, more: dict[str, Any] | None = None) -> TrainResult:
    """Judge the best weights, say how they do, and publish them if they are to be.

    Args:
        perplexity_base: of the base on general text.
        more: figures to go into the metrics beside the run's own.

    Raises:
        NotBetter: the validation loss is not below the base's and options.publish is `better`.
    """
    run.best.restore()
    metrics = _figures(run, perplexity_base) | (more or {})
    warnings = warnings_of(
        metrics,
        [loss for _, loss in run.metrics.losses],
        run.metrics.val_losses,
        per_epoch=run.per_epoch,
        learning_rate=run.options.learning_rate,
    )
    answers = compare(run.base, (None, run.optimizer.stack.adapters[0]), run.dataset.dialogues(), NUM_SAMPLE_ANSWERS)
    show_summary(run.stream, metrics, answers, warnings)
    if run.best.is_better is False and run.options.publish == "better":
        before = f"the base's loss is {metrics['val_loss_base']}"
        if run.start.parent:
            before += f", that of {run.options.init_from!r} is {metrics['val_loss_initial']},"
        raise NotBetter(
            f"{run.options.name!r} was not published: on validation {before} "
            f"and the adapter's {metrics['val_loss']}; try another --learning-rate, or more and different "
            f"dialogues; the state is in {run.folder}, and the same command with --resume --publish always "
            "publishes it"
        )
    return _publish(run, metrics, answers, warnings)


def _publish(run: Run, metrics: dict[str, Any], answers: list[Comparison], warnings: list[str]) -> TrainResult:
    trained = {target: weight.map(lambda tensor: tensor.detach().cpu()) for target, weight in run.weights.items()}
    rejections = run.facts.rejections
    card = write_card(run.options.name, run.base.name, run.recipe, metrics, rejections, answers, warnings)
    manifest = {
        "base_fingerprint": run.base.fingerprint,
        "base_name": run.base.name,
        "parents": [run.start.parent] if run.start.parent else [],
        "data_sha256": run.data.sha256,
        "recipe": run.recipe,
        "metrics": metrics,
        "warnings": warnings,
        "description": f"trained on {len(run.dataset)} {run.options.rows_are} of {run.data.name}",
    }
    files: dict[str, bytes | Path] = {
        "README.md": card.encode(),
        CURVE: loss_curve(run.metrics.losses, run.metrics.val_losses, run.best.step),
        METRICS: run.metrics.path,
    }
    adapter = Adapter(trained, run.options.name)
    record = run.registry.publish(run.options.name, adapter, run.start.config, manifest, files)
    return TrainResult(record, metrics)


def _figures(run: Run, perplexity_base: float) -> dict[str, Any]:
    return figures_of(run.metrics.records, run.best, run.per_epoch, run.seconds) | {
        "perplexity_base": round(perplexity_base, 3),
        "perplexity": round(perplexity(run.base, run.optimizer.stack), 3),
        "dialogues": len(run.dataset),
        "rejected_rows": run.facts.rejections.rows,
        "num_parameters": sum(w.num_parameters for w in run.weights.values()),
    }
