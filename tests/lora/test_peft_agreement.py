"""Adapters that we write mean the same to PEFT, and adapters that PEFT saves mean the same to us: full float32 logits."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from loraserve.base.attention import PackedAttention
from loraserve.base.model import Model
from loraserve.lora.adapter import Adapter
from loraserve.lora.batch import LoraBatch
from loraserve.lora.config import LoraConfig
from loraserve.lora.peft import read_adapter, write_adapter

# What PEFT and transformers say to each other, and PEFT about the tied head and the odd settings of these cases.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in (
        "`is_gradient_checkpointing` is deprecated",
        "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`",
        "Model has `tie_word_embeddings=True`",
        "Model with `tie_word_embeddings=True`",
        "Setting `save_embedding_layers` to `True`",
        "Could not find a config file",
        r"The following (rank|alpha)_pattern keys did not match",
    )
]
IDS = torch.tensor([5, 17, 3, 88, 41, 9, 9, 60])


@pytest.fixture(scope="module")
def theirs(tiny_config) -> Qwen3ForCausalLM:
    """transformers' model; each test wraps a copy of it, for PEFT changes the model it wraps."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=tiny_config.vocab_size,
        hidden_size=tiny_config.hidden_size,
        num_hidden_layers=tiny_config.num_hidden_layers,
        num_attention_heads=tiny_config.num_attention_heads,
        num_key_value_heads=tiny_config.num_key_value_heads,
        head_dim=tiny_config.head_dim,
        intermediate_size=tiny_config.intermediate_size,
        rms_norm_eps=tiny_config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": tiny_config.rope_theta},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ours(theirs, tiny_config) -> Model:
    model = Model(tiny_config)
    model.load_state_dict(theirs.state_dict())
    return model.requires_grad_(False)


@pytest.fixture
def copy_of_theirs(theirs) -> Qwen3ForCausalLM:
    copy = Qwen3ForCausalLM(theirs.config).eval()
    copy.load_state_dict(theirs.state_dict())
    return copy


def our_logits(model: Model, adapter: Adapter | None) -> torch.Tensor:
    attention = PackedAttention([len(IDS)])
    lora = LoraBatch.uniform(adapter.weights, len(IDS)) if adapter else None
    return model(IDS, attention.positions, attention, lora)


@torch.no_grad()
def their_logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS[None]).logits[0]


def test_bases_agree(theirs, ours):
    torch.testing.assert_close(our_logits(ours, None), their_logits(theirs), rtol=1e-4, atol=1e-4)


CASES = {
    "two targets": {"target_modules": ("q_proj", "v_proj")},
    "head and all layers, mixed ranks": {
        "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
        "rank_pattern": {"up_proj": 6, r"layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"down_proj": 1.5, "lm_head": 2},
    },
    "rslora and a fractional alpha": {"target_modules": ("o_proj", "down_proj"), "use_rslora": True, "lora_alpha": 2.5},
    "regex": {"target_modules": r".*layers\.1\.(self_attn\.[qk]|mlp\.up)_proj"},
    "one layer": {"target_modules": ("q_proj", "up_proj"), "layers_to_transform": (1,)},
    "excluded": {"target_modules": ("q_proj", "up_proj"), "exclude_modules": ("model.layers.0.mlp.up_proj",)},
    "fan_in_fan_out": {"target_modules": ("q_proj",), "fan_in_fan_out": True},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_peft_gives_our_logits_for_an_adapter_we_write(
    settings, shapes, make_adapter, lora, ours, copy_of_theirs, tmp_path
):
    config = lora(settings["target_modules"], **{k: v for k, v in settings.items() if k != "target_modules"})
    adapter = make_adapter(shapes, config, seed=3)
    write_adapter(tmp_path, adapter, config)
    read, config_read = read_adapter(tmp_path, "x", shapes)
    assert config_read == config
    assert read.digest == adapter.digest
    expected = our_logits(ours, adapter)
    assert (expected - our_logits(ours, None)).abs().max() > 0.1, "this adapter does nothing"
    wrapped = peft.PeftModel.from_pretrained(copy_of_theirs, str(tmp_path))
    torch.testing.assert_close(their_logits(wrapped), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_we_give_peft_s_logits_for_an_adapter_it_saves(settings, shapes, ours, copy_of_theirs, tmp_path):
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    config = peft.LoraConfig(r=3, task_type="CAUSAL_LM", init_lora_weights=False, **{"lora_alpha": 6} | fields)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(copy_of_theirs, config).eval()
    expected = their_logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    adapter, _ = read_adapter(tmp_path, "x", shapes)
    assert (expected - our_logits(ours, None)).abs().max() > 0.1, "this adapter does nothing"
    torch.testing.assert_close(our_logits(ours, adapter), expected, rtol=1e-4, atol=1e-4)


def test_experts_one_by_one_are_read_by_peft_as_fused_ones(moe_shapes, make_adapter, tmp_path):
    """PEFT with transformers 5 fuses our per-expert keys on loading; the merged weights must be ours."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
            moe_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    ).eval()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=("q_proj", "gate_proj", "up_proj", "down_proj"))
    adapter = make_adapter(moe_shapes, config, seed=5)
    write_adapter(tmp_path, adapter, config)
    assert read_adapter(tmp_path, "x", moe_shapes)[0].digest == adapter.digest
    plain = their_logits(model)
    expected = their_logits(_merged_by_hand(model, adapter))
    assert (expected - plain).abs().max() > 0.1
    wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path))
    torch.testing.assert_close(their_logits(wrapped), expected, rtol=1e-4, atol=1e-4)


def _merged_by_hand(model: Qwen3MoeForCausalLM, adapter: Adapter) -> Qwen3MoeForCausalLM:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for target, weight in adapter.weights.items():
        if ".experts." not in target:
            state[f"{target}.weight"] += weight.delta()
            continue
        layer, _, rest = target.partition(".experts.")
        expert, leaf = rest.split(".")
        if leaf == "down_proj":
            state[f"{layer}.experts.down_proj"][int(expert)] += weight.delta()
        else:
            width = weight.B.shape[0]
            rows = slice(0, width) if leaf == "gate_proj" else slice(width, 2 * width)
            state[f"{layer}.experts.gate_up_proj"][int(expert), rows] += weight.delta()
    merged = Qwen3MoeForCausalLM(model.config).eval()
    merged.load_state_dict(state)
    return merged


def test_bfloat16_and_float16_survive_writing_bit_by_bit(shapes, make_adapter, lora, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        adapter = make_adapter(shapes, lora(), seed=2, dtype=dtype)
        write_adapter(tmp_path / str(dtype), adapter, lora())
        read, _ = read_adapter(tmp_path / str(dtype), "x", shapes)
        assert read.digest == adapter.digest
        assert {w.A.dtype for w in read.weights.values()} == {dtype}


def test_config_on_disk_has_what_vllm_requires(shapes, make_adapter, lora, tmp_path):
    write_adapter(tmp_path, make_adapter(shapes, lora()), lora())
    data = json.loads(Path(tmp_path, "adapter_config.json").read_text())
    assert (data["r"], data["lora_alpha"], data["target_modules"]) == (4, 8, ["q_proj", "v_proj"])
    assert (data["bias"], data["modules_to_save"], data["use_dora"]) == ("none", None, False)
