"""Translate a Hugging Face `config.json` to a `ModelConfig` and back.

Understood: Qwen3, Qwen3-MoE, Llama, and MiniMind's own `model_type: minimind`. Anything that would change the numbers
and is not implemented (biases, sliding windows, other activations) is refused by name.
"""

from pathlib import Path
from typing import Any

from loraserve.base.config import ModelConfig
from loraserve.base.rope import SUPPORTED, inverse_frequencies
from loraserve.errors import CheckpointError

MODEL_TYPES = ("qwen3", "qwen3_moe", "llama", "minimind")


def config_from_hf(raw: dict[str, Any], path: Path, *, has_qk_norm: bool) -> ModelConfig:
    """Build a ModelConfig from a parsed `config.json`.

    Raises:
        CheckpointError: an unknown architecture, a missing field, or a feature that is not implemented, by name.
    """
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"{path}: model_type {kind!r} is not supported; loraserve runs {', '.join(MODEL_TYPES)} architectures"
        )
    try:
        if problems := _unsupported(raw, kind):
            raise CheckpointError(f"{path}: not supported: {'; '.join(problems)}")
        config = _build(raw, kind, has_qk_norm)
        freqs, _ = inverse_frequencies(config)  # needs the fields of its rope type
        if not freqs.isfinite().all():
            raise ValueError("rope_theta or a factor of the rope scaling is zero or negative")
    except KeyError as error:
        raise CheckpointError(f"{path}/config.json has no {error}; fetch the file again") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}/config.json has an unusable value ({error}); fetch the file again") from None
    if problems := _contradictions(config):
        raise CheckpointError(f"{path}/config.json contradicts itself: {'; '.join(problems)}; fetch the file again")
    return config


def _unsupported(raw: dict[str, Any], kind: str) -> list[str]:
    found = [f"{name}=true" for name in ("attention_bias", "mlp_bias", "use_sliding_window") if raw.get(name)]
    if raw.get("hidden_act", "silu") != "silu":
        found.append(f"hidden_act={raw['hidden_act']!r}")
    rope = _rope_of(raw)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in SUPPORTED:
        found.append(f"rope type {rope_type!r}")
    if rope.get("partial_rotary_factor", 1) != 1:
        found.append(f"partial_rotary_factor={rope['partial_rotary_factor']}")
    if rope_type == "yarn":
        found += [f"yarn with {name}" for name in ("mscale", "mscale_all_dim") if rope.get(name)]
        found += ["yarn with truncate=false"] if rope.get("truncate") is False else []
    if kind == "qwen3_moe" and (raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1):
        found.append("a mixture of dense and sparse layers")
    if raw.get("quantization_config"):
        found.append("quantized weights")
    return found


def _rope_of(raw: dict[str, Any]) -> dict[str, Any]:
    return dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})  # transformers 5 keeps theta in here too


def _contradictions(config: ModelConfig) -> list[str]:
    """What the shapes of the tensors do not show."""
    found = []
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    if min(heads, key_heads) < 1 or heads % key_heads:
        found.append(f"{heads} attention heads over {key_heads} key-value heads")
    if config.head_dim < 2 or config.head_dim % 2:
        found.append(f"head_dim {config.head_dim} is not even")
    if config.num_experts and not 1 <= config.num_experts_per_tok <= config.num_experts:
        found.append(f"{config.num_experts_per_tok} of {config.num_experts} experts per token")
    return found


def _build(raw: dict[str, Any], kind: str, has_qk_norm: bool) -> ModelConfig:
    minimind = kind == "minimind"
    hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    rope = _rope_of(raw)
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or (1e6 if minimind else 10000.0)
    moe = kind == "qwen3_moe" or bool(minimind and raw.get("use_moe"))
    experts = (raw.get("n_routed_experts") or raw.get("num_experts") or raw.get("num_local_experts")) if moe else 0
    inter = int(raw["intermediate_size"])
    eos = raw.get("eos_token_id", 2)
    return ModelConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        num_hidden_layers=int(raw["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        intermediate_size=inter,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-5 if minimind and not has_qk_norm else 1e-6)),
        rope_theta=float(theta),
        rope_scaling=rope if (rope.get("rope_type") or rope.get("type") or "default") != "default" else None,
        max_position_embeddings=int(raw.get("max_position_embeddings", 32768)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", minimind)),
        qk_norm=has_qk_norm,
        norm_in_float32=minimind and has_qk_norm,
        num_experts=int(experts or 0),
        num_experts_per_tok=int(raw["num_experts_per_tok"]) if moe else 0,
        moe_intermediate_size=int(raw.get("moe_intermediate_size") or inter) if moe else 0,
        num_shared_experts=int(raw.get("n_shared_experts") or 0) if moe and minimind and not has_qk_norm else 0,
        norm_topk_prob=bool(raw.get("norm_topk_prob", minimind)) if moe else True,
        pad_token_id=int(raw.get("pad_token_id") or 0),
        bos_token_id=int(raw["bos_token_id"]) if raw.get("bos_token_id") is not None else 1,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (int(eos if eos is not None else 2),),
    )


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Write `config` as the `config.json` of Qwen3, Qwen3-MoE or Llama, readable by transformers 4 and 5.

    Raises:
        CheckpointError: no Hugging Face architecture computes this model (MiniMind 2's shared experts).
    """
    if config.num_shared_experts or (config.num_experts and not config.qk_norm):
        raise CheckpointError(
            "Hugging Face has no architecture with MiniMind 2's shared experts; write it with --format minimind"
        )
    kind = "qwen3_moe" if config.num_experts else "qwen3" if config.qk_norm else "llama"
    names = {"qwen3_moe": "Qwen3MoeForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
    eos = config.eos_token_ids
    raw: dict[str, Any] = {
        "architectures": [names[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "torch_dtype": dtype,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
    }
    if kind == "llama":
        raw["mlp_bias"] = False
    else:
        raw["use_sliding_window"] = False
    if kind == "qwen3_moe":
        raw |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return raw
