"""Cross-entropy over the vocabulary without ever holding more than a chunk of logits.

    loss = logsumexp(z) - z[target],   z = h Wᵀ,   dloss/dh = (softmax(z) - onehot(target)) W,   of each row

The head is frozen, so its gradient by the hidden states is complete as soon as a chunk's logits are there: it is
computed in the forward pass and the logits are dropped. A head with an adapter computes its chunks again instead.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loraserve.base.linear import Linear
from loraserve.base.model import Model
from loraserve.lora.batch import LoraBatch

CHUNK_ROWS = 512
"""Rows whose logits are there at once: enough for a fast product, 13 MB of float32 at 6,400 tokens."""
HALF_SCALE = 1024.0
"""Gradients wait in float16 multiplied by this, or the small ones would be rounded to nothing."""


def token_cross_entropy(
    model: Model, hidden_states: Tensor, targets: Tensor, lora: LoraBatch | None, rows: Tensor
) -> Tensor:
    """Return the cross-entropy of each row, (M,) float32.

    Args:
        hidden_states: (M, hidden), the decoder's output at the rows that predict.
        targets: (M,) int64.
        lora: the adapters of all rows of the pass.
        rows: (M,) int64 on the CPU: which of them these are.
    """
    head = model.lm_head
    if lora is None or not any(head.target in weights for weights in lora.stack.adapters):
        return _FrozenHead.apply(hidden_states, head, targets)
    losses = [
        checkpoint(_chunk_loss, model, hidden, target, lora.select(chunk), use_reentrant=False)
        for hidden, target, chunk in zip(*(x.split(CHUNK_ROWS) for x in (hidden_states, targets, rows)), strict=True)
    ]
    return torch.cat(losses)


def _chunk_loss(model: Model, hidden_states: Tensor, targets: Tensor, lora: LoraBatch) -> Tensor:
    return F.cross_entropy(model.lm_head(hidden_states, lora).float(), targets, reduction="none")


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, head: Linear, targets: Tensor) -> Tensor:
        losses = torch.empty(targets.numel(), device=hidden_states.device)
        gradient = torch.empty_like(hidden_states) if ctx.needs_input_grad[0] else None
        dtype = head.weight.dtype
        ctx.scale = HALF_SCALE if dtype == torch.float16 else 1.0
        for first in range(0, targets.numel(), CHUNK_ROWS):
            chunk = slice(first, first + CHUNK_ROWS)
            logits = head.product(hidden_states[chunk]).float()  # (m, V)
            target = targets[chunk].unsqueeze(1)
            normalizer = logits.logsumexp(dim=1, keepdim=True)
            losses[chunk] = (normalizer - logits.gather(1, target)).squeeze(1)
            if gradient is not None:
                logits.sub_(normalizer).exp_().scatter_add_(1, target, torch.full_like(normalizer, -1.0))
                gradient[chunk] = head.backward_product(logits.mul_(ctx.scale).to(dtype))
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, by_losses: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors  # (M, hidden)
        factors = (by_losses / ctx.scale).unsqueeze(1)
        result = torch.empty_like(gradient)
        for first in range(0, len(result), CHUNK_ROWS):  # products are float32
            chunk = slice(first, first + CHUNK_ROWS)
            result[chunk] = gradient[chunk] * factors[chunk]
        return result, None, None
