"""The card of a trained adapter: README.md with the loss curve as a picture, the recipe and answers side by side."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from loraserve.train.rows import Rejections
from loraserve.train.samples import Comparison
from loraserve.train.summary import before_and_after, failed_or

CURVE = "loss.png"


def loss_curve(
    losses: Sequence[tuple[int, float]], val_losses: Sequence[tuple[int, float]], best_step: int = 0
) -> bytes:
    """Draw the curve as a PNG: every micro-batch pale, their running mean in front, validation as dots.

    Args:
        best_step: where validation was best and the published weights are from; 0 marks nothing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = [step for step, _ in losses]
    axes.plot(steps, [loss for _, loss in losses], color="#9ecae1", linewidth=0.8, label="micro-batch")
    axes.plot(steps, _smoothed([loss for _, loss in losses]), color="#08519c", linewidth=1.8, label="running mean")
    if val_losses:
        axes.plot(*zip(*val_losses, strict=True), color="#d94801", marker="o", markersize=4, label="validation")
    best = dict(val_losses).get(best_step)
    if best_step and best is not None:
        axes.axvline(best_step, color="#d94801", linewidth=0.8, linestyle=":")
        published = f"best: {best:.3f}"
        axes.plot([best_step], [best], "*", color="#d94801", markersize=13, markeredgecolor="white", label=published)
    axes.set_xlabel("micro-batch")
    axes.set_ylabel("mean loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean of about a twentieth of the run around each place."""
    reach = len(values) // 40
    windows = [values[max(i - reach, 0) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def write_card(
    name: str,
    base_name: str,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, Any],
    rejections: Rejections,
    answers: Sequence[Comparison],
    warnings: Sequence[str] = (),
) -> str:
    """Return the card's Markdown, with the header the Hugging Face hub reads."""
    header = {
        "base_model": base_name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "loraserve"],
    }
    unit = "preference pairs" if recipe.get("objective") == "dpo" else "dialogues"
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()), "---", ""]
    lines += [
        f"# {name}",
        "",
        f"A LoRA adapter for `{base_name}`, trained by `loraserve train` on {metrics['dialogues']} {unit} of "
        f"`{recipe['data']}` ({metrics['num_parameters']:,} parameters, rank {recipe['r']}).",
        "",
        *(
            [f"{rejections.rows:,} rows of the file were left out: {_cell(str(rejections))}.", ""]
            * bool(rejections.rows)
        ),
        f"![Training loss over {metrics['steps']} micro-batches]({CURVE})",
        "",
        *_did_it_work(metrics, warnings),
        "| result | |",
        "| --- | --- |",
        *(f"| {label} | {metrics[key]} |" for key, label in RESULTS.items() if metrics.get(key) is not None),
        "",
        "| recipe | |",
        "| --- | --- |",
        *(f"| {key} | {_cell(value)} |" for key, value in recipe.items() if value is not None),
    ]
    if sweep := metrics.get("lr_sweep"):
        lines += [
            "",
            "Of these learning rates, all trained alike, the one with the lowest validation loss was kept.",
            "",
        ]
        lines += ["| learning rate | validation loss |", "| --- | --- |"]
        lines += [f"| {rate} | {failed_or(loss)} |" for rate, loss in sweep.items()]
    if answers:
        lines += [
            "",
            "## Before and after",
            "",
            "Greedy answers to questions of the file, those held out if there are any.",
            "",
        ]
        lines += ["| question | base | with this adapter |", "| --- | --- | --- |"]
        lines += [f"| {_cell(a.question)} | {_cell(a.before)} | {_cell(a.after)} |" for a in answers]
    return "\n".join(lines) + "\n"


def _did_it_work(metrics: Mapping[str, Any], warnings: Sequence[str]) -> list[str]:
    figures = before_and_after(metrics)
    rows = ["| | base | with this adapter |", "| --- | --- | --- |"] * bool(figures)
    rows += [f"| {what} | {before} | {after} |" for what, before, after in figures]
    doubts = ["", "Doubtful about it:", "", *(f"- {_cell(warning)}" for warning in warnings)] if warnings else []
    return [*rows, *doubts, ""] if rows or doubts else []


RESULTS = {
    "loss": "training loss of the last epoch",
    "val_loss_initial": "validation loss of the adapter it went on with",
    "reward_margin": "reward margin of the last epoch",
    "accuracy": "share of pairs with the chosen answer preferred, last epoch",
    "val_accuracy": "the same on validation",
    "best_epoch": "epoch of the published weights",
    "steps": "micro-batches",
    "tokens": "tokens trained",
    "seconds": "seconds",
    "tokens_per_second": "tokens/s",
}


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
