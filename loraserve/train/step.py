"""Optimizer steps over an adapter's weights; the base never changes.

One step takes a window of micro-batches, adds up their gradients, clips the sum and applies AdamW (torch's defaults).
With LoRA+ (arXiv:2402.12354) B learns at a multiple of A's rate.

    tokens:  loss = Σ over the window of summed cross-entropy / supervised tokens of the window
    mean:    loss = Σ over the window of mean cross-entropy / accumulation_steps

Of preference pairs it is the loss of `preference`, and a pair counts as a token does here.

With `tokens` a window is exactly one big batch; `mean` is MiniMind's, where experts add their router loss. Weights and
optimizer state change only at the end of a window, so an interruption inside one leaves the state of the last step.
float16 scales the loss so that gradients do not vanish.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraserve.base.model import Model
from loraserve.errors import TrainingFailed
from loraserve.lora.adapter import LoraWeight
from loraserve.lora.stack import AdapterStack
from loraserve.train.batch import PackedBatch, RouterLoss, summed_loss
from loraserve.train.preference import Preference, preference_loss
from loraserve.train.schedule import learning_rate


@dataclass(frozen=True)
class StepRecord:
    """What one micro-batch did."""

    step: int
    """Micro-batches so far, this one included."""
    loss: float
    """Mean cross-entropy over its supervised tokens, or mean loss over its pairs."""
    lr: float
    """Of A; LoRA+ takes a multiple of it for B."""
    grad_norm: float | None
    """Before clipping; None where no optimizer step follows this micro-batch."""
    supervised_tokens: int
    tokens: int
    """Rows run."""
    pairs: int | None = None
    reward_margin: float | None = None
    """Mean over pairs."""
    accuracy: float | None = None
    """The share of pairs whose chosen answer has the higher reward."""


class AdapterOptimizer:
    """Trains `weights` on `model`.

    Args:
        model: the frozen base.
        weights: {target: LoraWeight} whose A and B are float32 parameters on the model's device.
        total_steps: micro-batches of the whole run, for the schedule.
        lora_plus_ratio: the learning rate of B by that of A, which is the scheduled one.
        loss_reduction: `tokens` or `mean`.
        checkpointing: run each block again in the backward pass and keep only its input.
        max_rows: split a micro-batch into passes of up to so many rows, see `PackedBatch.split`; the losses and the
            gradients are the whole one's, except that with `mean` experts are balanced within each part.
        preference: what pairs are judged by; None trains on dialogues.
    """

    def __init__(
        self,
        model: Model,
        weights: Mapping[str, LoraWeight],
        *,
        total_steps: int,
        peak_learning_rate: float,
        lora_plus_ratio: float = 1.0,
        grad_clip: float = 1.0,
        accumulation_steps: int = 1,
        loss_reduction: str = "tokens",
        checkpointing: bool = False,
        max_rows: int | None = None,
        preference: Preference | None = None,
    ) -> None:
        self.model, self.weights = model, weights
        self.stack = AdapterStack([weights])
        self.step = 0
        self._total, self._peak, self._clip = total_steps, peak_learning_rate, grad_clip
        self._accumulation, self._mean = accumulation_steps, loss_reduction == "mean"
        self._checkpointing, self._max_rows = checkpointing, max_rows
        self._preference = preference
        self._parameters = [tensor for weight in weights.values() for tensor in (weight.A, weight.B)]
        self._ratios = (1.0, lora_plus_ratio)  # of the two groups, A's and B's
        halves = [w.A for w in weights.values()], [w.B for w in weights.values()]
        groups = [
            {"params": half, "lr": peak_learning_rate * ratio} for half, ratio in zip(halves, self._ratios, strict=True)
        ]
        self._adamw = torch.optim.AdamW(groups, fused=True)
        half = model.lm_head.weight.dtype == torch.float16
        self._scaler = torch.amp.GradScaler(model.lm_head.weight.device.type, enabled=half)

    def advance(self, window: Sequence[PackedBatch], stop: Callable[[], bool] = lambda: False) -> list[StepRecord]:
        """Take one optimizer step over the micro-batches of `window`.

        Args:
            stop: asked after every pass; once true the window is abandoned.

        Returns:
            a record per micro-batch; none if it was abandoned, and then nothing has changed.

        Raises:
            TrainingFailed: the loss or the gradient is not finite; weights and optimizer are as before the window.
        """
        counts = [batch.num_supervised if self._preference is None else batch.num_pairs for batch in window]
        losses: list[Tensor] = []
        margins: list[list[Tensor]] = []
        router = RouterLoss(self.model)
        for batch, count in zip(window, counts, strict=True):
            margins.append([])
            losses.append(torch.zeros((), device=self.model.lm_head.weight.device))
            for part in batch.split(self._max_rows):
                loss = self._loss(part, router, margins[-1])
                losses[-1] += loss.detach() / count
                router_loss = router.take()
                if self._mean:
                    share = part.num_rows / batch.num_rows
                    loss = (loss / count + share * router_loss) / self._accumulation
                else:
                    loss = loss / sum(counts)
                self._scaler.scale(loss).backward()
                if stop():
                    self._adamw.zero_grad()
                    return []
        self._scaler.unscale_(self._adamw)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        *values, grad_norm = torch.stack([*losses, norm]).tolist()
        rates = [learning_rate(self.step + i, self._total, self._peak) for i in range(1, len(window) + 1)]
        self._check_finite(values, grad_norm, rates[-1])
        for group, ratio in zip(self._adamw.param_groups, self._ratios, strict=True):
            group["lr"] = rates[-1] * ratio
        self._scaler.step(self._adamw)
        self._scaler.update()
        self._adamw.zero_grad()
        self.step += len(window)
        return [
            StepRecord(
                step=self.step - len(window) + i + 1,
                loss=values[i],
                lr=rates[i],
                grad_norm=grad_norm if i == len(window) - 1 else None,
                supervised_tokens=batch.num_supervised,
                tokens=batch.num_rows,
                **_rewards(margins[i]),
            )
            for i, batch in enumerate(window)
        ]

    def _loss(self, part: PackedBatch, router: RouterLoss, margins: list[Tensor]) -> Tensor:
        """The loss summed over a part's tokens or pairs; `margins` gets those of its pairs."""
        if self._preference is None:
            with router:  # not in the backward pass, which may run blocks again
                return summed_loss(self.model, part, self.stack, checkpointing=self._checkpointing)
        ratios = self._preference.reference_ratios(self.model, part)
        with router:
            found = self._preference.margins(self.model, part, self.stack, ratios, checkpointing=self._checkpointing)
        margins.append(found.detach())
        return preference_loss(found)

    def _check_finite(self, losses: list[float], grad_norm: float, rate: float) -> None:
        wrong = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if wrong is not None:
            what, value, step = "loss", losses[wrong], self.step + wrong + 1
        elif not math.isfinite(grad_norm) and not self._scaler.is_enabled():  # the scaler skips such a step by itself
            what, value, step = "gradient", grad_norm, self.step + len(losses)
        else:
            return
        self._adamw.zero_grad()
        advice = "or --dtype float32" if self.model.lm_head.weight.dtype != torch.float32 else "or a lower --grad-clip"
        raise TrainingFailed(
            f"the {what} became {value} at step {step} of {self._total} (learning rate {rate:.2e}); nothing was "
            f"published; try --learning-rate {self._peak / 10:.0e} {advice}",
            param="learning_rate",
        )

    def state(self) -> dict[str, Any]:
        """Everything that changes while training, as it is until the next step: save it before."""
        weights = {f"{target}.{label}": tensor for target, label, tensor in self._named()}
        return {
            "step": self.step,
            "weights": {name: tensor.detach().cpu() for name, tensor in weights.items()},
            "optimizer": self._adamw.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    @torch.no_grad()
    def load(self, step: int, weights: Mapping[str, Tensor], optimizer: dict[str, Any], scaler: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        self.step = step
        for target, label, tensor in self._named():
            tensor.copy_(weights[f"{target}.{label}"])
        self._adamw.load_state_dict(optimizer)
        self._scaler.load_state_dict(scaler)

    def _named(self) -> list[tuple[str, str, Tensor]]:
        return [(t, label, tensor) for t, w in self.weights.items() for label, tensor in (("A", w.A), ("B", w.B))]


def _rewards(margins: list[Tensor]) -> dict[str, Any]:
    """The figures of a micro-batch's pairs; none of dialogues."""
    if not margins:
        return {}
    found = torch.cat(margins)  # (P,)
    accuracy = int((found > 0).sum()) / len(found)
    return {"pairs": len(found), "reward_margin": float(found.mean()), "accuracy": accuracy}
