"""The figures of a finished run, as the card, the manifest and the terminal have them."""

from collections.abc import Mapping, Sequence
from typing import Any

from loraserve.train.best import BestWeights


def figures_of(
    records: Sequence[Mapping[str, Any]], best: BestWeights, per_epoch: int, seconds: float
) -> dict[str, Any]:
    """Sum up what was logged.

    Args:
        records: as `Metrics` keeps them; those of micro-batches have `loss`, `tokens` and `supervised_tokens`, and of
            preference pairs `pairs`, `reward_margin` and `accuracy`, which are means over them.
        per_epoch: micro-batches in an epoch; the training loss is the mean of the last one.
        seconds: time trained.
    """
    steps = [record for record in records if "loss" in record]
    last = steps[-per_epoch:]
    tokens = sum(record["tokens"] for record in steps)
    return {
        "loss": _mean("loss", last),
        "val_loss": None if best.loss is None else round(best.loss, 4),
        "val_loss_base": None if best.base_loss is None else round(best.base_loss, 4),
        "val_loss_initial": None if best.initial_loss is None else round(best.initial_loss, 4),
        "best_epoch": best.step // per_epoch if best.step else None,
        **_preferences(records, last, best),
        "steps": len(steps),
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
    }


def _mean(figure: str, records: Sequence[Mapping[str, Any]]) -> float:
    """Of micro-batches, each weighed by its pairs or supervised tokens."""
    weights = [record.get("pairs") or record["supervised_tokens"] for record in records]
    return round(sum(r[figure] * w for r, w in zip(records, weights, strict=True)) / max(sum(weights), 1), 4)


def _preferences(
    records: Sequence[Mapping[str, Any]], last: Sequence[Mapping[str, Any]], best: BestWeights
) -> dict[str, Any]:
    if not last or "pairs" not in last[0]:
        return {}
    accuracies = {record["step"]: record["val_accuracy"] for record in records if "val_accuracy" in record}
    return {
        "reward_margin": _mean("reward_margin", last),
        "accuracy": _mean("accuracy", last),
        "val_accuracy": accuracies.get(best.step) if best.step else None,
    }
