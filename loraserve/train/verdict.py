"""What the figures of a run mean, in plain words: each warning says what was seen and what to do.

Knows no model and no files: losses in, sentences out. Losses of single micro-batches jump with their dialogues, so they
are compared as means over a twentieth of the run, at least three.
"""

from collections.abc import Mapping, Sequence
from typing import Any

FEW_DIALOGUES = 50
SPIKE = 1.25
"""Training loss so many times that of the start is no accident of the batch."""
UNLEARNED = 0.98
"""Loss that fell by less than this factor did not fall."""
RISE = 1.02
FORGOTTEN = 1.5
"""Perplexity on general text grows a little with every adapter."""


def warnings_of(
    metrics: Mapping[str, Any],
    losses: Sequence[float],
    val_losses: Sequence[tuple[int, float]],
    *,
    per_epoch: int,
    learning_rate: float,
) -> list[str]:
    """Return what is doubtful about a run.

    Args:
        metrics: its figures: `dialogues`, `perplexity`, `perplexity_base`.
        losses: training loss of every micro-batch.
        val_losses: (micro-batches done, validation loss), the base's first.
        per_epoch: micro-batches in an epoch.
    """
    found = []
    if metrics["dialogues"] < FEW_DIALOGUES:
        found.append(
            f"only {metrics['dialogues']} dialogues: the adapter may know them by heart and little else; write at "
            f"least {FEW_DIALOGUES}, better some hundreds, in different words"
        )
    unsteady = _unsteady(losses)
    if unsteady:
        found.append(f"{unsteady}: the learning rate is too high; try --learning-rate {learning_rate / 3:.0e}")
    overfit = _overfit(losses, val_losses, per_epoch)
    if overfit:
        found.append(overfit)
    before, after = _progress(losses, val_losses)
    if not unsteady and after > UNLEARNED * before:
        found.append(
            f"hardly anything was learned (loss {before:.3f} before, {after:.3f} after): try --learning-rate "
            f"{learning_rate * 3:.0e}, more --epochs or a larger --rank"
        )
    if metrics["perplexity"] > FORGOTTEN * metrics["perplexity_base"]:
        found.append(
            f"the base forgot: perplexity on general text went from {metrics['perplexity_base']:.1f} to "
            f"{metrics['perplexity']:.1f}; lower --learning-rate or --epochs, mix everyday dialogues into the data, or "
            "use the adapter at a smaller weight, NAME:0.5"
        )
    return found


def _means(losses: Sequence[float]) -> list[float]:
    size = max(len(losses) // 20, 3)
    return [sum(losses[i : i + size]) / size for i in range(len(losses) - size + 1)]


def _unsteady(losses: Sequence[float]) -> str:
    means = _means(losses)
    if not means or max(means) <= SPIKE * means[0]:
        return ""
    if means[-1] > SPIKE * means[0]:
        return f"the training loss rose from {means[0]:.2f} to {means[-1]:.2f}"
    return f"the training loss jumped from {means[0]:.2f} to {max(means):.2f} on the way"


def _overfit(losses: Sequence[float], val_losses: Sequence[tuple[int, float]], per_epoch: int) -> str:
    trained = [(step, loss) for step, loss in val_losses if step]
    if len(trained) < 2:
        return ""
    step, best = min(trained, key=lambda entry: entry[1])
    last_step, last = trained[-1]
    fell = _epoch_mean(losses, last_step, per_epoch) < _epoch_mean(losses, step, per_epoch)
    if not (last > RISE * best and fell):
        return ""
    return (
        f"it began to learn the dialogues by heart after epoch {step // per_epoch}: validation loss went from "
        f"{best:.3f} to {last:.3f} while training loss fell; the weights of epoch {step // per_epoch} are kept; more "
        "dialogues, a smaller --rank or a lower --learning-rate help, --patience 2 saves the time"
    )


def _progress(losses: Sequence[float], val_losses: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The loss before and after: of validation if there is any, else of training."""
    if len(val_losses) > 1:
        return val_losses[0][1], min(loss for _, loss in val_losses[1:])
    size = max(len(losses) // 20, 3)
    return sum(losses[:size]) / len(losses[:size]), sum(losses[-size:]) / len(losses[-size:])


def _epoch_mean(losses: Sequence[float], end: int, per_epoch: int) -> float:
    epoch = losses[max(end - per_epoch, 0) : end]
    return sum(epoch) / len(epoch)
