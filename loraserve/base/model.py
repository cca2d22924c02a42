"""The frozen base: one forward pass for serving and for training.

    logits = model(input_ids, positions, attention, lora)

Tokens of all sequences are laid flat, `input_ids` and `positions` (N,). What a sequence is, where its keys and values
live and which rows may see which is the business of `attention`, an object with

    attend(layer, q (N, H, D), k (N, KV, D), v (N, KV, D)) -> (N, H, D)

Every linear layer adds `lora`'s delta for its module path; with `lora=None` no adapter code runs. Parameter names are
MiniMind's and Hugging Face's, so a checkpoint's tensors load by name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loraserve.base import fused
from loraserve.base.config import ModelConfig
from loraserve.base.linear import Attention, Joint, Linear
from loraserve.base.recompute import recompute
from loraserve.base.rope import Rope, rotate
from loraserve.kernels import cpu, dispatch, train
from loraserve.lora.batch import LoraBatch


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float, in_float32: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.in_float32 = in_float32
        self.weight_in_float32 = torch.empty(0)

    def pack(self) -> None:
        if not self.weight_in_float32.numel():
            self.weight_in_float32 = self.weight.detach().float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return self._normed(x)
        if train.available(x):
            return train.rms_norm(x, self.weight.float(), self.eps, not self.in_float32)
        return recompute(self._normed, x)

    def _normed(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight.float(), self.eps)
        normed = F.rms_norm(x.float(), (x.shape[-1],), self.weight.float() if self.in_float32 else None, self.eps)
        return normed.to(x.dtype) if self.in_float32 else self.weight * normed.to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        path, hidden, dim = f"model.layers.{layer}.self_attn", config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, dim
        self.heads = config.num_attention_heads, config.num_key_value_heads, dim
        self.q_proj = Linear(f"{path}.q_proj", hidden, config.num_attention_heads * dim)
        self.k_proj = Linear(f"{path}.k_proj", hidden, config.num_key_value_heads * dim)
        self.v_proj = Linear(f"{path}.v_proj", hidden, config.num_key_value_heads * dim)
        self.o_proj = Linear(f"{path}.o_proj", config.num_attention_heads * dim, hidden)
        if config.qk_norm:
            self.q_norm = RMSNorm(dim, config.rms_norm_eps, config.norm_in_float32)
            self.k_norm = RMSNorm(dim, config.rms_norm_eps, config.norm_in_float32)
        self.qk_norm = config.qk_norm
        self.qkv, self.out = Joint(self.q_proj, self.k_proj, self.v_proj), Joint(self.o_proj)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, lora: LoraBatch | None) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x, lora))  # (N, H or KV, D)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out = attention.attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.out(out.flatten(-2), lora)[0]


class SwiGLU(nn.Module):
    def __init__(self, path: str, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(f"{path}.gate_proj", hidden, width)
        self.up_proj = Linear(f"{path}.up_proj", hidden, width)
        self.down_proj = Linear(f"{path}.down_proj", width, hidden)
        self.gate_up, self.down = Joint(self.gate_proj, self.up_proj), Joint(self.down_proj)

        self.fused = False

    def forward(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        if self.fused and not torch.is_grad_enabled():
            return fused.swiglu(self, x, lora)
        gate, up = self.gate_up(x, lora)
        gated = train.silu_and_multiply(gate, up) if train.available(gate) else recompute(_gated, gate, up)
        return self.down(gated, lora)[0]


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class MixtureOfExperts(nn.Module):
    """Routed experts, plus MiniMind 2's shared ones, which see every token."""

    def __init__(self, config: ModelConfig, path: str) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(f"{path}.gate", hidden, config.num_experts)
        self.router = Joint(self.gate, exact=True)
        self.experts = nn.ModuleList(SwiGLU(f"{path}.experts.{e}", hidden, width) for e in range(config.num_experts))
        self.shared_experts = nn.ModuleList(
            SwiGLU(f"{path}.shared_experts.{e}", hidden, width) for e in range(config.num_shared_experts)
        )

    def forward(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        scores = self.router(x, lora)[0].float().softmax(dim=-1)  # (N, E)
        weights, chosen = scores.topk(self.top_k, dim=-1)  # (N, top_k)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, rank = (chosen == e).nonzero(as_tuple=True)
            if rows.numel():
                out = expert(x[rows], lora.select(rows) if lora is not None else None)
                y = y.index_add(0, rows, (out * weights[rows, rank].unsqueeze(1)).to(y.dtype))
        for expert in self.shared_experts:
            y = y + expert(x, lora)
        return y


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        path = f"model.layers.{layer}.mlp"
        norm = (config.hidden_size, config.rms_norm_eps, config.norm_in_float32)
        self.input_layernorm = RMSNorm(*norm)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.mlp: nn.Module
        if config.num_experts:
            self.mlp = MixtureOfExperts(config, path)
        else:
            self.mlp = SwiGLU(path, config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, lora: LoraBatch | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention, lora)
        return x + self.mlp(self.post_attention_layernorm(x), lora)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_in_float32)
        self.rope = Rope(config)
        self.fused = False
        self.one_call: fused.OneCall | None = None

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        lora: LoraBatch | None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Compute the normed hidden states (N, hidden); see `Model.forward`.

        Args:
            checkpointing: for the backward pass keep only each block's input and run the block again there.
        """
        if self.fused and not torch.is_grad_enabled():
            return fused.hidden_states(self, input_ids, positions, attention, lora)
        cos, sin = self.rope(positions, attention.max_position)
        x = self.embed_tokens(input_ids)  # (N, hidden)
        for layer in self.layers:
            if checkpointing:
                x = checkpoint(layer, x, cos, sin, attention, lora, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, attention, lora)
        return self.norm(x)


class Model(nn.Module):
    """A base with its language-model head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear("lm_head", config.hidden_size, config.vocab_size)
        self.head = Joint(self.lm_head)
        self.quantized: str | None = None
        """How the blocks' linear layers are kept in fewer bits, one of `quantize.QUANTIZATIONS`; for training alone."""
        self.packing: tuple[bool, bool] | None = None
        """Whether it was packed in int8, and repeatable; None before."""
        self.tie()

    def tie(self) -> None:
        """Let the head be the embeddings, if the configuration says so."""
        if self.config.tie_word_embeddings:
            embeddings = self.model.embed_tokens.weight
            assert isinstance(embeddings, nn.Parameter)
            self.lm_head.weight = embeddings

    def pack(self, int8: bool = False, repeatable: bool = False) -> None:
        """Prepare the linear layers for serving; the weights must not change afterwards.

        Args:
            int8, repeatable: see `Joint.pack`.
        """
        weight = self.model.embed_tokens.weight
        assert isinstance(weight, Tensor) and self.quantized is None
        kernels = self.config.head_dim <= cpu.MAX_HEAD_DIM and dispatch.of(weight.device, weight.dtype) is not None
        self.packing = self.packing or (int8, repeatable)
        for module in self.modules():
            if isinstance(module, Joint):
                module.pack(*self.packing)
            if isinstance(module, RMSNorm):
                module.pack()
            if isinstance(module, Decoder | SwiGLU):
                module.fused = kernels
        self.model.one_call = fused.one_call(self.model) if kernels and weight.device.type == "cpu" else None

    def pack_for_training(self) -> None:
        """Prepare the linear layers for gradients, see `Linear.pack_for_training`.

        In bfloat16 alone: there torch is slow on many processors, and what it takes is made up for by the activations.
        """
        if self.lm_head.weight.dtype == torch.bfloat16:
            for module in self.modules():
                if isinstance(module, Linear):
                    module.pack_for_training()

    def bytes_to_pack(self, dtype: torch.dtype, device: torch.device) -> int:
        """What `pack_for_training` will take on top of weights in `dtype` on `device`."""
        layers = [module for module in self.modules() if isinstance(module, Linear) and module.packs(dtype, device)]
        return 2 * dtype.itemsize * sum(layer.weight.numel() for layer in layers) if dtype == torch.bfloat16 else 0

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        lora: LoraBatch | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Compute logits.

        Args:
            input_ids: (N,) int64, the tokens of all sequences laid flat.
            positions: (N,) int64, each token's position in its own sequence.
            attention: keys, values and borders of the sequences.
            lora: the adapters of the rows, or None for the base alone.
            rows: (M,) int64, the rows whose logits are wanted; all by default. On the CPU nobody waits for them.

        Returns:
            (M, vocab_size) logits in the model's dtype.
        """
        hidden_states = self.model(input_ids, positions, attention, lora)  # (N, hidden)
        if rows is not None:
            hidden_states = hidden_states[rows.to(hidden_states.device, non_blocking=True)]
            lora = lora.select(rows) if lora is not None else None
        return self.head(hidden_states, lora)[0]
