"""The figures of a finished run, as the card, the manifest and the terminal have them."""

from collections.abc import Mapping, Sequence
from typing import Any

from loraserve.train.best import BestWeights


def figures_of(
    records: Sequence[Mapping[str, Any]], best: BestWeights, per_epoch: int, seconds: float
) -> dict[str, Any]:
    """Sum up what was logged.

    Args:
        records: as `Metrics` keeps them; those of micro-batches have `loss`, `tokens` and `supervised_tokens`.
        per_epoch: micro-batches in an epoch; the training loss is the mean of the last one.
        seconds: time trained.
    """
    steps = [record for record in records if "loss" in record]
    last = steps[-per_epoch:]
    supervised = sum(record["supervised_tokens"] for record in last)
    tokens = sum(record["tokens"] for record in steps)
    return {
        "loss": round(sum(r["loss"] * r["supervised_tokens"] for r in last) / max(supervised, 1), 4),
        "val_loss": None if best.loss is None else round(best.loss, 4),
        "val_loss_base": None if best.base_loss is None else round(best.base_loss, 4),
        "val_loss_initial": None if best.initial_loss is None else round(best.initial_loss, 4),
        "best_epoch": best.step // per_epoch if best.step else None,
        "steps": len(steps),
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
    }
