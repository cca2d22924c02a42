"""Optimizer steps over the weights of one adapter, or of several that share each pass; the base never changes.

One step takes a window of micro-batches, adds up their gradients, clips the sum and applies AdamW (torch's defaults).
With LoRA+ (arXiv:2402.12354) B learns at a multiple of A's rate, and as in PEFT so do DoRA's magnitudes.

    tokens:  loss = Σ over the window of summed cross-entropy / supervised tokens of the window
    mean:    loss = Σ over the window of mean cross-entropy / accumulation_steps

Of preference pairs it is the loss of `preference`, and a pair counts as a token does here.

With `tokens` a window is exactly one big batch; `mean` is MiniMind's, where experts add their router loss. Weights and
optimizer state change only at the end of a window, so an interruption inside one leaves the state of the last step.
float16 scales the loss so that gradients do not vanish.

Adapters that step together lie in one pass, each on its own rows (`advance_together`). A row meets one adapter, so the
gradient of the sum of their losses is each one's own; loss, scale, clipping and AdamW are one adapter's as if it were
alone, and what is not finite in one reaches no other.

Several processes run a share of the rows each (`shares`) and then take the same step by the sum of their gradients.
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
from loraserve.lora.dora import WeightOf
from loraserve.lora.stack import AdapterStack
from loraserve.train.batch import PackedBatch, RouterLoss, token_losses
from loraserve.train.dora import DoraNorms
from loraserve.train.preference import Preference, preference_loss
from loraserve.train.ranks import ALONE, Ranks
from loraserve.train.schedule import learning_rate
from loraserve.train.shares import own_passes, sum_gradients


@dataclass(frozen=True)
class StepRecord:
    """What one micro-batch did."""

    step: int
    """Micro-batches so far, this one included."""
    loss: float
    """Mean cross-entropy over its supervised tokens, or mean loss over its pairs."""
    lr: float
    """Of A; LoRA+ takes a multiple of it for the others."""
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
        weights: {target: LoraWeight} whose tensors are float32 parameters on the model's device.
        weight_of: the base's weights; DoRA needs them.
        total_steps: micro-batches of the whole run, for the schedule.
        lora_plus_ratio: the learning rate of B and magnitudes by that of A, which is the scheduled one.
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
        weight_of: WeightOf | None = None,
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
        self.dora = DoraNorms(weights, weight_of)
        self.step = 0
        self._total, self._peak, self._clip = total_steps, peak_learning_rate, grad_clip
        self._accumulation, self._mean = accumulation_steps, loss_reduction == "mean"
        self.checkpointing, self.max_rows = checkpointing, max_rows
        self.preference = preference
        self._parameters = [tensor for weight in weights.values() for tensor in weight.tensors]
        self._ratios = (1.0, lora_plus_ratio)  # of the two groups, A's and all others
        halves = [w.A for w in weights.values()], [t for w in weights.values() for t in w.tensors if t is not w.A]
        rates = [peak_learning_rate * ratio for ratio in self._ratios]
        groups = [{"params": half, "lr": rate} for half, rate in zip(halves, rates, strict=True)]
        self._adamw = torch.optim.AdamW(groups, fused=True)
        half = model.lm_head.weight.dtype == torch.float16
        self._scaler = torch.amp.GradScaler(model.lm_head.weight.device.type, enabled=half)

    @property
    @torch.no_grad()
    def stack(self) -> AdapterStack:
        """The adapter as it is now, for passes without gradients."""
        self.dora.measure()
        return AdapterStack([self.dora.weights()])

    def advance(self, window: Sequence[PackedBatch], stop: Callable[[], bool] = lambda: False) -> list[StepRecord]:
        """Take one optimizer step over the micro-batches of `window`.

        Args:
            stop: asked before and after every pass; once true the window is abandoned.

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

    def _count(self, batch: PackedBatch) -> int:
        """What its mean loss is over: tokens or pairs."""
        return batch.num_supervised if self.preference is None else batch.num_pairs

    def _ratios_of(self, part: PackedBatch) -> Tensor | None:
        return None if self.preference is None else self.preference.reference_ratios(self.model, part)

    def _loss(self, part: PackedBatch, losses: Tensor, ratios: Tensor | None, figures: Tensor) -> Tensor:
        """The loss summed over a part's tokens or pairs; `figures` (3,) gets what its pairs add to them."""
        if self.preference is None or ratios is None:
            return losses.sum()
        margins = self.preference.margins(part, losses, ratios)
        figures[1] += margins.detach().sum()
        figures[2] += (margins > 0).sum()
        return preference_loss(margins)

    def _to_minimize(
        self, loss: Tensor, router_loss: Tensor | float, part: PackedBatch, of: "_Window", i: int
    ) -> Tensor:
        """What a part of the micro-batch `i` of a window adds to the loss of the window, scaled for float16."""
        if self._mean:
            share = part.num_rows / of.batches[i].num_rows
            return self._scaler.scale((loss / of.counts[i] + share * router_loss) / self._accumulation)
        return self._scaler.scale(loss / sum(of.counts))

    def _finish(self, of: "_Window") -> list[StepRecord]:
        """Step by the gradients that are there."""
        window = of.batches
        self._scaler.scale(of.figures)  # for the scaler to be ready where no row was run
        self._scaler.unscale_(self._adamw)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        *flat, grad_norm = torch.cat([of.figures.flatten(), norm.reshape(1)]).tolist()
        values, margins, right = flat[::3], flat[1::3], flat[2::3]
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
                **({} if self.preference is None else _rewards(of.counts[i], margins[i], right[i])),
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
        return [(t, label, tensor) for t, w in self.weights.items() for label, tensor in w.named_tensors.items()]


@dataclass(frozen=True)
class _Window:
    """The micro-batches of one optimizer step of one adapter, and what comes of each, over all ranks in the end."""

    batches: Sequence[PackedBatch]
    counts: list[int]
    figures: Tensor
    """(micro-batches, 3): mean loss over `counts`, and of pairs the sum of the margins and how many are above 0."""

    @classmethod
    def of(cls, optimizer: AdapterOptimizer, batches: Sequence[PackedBatch]) -> "_Window":
        figures = torch.zeros(len(batches), 3, device=optimizer.model.lm_head.weight.device)
        return cls(batches, [optimizer._count(batch) for batch in batches], figures)


def advance_together(
    optimizers: Sequence[AdapterOptimizer],
    windows: Sequence[Sequence[PackedBatch]],
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> list[list[StepRecord] | TrainingFailed] | None:
    """Take one optimizer step of each of several adapters on one base; their micro-batches share passes.

    Args:
        optimizers: all with the same `checkpointing` and `max_rows`, which is the limit of a shared pass.
        windows: of each, its micro-batches; their numbers may differ.
        stop: asked before and after every pass; once true on any rank all windows are abandoned on all.
        ranks: the processes that take this step together, all with the same windows.

    Returns:
        of each, a record per micro-batch, or why it could not step, and then its weights and optimizer are as before;
        None if the windows were abandoned, and then nothing has changed.
    """
    lead = optimizers[0]
    for optimizer in optimizers:
        optimizer.dora.measure()
    work = [_Window.of(optimizer, window) for optimizer, window in zip(optimizers, windows, strict=True)]
    router = RouterLoss(lead.model)
    stopped = stop()
    for i, parts in own_passes(windows, lead.max_rows, ranks):
        if stopped:
            break
        stack = AdapterStack([optimizer.dora.weights() for optimizer in optimizers])
        ratios = [optimizers[slot]._ratios_of(part) for slot, part in parts]
        with router:  # not in the backward pass, which may run blocks again
            losses = token_losses(lead.model, parts, stack, checkpointing=lead.checkpointing)
        router_losses = router.take([part.num_rows for _, part in parts])
        shares = []
        for (slot, part), each, ratio, router_loss in zip(parts, losses, ratios, router_losses, strict=True):
            window = work[slot]
            loss = optimizers[slot]._loss(part, each, ratio, window.figures[i])
            window.figures[i, 0] += loss.detach() / window.counts[i]
            shares.append(optimizers[slot]._to_minimize(loss, router_loss, part, window, i))
        torch.stack(shares).sum().backward()
        stopped = stop()
    if ranks.any(stopped):
        for optimizer in optimizers:
            optimizer._abandon()
        return None
    parameters = [parameter for optimizer in optimizers for parameter in optimizer._parameters]
    sum_gradients(parameters, [window.figures for window in work], ranks)
    return [_outcome(optimizer, window) for optimizer, window in zip(optimizers, work, strict=True)]


def _outcome(optimizer: AdapterOptimizer, window: _Window) -> list[StepRecord] | TrainingFailed:
    try:
        return optimizer._finish(window)
    except TrainingFailed as error:
        return error


def _rewards(pairs: int, margins: float, right: float) -> dict[str, Any]:
    """What a record has of a micro-batch's pairs, of the sum of their margins and the number above 0."""
    return {"pairs": pairs, "reward_margin": margins / pairs, "accuracy": right / pairs}
