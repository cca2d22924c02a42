"""The decoder's forward pass over kernels: what `Decoder.forward` computes, in a fifth of the calls.

Between two matrix products one kernel does all there is to do, and the residual stream stays in float32. For inference
with packed weights only; the plain pass is the tests' oracle. A step in which every row attends by itself, as those do
that decode, is a single call on a CPU, see `kernels/decoder.py`; that computes the same bits.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor

from loraserve.base.linear import Attention
from loraserve.kernels import cpu, dispatch
from loraserve.kernels.decoder import DecoderKernel, LayerWeights
from loraserve.kernels.dispatch import Kernels
from loraserve.lora.batch import LoraBatch
from loraserve.lora.stack import Sites

if TYPE_CHECKING:
    from loraserve.base.model import Block, Decoder, RMSNorm, SelfAttention, SwiGLU


@dataclass(frozen=True)
class OneCall:
    """A decoder that takes one call per step, and the layers that adapters meet in it."""

    kernel: DecoderKernel
    sites: Sites


def one_call(decoder: "Decoder") -> OneCall | None:
    """What computes steps of a packed decoder in one call; None if not all of it is packed for the C kernels."""
    blocks = cast("list[Block]", decoder.layers)
    layers: list[LayerWeights] = []
    sites: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
    for block in blocks:
        attention, mlp = block.self_attn, cast("SwiGLU", block.mlp)
        if not hasattr(mlp, "gate_up"):
            return None  # experts
        joints = [attention.qkv, attention.out, mlp.gate_up, mlp.down]
        linears = [joint.packed for joint in joints if joint.packed is not None]
        if len(linears) < len(joints):
            return None
        sites += [(joint.targets, tuple(joint.widths)) for joint in joints]
        norms = None
        if attention.qk_norm:
            norms = attention.q_norm.weight_in_float32, attention.k_norm.weight_in_float32
        before, between = block.input_layernorm, block.post_attention_layernorm
        layers.append(LayerWeights(before.weight_in_float32, between.weight_in_float32, norms, linears))
    norm, heads = decoder.norm, blocks[0].self_attn.heads
    kernel = DecoderKernel(layers, norm.weight_in_float32, heads, norm.eps, not norm.in_float32)
    return OneCall(kernel, tuple(sites))


def hidden_states(
    decoder: "Decoder", input_ids: Tensor, positions: Tensor, attention: Attention, lora: LoraBatch | None
) -> Tensor:
    """Return the last hidden states, (N, hidden) in the weights' dtype."""
    embedded = decoder.embed_tokens(input_ids)  # (N, hidden)
    dtype = embedded.dtype
    table = decoder.rope.reach(attention.max_position)
    if (one := decoder.one_call) is not None and (cached := attention.cached) is not None:
        entries = lora.in_one_call(cpu) if lora is not None else None
        if lora is None or entries is not None:
            adapters = lora.stack.sites(one.sites, dtype) if lora is not None else None
            return one.kernel.run(embedded, table, positions, cached, adapters, entries)
    x, y = embedded.float(), None
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
