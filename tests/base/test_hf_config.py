"""`config.json`: what is understood, what is refused by name, and the way back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from loraserve.base.config import ModelConfig
from loraserve.base.hf_config import config_from_hf, config_to_hf
from loraserve.errors import CheckpointError

HERE = Path("some/base")
RAW: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48,
}  # fmt: skip
MOE = RAW | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS = {
    "llama": ModelConfig(100, 32, 3, 4, 2, 16, 48, rms_norm_eps=1e-5, rope_theta=5e5, eos_token_ids=(2, 7)),
    "qwen3": ModelConfig(100, 32, 3, 4, 4, 8, 48, qk_norm=True, tie_word_embeddings=False, max_position_embeddings=99),
    "qwen3_moe": ModelConfig(
        100, 32, 3, 4, 2, 16, 48, qk_norm=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        norm_topk_prob=False,
    ),
    "scaled": ModelConfig(
        100, 32, 3, 4, 2, 16, 48, qk_norm=True,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16},
    ),
}  # fmt: skip


def read(raw: dict[str, Any]) -> ModelConfig:
    return config_from_hf(raw, HERE, has_qk_norm=raw.get("model_type") != "llama")


@pytest.mark.parametrize("name", CONFIGS)
def test_written_configuration_reads_back_equal(name: str) -> None:
    raw = config_to_hf(CONFIGS[name], "bfloat16")
    assert raw["torch_dtype"] == "bfloat16"
    assert read(raw) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_same_from_it(name: str) -> None:
    ours, raw = CONFIGS[name], config_to_hf(CONFIGS[name], "float16")
    kinds = {"llama": LlamaConfig, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
    theirs = kinds[raw["model_type"]](**raw)
    fields = [
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
    ]  # fmt: skip
    fields += (
        ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"] if ours.num_experts else []
    )
    assert {field: getattr(theirs, field) for field in fields} == {field: getattr(ours, field) for field in fields}
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta
    assert (ours.rope_scaling or {}).items() <= theirs.rope_parameters.items()


def test_norm_order_of_minimind_3_is_not_written() -> None:
    third = replace(CONFIGS["qwen3"], norm_in_float32=True)
    assert config_to_hf(third, "float16") == config_to_hf(CONFIGS["qwen3"], "float16")


def test_shared_experts_have_no_hugging_face_architecture() -> None:
    second = replace(CONFIGS["qwen3_moe"], qk_norm=False, num_shared_experts=1)
    with pytest.raises(CheckpointError, match=r"shared experts.*--format minimind"):
        config_to_hf(second, "float16")


def test_defaults_are_those_of_the_architecture() -> None:
    llama = read(
        {k: v for k, v in RAW.items() if k not in ("head_dim", "num_key_value_heads")} | {"model_type": "llama"}
    )
    assert (llama.num_key_value_heads, llama.head_dim, llama.rope_theta) == (4, 8, 10000.0)
    assert not llama.tie_word_embeddings and llama.rms_norm_eps == 1e-6
    assert not read(MOE).norm_topk_prob
    minimind = config_from_hf(RAW | {"model_type": "minimind"}, HERE, has_qk_norm=False)
    assert (minimind.rope_theta, minimind.rms_norm_eps, minimind.tie_word_embeddings) == (1e6, 1e-5, True)
    assert not minimind.norm_in_float32
    assert config_from_hf(RAW | {"model_type": "minimind"}, HERE, has_qk_norm=True).norm_in_float32


@pytest.mark.parametrize(("eos", "wanted"), [(7, (7,)), ([7, 9], (7, 9)), (None, (2,))])
def test_tokens_that_end_an_answer(eos: object, wanted: tuple[int, ...]) -> None:
    assert read(RAW | {"eos_token_id": eos}).eos_token_ids == wanted


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": None}, "model_type None"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"use_sliding_window": True}, "use_sliding_window=true"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "yarn with mscale"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "yarn with truncate=false"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        read(RAW | changes)
    assert str(HERE) in str(caught.value)


def test_everything_that_is_not_supported_is_named_at_once() -> None:
    with pytest.raises(CheckpointError, match="attention_bias=true; hidden_act='relu'; rope type 'dynamic'"):
        read(RAW | {"attention_bias": True, "hidden_act": "relu", "rope_scaling": {"type": "dynamic"}})


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_dense_layers_among_sparse_ones_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="dense and sparse"):
        read(MOE | changes)


@pytest.mark.parametrize(
    "field", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
)
def test_missing_field_is_named(field: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json has no '{field}'"):
        read({key: value for key, value in RAW.items() if key != field})


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"hidden_size": None},
        {"num_attention_heads": 0, "head_dim": None},
        {"num_attention_heads": [4]},
        {"rope_theta": "big"},
        {"rope_theta": -1e4},
        {"rope_scaling": "yarn"},
        {"rope_scaling": ["yarn"]},
        {"eos_token_id": "end"},
        {"rope_scaling": {"rope_type": "linear", "factor": None}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": "a", "high_freq_factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 0}},
    ],
)
def test_unusable_value_is_an_error_of_the_file(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"some/base/config\.json"):
        read(RAW | changes)


@pytest.mark.parametrize("field", ["factor", "low_freq_factor", "high_freq_factor"])
def test_missing_field_of_a_rope_scaling_is_named_when_loading(field: str) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert read(RAW | {"rope_scaling": scaling}).rope_scaling == scaling
    del scaling[field]
    with pytest.raises(CheckpointError, match=rf"config\.json has no '{field}'"):
        read(RAW | {"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_key_value_heads": 3}, "4 attention heads over 3 key-value heads"),
        ({"num_attention_heads": -4}, "-4 attention heads"),
        ({"head_dim": 7}, "head_dim 7 is not even"),
        (MOE | {"num_experts_per_tok": 5}, "5 of 4 experts per token"),
        (MOE | {"num_experts_per_tok": 0}, "0 of 4 experts per token"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=f"contradicts itself: {named}"):
        read(RAW | changes)
