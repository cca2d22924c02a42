"""The outputs of MiniMind's own code are reproduced: prompts, logits, log-probabilities and greedy tokens.

MiniMind 2's mixture of experts, of which there is no recording, is compared with a plain reference written here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraserve.base.attention import PackedAttention
from loraserve.base.checkpoint import read_checkpoint
from loraserve.base.config import ModelConfig
from loraserve.base.export import write_hf
from loraserve.base.fingerprint import compute
from loraserve.base.load import Base, load_base
from loraserve.lora.adapter import LoraWeight
from loraserve.lora.batch import LoraBatch
from loraserve.lora.minimind import read_minimind
from tests.base.reference import CPU, F32, hf_logits, our_logits, our_model
from tests.conftest import random_weights

MODELS = {
    "minimind-3-dense": ("", "minimind-3-tokenizer"),
    "minimind-3-moe": ("_moe", "minimind-3-tokenizer"),
    "minimind2-dense": ("", "minimind2-tokenizer"),
}
ADAPTERS = ["base", "lora_identity", "lora_style"]
PROMPTS = range(3)


@dataclass(frozen=True)
class Recording:
    folder: Path
    suffix: str
    base: Base
    text: dict
    tensors: dict[str, Tensor]

    def adapter(self, name: str) -> Mapping[str, LoraWeight] | None:
        if name == "base":
            return None
        return read_minimind(self.folder / f"{name}_64{self.suffix}.pth").to(CPU, F32).weights


@pytest.fixture(scope="module", params=MODELS)
def recording(request: pytest.FixtureRequest, conformance: Path) -> Recording:
    suffix, tokenizer = MODELS[request.param]
    folder = conformance / request.param
    base = load_base(
        str(folder / f"full_sft_64{suffix}.pth"), tokenizer=str(conformance / tokenizer), dtype="float32", device="cpu"
    )
    return Recording(
        folder, suffix, base, json.loads((folder / "golden.json").read_text()), load_file(folder / "golden.safetensors")
    )


def test_configuration_is_read_off_the_tensors(recording: Recording) -> None:
    facts = json.loads((recording.folder / "config_facts.json").read_text())
    if not facts.pop("use_moe"):
        assert recording.base.config.num_experts == 0
    assert facts.pop("generation") == ("minimind-3" if recording.base.config.norm_in_float32 else "minimind2")
    assert {name: getattr(recording.base.config, name) for name in facts} == facts


def test_prompts_and_their_token_ids(recording: Recording) -> None:
    prompts = [recording.base.template.render(messages) for messages in recording.text["conversations"]]
    assert prompts == recording.text["prompts"]
    ids = [recording.base.tokenizer.encode(prompt) for prompt in prompts]
    assert ids == recording.text["prompt_ids"]
    assert len({len(prompt) for prompt in ids}) == 3


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_and_log_probabilities(recording: Recording, name: str) -> None:
    for i in PROMPTS:
        ids = recording.text["prompt_ids"][i]
        logits = our_logits(recording.base.model, ids, recording.adapter(name))
        wanted = recording.tensors[f"{name}.logits.{i}"]
        if name != "base":
            assert (wanted - recording.tensors[f"base.logits.{i}"]).abs().max() > 0.01
        torch.testing.assert_close(logits[-4:], wanted, rtol=0, atol=1e-4)
        logprobs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(logprobs, recording.tensors[f"{name}.logprob.{i}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_greedy_tokens(recording: Recording, name: str) -> None:
    wanted = recording.text["greedy"][name]
    assert name == "base" or wanted != recording.text["greedy"]["base"]
    sequences = [list(ids) for ids in recording.text["prompt_ids"]]
    starts = [len(ids) for ids in sequences]
    adapter = recording.adapter(name)
    for _ in range(32):
        lengths = [len(ids) for ids in sequences]
        attention = PackedAttention(lengths)
        lora = LoraBatch.uniform(adapter, sum(lengths)) if adapter else None
        last = torch.tensor(lengths).cumsum(0) - 1
        ids = torch.tensor([token for sequence in sequences for token in sequence])
        with torch.no_grad():
            logits = recording.base.model(ids, attention.positions, attention, lora, rows=last)
        for sequence, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
            sequence.append(token)
    assert [ids[start:] for ids, start in zip(sequences, starts, strict=True)] == wanted


def test_hugging_face_export_runs_in_transformers(recording: Recording, conformance: Path, tmp_path: Path) -> None:
    path = recording.folder / f"full_sft_64{recording.suffix}.pth"
    write_hf(read_checkpoint(path), tmp_path / "hf", conformance / "minimind-3-tokenizer")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    for i in PROMPTS:
        logits = hf_logits(reference, recording.text["prompt_ids"][i])[-4:]
        torch.testing.assert_close(logits, recording.tensors[f"base.logits.{i}"], rtol=0, atol=1e-4)
    assert compute(read_checkpoint(tmp_path / "hf")) == recording.base.fingerprint


# MiniMind 2's mixture of experts

MOE2 = ModelConfig(
    vocab_size=83, hidden_size=48, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=6,
    intermediate_size=40, rms_norm_eps=1e-5, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40,
    num_shared_experts=1,
)  # fmt: skip
MOE2_IDS = [7, 70, 3, 80, 21, 21, 5, 66, 42, 0, 13]


def minimind2_moe(state: Mapping[str, Tensor], ids: list[int], eps: float = 1e-5) -> Tensor:
    """MiniMind 2 with experts, one token and one head at a time, from its published facts."""
    dim, heads, groups = 6, 8, 4

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * state[name]

    def swiglu(x: Tensor, path: str) -> Tensor:
        gate, up, down = (state[f"{path}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return down @ (F.silu(gate @ x) * (up @ x))

    def turn(x: Tensor, position: int) -> Tensor:
        angles = position * 1e6 ** (-torch.arange(0, dim, 2) / dim)
        a, b = x[: dim // 2], x[dim // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])

    x = state["model.embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(2):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (h @ state[f"{at}.self_attn.{part}_proj.weight"].T for part in "qkv")
        attended = torch.zeros(len(ids), heads * dim)
        for head in range(heads):
            mine, shared = slice(head * dim, (head + 1) * dim), slice(head // groups * dim, (head // groups + 1) * dim)
            queries = [turn(q[t, mine], t) for t in range(len(ids))]
            keys = torch.stack([turn(k[t, shared], t) for t in range(len(ids))])
            for t in range(len(ids)):
                scores = keys[: t + 1] @ queries[t]
                attended[t, mine] = (scores / dim**0.5).softmax(0) @ v[: t + 1, shared]
        x = x + attended @ state[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        for t in range(len(ids)):
            probabilities = (state[f"{at}.mlp.gate.weight"] @ h[t]).softmax(0)
            best = sorted(range(4), key=lambda e: -probabilities[e])[:2]
            total = sum(probabilities[e] for e in best) + 1e-20
            out = swiglu(h[t], f"{at}.mlp.shared_experts.0")
            for e in best:
                out = out + probabilities[e] / total * swiglu(h[t], f"{at}.mlp.experts.{e}")
            x = torch.cat([x[:t], (x[t] + out).unsqueeze(0), x[t + 1 :]])
    return norm(x, "model.norm.weight") @ state["model.embed_tokens.weight"].T


@pytest.fixture
def moe2_state() -> dict[str, Tensor]:
    return random_weights(MOE2)


def test_minimind2_moe_from_a_pth(moe2_state: dict[str, Tensor], tmp_path: Path) -> None:
    head = {"lm_head.weight": moe2_state["model.embed_tokens.weight"]}
    torch.save(moe2_state | head, tmp_path / "full_sft_48_moe.pth")
    assert read_checkpoint(tmp_path / "full_sft_48_moe.pth").config == MOE2
    wanted = minimind2_moe(moe2_state, MOE2_IDS)
    assert wanted.std() > 0.3
    logits = our_logits(our_model(tmp_path / "full_sft_48_moe.pth"), MOE2_IDS)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_minimind2_moe_from_its_hugging_face_directory(moe2_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(moe2_state, tmp_path / "pytorch_model.bin")
    config = {
        "model_type": "minimind", "vocab_size": 83, "hidden_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 40, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "use_moe": True, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1,
        "scoring_func": "softmax", "norm_topk_prob": True, "hidden_act": "silu", "max_position_embeddings": 32768,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_checkpoint(tmp_path).config == MOE2
    logits = our_logits(our_model(tmp_path), MOE2_IDS)
    torch.testing.assert_close(logits, minimind2_moe(moe2_state, MOE2_IDS), rtol=1e-4, atol=1e-4)


def test_minimind2_moe_with_adapters_on_every_expert(
    moe2_state: dict[str, Tensor], tmp_path: Path, random_adapter
) -> None:
    torch.save(moe2_state, tmp_path / "base.pth")
    shapes = MOE2.linear_shapes()
    targets = [target for target in shapes if target != "lm_head"]
    adapter = random_adapter(shapes, targets, 3, 4).weights
    assert "model.layers.0.mlp.shared_experts.0.up_proj" in adapter and "model.layers.1.mlp.gate" in adapter
    folded = moe2_state | {f"{t}.weight": moe2_state[f"{t}.weight"] + w.delta() for t, w in adapter.items()}
    wanted = minimind2_moe(folded, MOE2_IDS)
    assert (wanted - minimind2_moe(moe2_state, MOE2_IDS)).abs().max() > 0.5
    logits = our_logits(our_model(tmp_path / "base.pth"), MOE2_IDS, adapter)
    torch.testing.assert_close(logits, wanted, rtol=2e-4, atol=2e-4)
