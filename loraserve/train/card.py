"""The card of a trained adapter: README.md with the loss curve as a picture, the recipe and answers side by side."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from loraserve.train.rows import Rejections
from loraserve.train.samples import Comparison

CURVE = "loss.png"


def loss_curve(losses: Sequence[tuple[int, float]], val_losses: Sequence[tuple[int, float]]) -> bytes:
    """Draw the curve as a PNG: every micro-batch pale, their running mean in front, validation as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = [step for step, _ in losses]
    axes.plot(steps, [loss for _, loss in losses], color="#9ecae1", linewidth=0.8, label="micro-batch")
    axes.plot(steps, _smoothed([loss for _, loss in losses]), color="#08519c", linewidth=1.8, label="running mean")
    if val_losses:
        axes.plot(*zip(*val_losses, strict=True), color="#d94801", marker="o", linewidth=1.2, label="validation")
    axes.set_xlabel("micro-batch")
    axes.set_ylabel("loss per supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential mean over about a twentieth of the run, without its start-up bias."""
    keep = 1 - 1 / max(len(values) / 20, 1)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def write_card(
    name: str,
    base_name: str,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, Any],
    rejections: Rejections,
    answers: Sequence[Comparison],
) -> str:
    """Return the card's Markdown, with the header the Hugging Face hub reads."""
    header = {
        "base_model": base_name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "loraserve"],
    }
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()), "---", ""]
    lines += [
        f"# {name}",
        "",
        f"A LoRA adapter for `{base_name}`, trained by `loraserve train` on {metrics['dialogues']} dialogues of "
        f"`{recipe['data']}` ({metrics['num_parameters']:,} parameters, rank {recipe['r']}).",
        "",
        *(
            [f"{rejections.rows:,} rows of the file were left out: {_cell(str(rejections))}.", ""]
            * bool(rejections.rows)
        ),
        f"![Training loss over {metrics['steps']} micro-batches]({CURVE})",
        "",
        "| result | |",
        "| --- | --- |",
        *(f"| {label} | {metrics[key]} |" for key, label in RESULTS.items() if metrics.get(key) is not None),
        "",
        "| recipe | |",
        "| --- | --- |",
        *(f"| {key} | {_cell(value)} |" for key, value in recipe.items() if value is not None),
    ]
    if answers:
        lines += ["", "## Before and after", "", "Greedy answers to questions of the training file.", ""]
        lines += ["| question | base | with this adapter |", "| --- | --- | --- |"]
        lines += [f"| {_cell(a.question)} | {_cell(a.before)} | {_cell(a.after)} |" for a in answers]
    return "\n".join(lines) + "\n"


RESULTS = {
    "loss": "loss at the end",
    "val_loss": "validation loss",
    "steps": "micro-batches",
    "tokens": "tokens trained",
    "seconds": "seconds",
    "tokens_per_second": "tokens/s",
}


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
