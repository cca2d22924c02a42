"""Architecture of a base: one dataclass for MiniMind 2 and 3, Llama and Qwen3, dense and mixture of experts.

Knows no files and no tensors; `checkpoint` fills it from a `config.json` or from the shapes in a `.pth`.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder-only model; field names are Hugging Face's."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    qk_norm: bool = False
    """RMSNorm on each query and key head before RoPE (MiniMind-3, Qwen3)."""
    norm_in_float32: bool = False
    """Multiply by the norm's weight before casting back (MiniMind-3) and not after (MiniMind 2, Llama, Qwen3)."""
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    num_shared_experts: int = 0
    norm_topk_prob: bool = True
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = field(default=(2,))

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Every linear layer an adapter may target: {module path: (out_features, in_features)}."""
        hidden, inter = self.hidden_size, self.intermediate_size
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, int]] = {}

        def swiglu(path: str, width: int) -> None:
            shapes[f"{path}.gate_proj"] = (width, hidden)
            shapes[f"{path}.up_proj"] = (width, hidden)
            shapes[f"{path}.down_proj"] = (hidden, width)

        for i in range(self.num_hidden_layers):
            attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            shapes[f"{attention}.q_proj"] = (query, hidden)
            shapes[f"{attention}.k_proj"] = (key, hidden)
            shapes[f"{attention}.v_proj"] = (key, hidden)
            shapes[f"{attention}.o_proj"] = (hidden, query)
            if not self.num_experts:
                swiglu(mlp, inter)
                continue
            shapes[f"{mlp}.gate"] = (self.num_experts, hidden)
            for expert in range(self.num_experts):
                swiglu(f"{mlp}.experts.{expert}", self.moe_intermediate_size)
            for expert in range(self.num_shared_experts):
                swiglu(f"{mlp}.shared_experts.{expert}", self.moe_intermediate_size)
        shapes["lm_head"] = (self.vocab_size, hidden)
        return shapes

    @property
    def num_parameters(self) -> int:
        """Number of weights; a tied head counts once."""
        total = sum(out * inp for target, (out, inp) in self.linear_shapes().items() if target != "lm_head")
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        norms = self.hidden_size * (2 * self.num_hidden_layers + 1)
        if self.qk_norm:
            norms += 2 * self.head_dim * self.num_hidden_layers
        return total + embeddings + norms
