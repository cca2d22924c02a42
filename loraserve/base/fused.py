"""The decoder's forward pass over kernels: what `Decoder.forward` computes, in a fifth of the calls.

Between two matrix products one kernel does all there is to do, and the residual stream stays in float32. For inference
with packed weights only; the plain pass is the tests' oracle.
"""

from typing import TYPE_CHECKING, cast

from torch import Tensor

from loraserve.base.linear import Attention
from loraserve.kernels import dispatch
from loraserve.kernels.dispatch import Kernels
from loraserve.lora.batch import LoraBatch

if TYPE_CHECKING:
    from loraserve.base.model import Block, Decoder, RMSNorm, SelfAttention, SwiGLU


def hidden_states(
    decoder: "Decoder", input_ids: Tensor, positions: Tensor, attention: Attention, lora: LoraBatch | None
) -> Tensor:
    """Return the last hidden states, (N, hidden) in the weights' dtype."""
    embedded = decoder.embed_tokens(input_ids)  # (N, hidden)
    dtype = embedded.dtype
    x, y = embedded.float(), None
    table = decoder.rope.reach(attention.max_position)
    kernels = _kernels(embedded)

    def add_and_norm(norm: "RMSNorm") -> Tensor:
        return kernels.add_rms_norm(x, y, norm.weight_in_float32, norm.eps, not norm.in_float32, dtype)

    for layer in cast("list[Block]", decoder.layers):
        y = add_and_norm(layer.input_layernorm)
        y = _attention(layer.self_attn, kernels, y, table, positions, attention, lora)
        y = layer.mlp(add_and_norm(layer.post_attention_layernorm), lora)
    return add_and_norm(decoder.norm)


def _attention(
    block: "SelfAttention", kernels: Kernels, x: Tensor, table: Tensor, positions: Tensor, attention: Attention,
    lora: LoraBatch | None,
) -> Tensor:  # fmt: skip
    qkv = block.qkv.side_by_side(x, lora)
    h, kv, d = block.heads
    norms, eps, cast_first = None, 0.0, False
    if block.qk_norm:
        norms = block.q_norm.weight_in_float32, block.k_norm.weight_in_float32
        eps, cast_first = block.q_norm.eps, not block.q_norm.in_float32
    kernels.norm_and_rotate(qkv, block.heads, norms, eps, cast_first, table, positions)
    q, k, v = (part.unflatten(-1, (-1, d)) for part in qkv.split((h * d, kv * d, kv * d), dim=-1))
    return block.out(attention.attend(block.layer, q, k, v).flatten(-2), lora)[0]


def swiglu(block: "SwiGLU", x: Tensor, lora: LoraBatch | None) -> Tensor:
    """What `SwiGLU.forward` computes."""
    return block.down(_kernels(x).silu_and_multiply(block.gate_up.side_by_side(x, lora)), lora)[0]


def _kernels(x: Tensor) -> Kernels:
    """Those that `Model.pack` found."""
    kernels = dispatch.of(x.device, x.dtype)
    assert kernels is not None
    return kernels
