"""Optimizer steps over the weights of one adapter, or of several that share each pass; the base never changes.

One step takes a window of micro-batches, adds up their gradients, clips the sum and applies AdamW (torch's defaults).

    tokens:  loss = Σ over the window of summed cross-entropy / supervised tokens of the window
    mean:    loss = Σ over the window of mean cross-entropy / accumulation_steps

With `tokens` a window is exactly one big batch; `mean` is MiniMind's, where experts add their router loss. Weights and
optimizer state change only at the end of a window, so an interruption inside one leaves the state of the last step.
float16 scales the loss so that gradients do not vanish.

Adapters that step together lie in one pass, each on its own rows (`advance_together`). A row meets one adapter, so the
gradient of the sum of their losses is each one's own; loss, scale, clipping and AdamW are one adapter's as if it were
alone, and what is not finite in one reaches no other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from loraserve.base.model import Model
from loraserve.errors import TrainingFailed
from loraserve.lora.adapter import LoraWeight
from loraserve.lora.stack import AdapterStack
from loraserve.train.batch import PackedBatch, RouterLoss, passes, summed_losses
from loraserve.train.schedule import learning_rate


@dataclass(frozen=True)
class StepRecord:
    """What one micro-batch did."""

    step: int
    """Micro-batches so far, this one included."""
    loss: float
    """Mean cross-entropy over its supervised tokens."""
    lr: float
    grad_norm: float | None
    """Before clipping; None where no optimizer step follows this micro-batch."""
    supervised_tokens: int
    tokens: int
    """Rows run."""


class AdapterOptimizer:
    """Trains `weights` on `model`.

    Args:
        model: the frozen base.
        weights: {target: LoraWeight} whose A and B are float32 parameters on the model's device.
        total_steps: micro-batches of the whole run, for the schedule.
        loss_reduction: `tokens` or `mean`.
        checkpointing: run each block again in the backward pass and keep only its input.
        max_rows: split a micro-batch into passes of up to so many rows, see `PackedBatch.split`; the losses and the
            gradients are the whole one's, except that with `mean` experts are balanced within each part.
    """

    def __init__(
        self,
        model: Model,
        weights: Mapping[str, LoraWeight],
        *,
        total_steps: int,
        peak_learning_rate: float,
        grad_clip: float = 1.0,
        accumulation_steps: int = 1,
        loss_reduction: str = "tokens",
        checkpointing: bool = False,
        max_rows: int | None = None,
    ) -> None:
        self.model, self.weights = model, weights
        self.stack = AdapterStack([weights])
        self.step = 0
        self._total, self._peak, self._clip = total_steps, peak_learning_rate, grad_clip
        self._accumulation, self._mean = accumulation_steps, loss_reduction == "mean"
        self.checkpointing, self.max_rows = checkpointing, max_rows
        self._parameters = [tensor for weight in weights.values() for tensor in (weight.A, weight.B)]
        self._adamw = torch.optim.AdamW(self._parameters, lr=peak_learning_rate, fused=True)
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
        results = advance_together([self], [window], stop)
        if results is None:
            return []
        if isinstance(results[0], TrainingFailed):
            raise results[0]
        return results[0]

    def _to_minimize(
        self, loss: Tensor, router_loss: Tensor | float, part: PackedBatch, of: "_Window", i: int
    ) -> Tensor:
        """What a part of the micro-batch `i` of a window adds to the loss of the window, scaled for float16."""
        if self._mean:
            batch = of.batches[i]
            share = part.num_rows / batch.num_rows
            return self._scaler.scale((loss / batch.num_supervised + share * router_loss) / self._accumulation)
        return self._scaler.scale(loss / of.num_supervised)

    def _finish(self, window: Sequence[PackedBatch], losses: Sequence[Tensor]) -> list[StepRecord]:
        """Step by the gradients that are there; `losses` are the micro-batches' means, for the record."""
        self._scaler.unscale_(self._adamw)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        *values, grad_norm = torch.stack([*losses, norm]).tolist()
        rates = [learning_rate(self.step + i, self._total, self._peak) for i in range(1, len(window) + 1)]
        self._check_finite(values, grad_norm, rates[-1])
        for group in self._adamw.param_groups:
            group["lr"] = rates[-1]
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
            )
            for i, batch in enumerate(window)
        ]

    def _check_finite(self, losses: list[float], grad_norm: float, rate: float) -> None:
        wrong = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if wrong is not None:
            what, value, step = "loss", losses[wrong], self.step + wrong + 1
        elif not math.isfinite(grad_norm) and not self._scaler.is_enabled():  # the scaler skips such a step by itself
            what, value, step = "gradient", grad_norm, self.step + len(losses)
        else:
            return
        self._abandon()
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

    def _abandon(self) -> None:
        self._adamw.zero_grad()

    def _named(self) -> list[tuple[str, str, Tensor]]:
        return [(t, label, tensor) for t, w in self.weights.items() for label, tensor in (("A", w.A), ("B", w.B))]


@dataclass(frozen=True)
class _Window:
    """The micro-batches of one optimizer step of one adapter, and what their losses come to."""

    batches: Sequence[PackedBatch]
    losses: list[Tensor]
    """Mean cross-entropy of each."""

    @property
    def num_supervised(self) -> int:
        return sum(batch.num_supervised for batch in self.batches)


def advance_together(
    optimizers: Sequence[AdapterOptimizer],
    windows: Sequence[Sequence[PackedBatch]],
    stop: Callable[[], bool] = lambda: False,
) -> list[list[StepRecord] | TrainingFailed] | None:
    """Take one optimizer step of each of several adapters on one base; their micro-batches share passes.

    Args:
        optimizers: all with the same `checkpointing` and `max_rows`, which is the limit of a shared pass.
        windows: of each, its micro-batches; their numbers may differ.
        stop: asked after every pass; once true all windows are abandoned.

    Returns:
        of each, a record per micro-batch, or why it could not step, and then its weights and optimizer are as before;
        None if the windows were abandoned, and then nothing has changed.
    """
    lead = optimizers[0]
    model, device = lead.model, lead.model.lm_head.weight.device
    stack = AdapterStack([optimizer.weights for optimizer in optimizers])
    work = [_Window(window, [torch.zeros((), device=device) for _ in window]) for window in windows]
    router = RouterLoss(model)
    for i, batches in enumerate(zip_longest(*windows)):
        present = [(slot, batch) for slot, batch in enumerate(batches) if batch is not None]
        for parts in passes(present, lead.max_rows):
            with router:  # not in the backward pass, which may run blocks again
                losses = summed_losses(model, parts, stack, checkpointing=lead.checkpointing)
            router_losses = router.take([part.num_rows for _, part in parts])
            shares = []
            for (slot, part), loss, router_loss in zip(parts, losses, router_losses, strict=True):
                window = work[slot]
                window.losses[i] += loss.detach() / window.batches[i].num_supervised
                shares.append(optimizers[slot]._to_minimize(loss, router_loss, part, window, i))
            torch.stack(shares).sum().backward()
            if stop():
                for optimizer in optimizers:
                    optimizer._abandon()
                return None
    return [_outcome(optimizer, window) for optimizer, window in zip(optimizers, work, strict=True)]


def _outcome(optimizer: AdapterOptimizer, window: _Window) -> list[StepRecord] | TrainingFailed:
    try:
        return optimizer._finish(window.batches, window.losses)
    except TrainingFailed as error:
        return error
