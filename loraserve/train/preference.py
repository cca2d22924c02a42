"""Direct preference optimisation (DPO, arXiv:2305.18290): the better answer is to become likelier than the worse one.

    margin = β · ((log π(c) - log ref(c)) - (log π(r) - log ref(r)))
    loss   = -log σ(margin), its mean over pairs

where c is the chosen and r the rejected answer, log π the sum of its tokens' log-probabilities with the adapter in
training, and log ref the same of what the run starts from: the base alone, or the base with the adapter of
`--init-from`. Both are the one frozen model, so there is no second one in memory. `margin` is the difference of the
implicit rewards.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from loraserve.base.model import Model
from loraserve.lora.stack import AdapterStack
from loraserve.train.batch import PackedBatch, dialogue_losses, token_losses
from loraserve.train.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Preference:
    """What a pair is judged by."""

    beta: float
    """How much the reference holds the adapter back."""
    reference: AdapterStack | None
    """None is the base alone. Its tensors are not the ones in training."""

    @torch.no_grad()
    def reference_ratios(self, model: Model, batch: PackedBatch) -> Tensor:
        """log ref(c) - log ref(r) of each pair of a batch, (P,) float32."""
        return _log_ratios(batch, token_losses(model, [(0, batch)], self.reference)[0])

    def margins(self, batch: PackedBatch, losses: Tensor, ratios: Tensor) -> Tensor:
        """The margin of each pair, (P,) float32.

        Args:
            losses: (M,), of the batch's supervised tokens with the adapter in training, or of the base alone.
            ratios: what `reference_ratios` gives for the batch.
        """
        return self.beta * (_log_ratios(batch, losses) - ratios)


def _log_ratios(batch: PackedBatch, losses: Tensor) -> Tensor:
    chosen, rejected = dialogue_losses(batch, losses).view(-1, 2).unbind(dim=1)
    return rejected - chosen  # losses are negative log-probabilities


def preference_loss(margins: Tensor) -> Tensor:
    """The loss summed over pairs, a scalar."""
    return F.softplus(-margins).sum()


@torch.no_grad()
def validate(
    model: Model,
    batches: Iterable[PackedBatch],
    stack: AdapterStack | None,
    preference: Preference | None,
    ranks: Ranks = ALONE,
) -> tuple[float, float | None]:
    """The mean loss of held-out batches, per supervised token or per pair.

    Args:
        batches: this rank's; the figures are those of all.
        stack: the adapter to judge, or None for the base alone.
        preference: None for dialogues.

    Returns:
        the loss, and of pairs the share whose chosen answer has the higher reward.
    """
    total, right, count = 0.0, 0, 0
    for batch in batches:
        (losses,) = token_losses(model, [(0, batch)], stack)
        if preference is None:
            total += float(losses.sum())
            count += batch.num_supervised
            continue
        margins = preference.margins(batch, losses, preference.reference_ratios(model, batch))
        total += float(preference_loss(margins))
        right += int((margins > 0).sum())
        count += batch.num_pairs
    loss_sum, num_right, num = ranks.sum([total, right, count])
    return loss_sum / num, None if preference is None else num_right / num
