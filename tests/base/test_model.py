"""The model computes what transformers computes, on random Llama, Qwen3 and Qwen3-MoE directories."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraserve.base.checkpoint import read_checkpoint
from loraserve.base.fingerprint import compute
from tests.base.reference import hf_logits, our_logits, our_model, random_hf_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with its own head": ("llama", {"tie_word_embeddings": False, "rms_norm_eps": 1e-3}),
    "llama without grouped heads": ("llama", {"num_key_value_heads": 6}),
    "qwen3": ("qwen3", {}),
    "qwen3 with its own head": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe with weights that do not add up to one": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3-moe with one expert per token": ("qwen3_moe", {"num_experts_per_tok": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, options = MODELS[name]
    reference = random_hf_model(kind, **options)
    reference.save_pretrained(tmp_path)
    wanted = hf_logits(reference)
    assert wanted.std() > 0.5  # weights of 0.02 would agree with anything
    torch.testing.assert_close(our_logits(our_model(tmp_path)), wanted, rtol=1e-4, atol=1e-4)


def test_a_head_of_its_own_is_not_the_embeddings(tmp_path: Path) -> None:
    random_hf_model("qwen3", tie_word_embeddings=False).save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert "lm_head.weight" in checkpoint.tensors
    assert not torch.equal(checkpoint.tensors["lm_head.weight"], checkpoint.tensors["model.embed_tokens.weight"])


def test_fused_and_separate_experts_are_the_same_model(tmp_path: Path) -> None:
    reference = random_hf_model("qwen3_moe")
    reference.save_pretrained(tmp_path / "separate", save_original_format=True)
    reference.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = {layout: set(load_file(tmp_path / layout / "model.safetensors")) for layout in ("separate", "fused")}
    assert "model.layers.0.mlp.experts.gate_up_proj" in names["fused"]
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in names["separate"]
    fused, separate = read_checkpoint(tmp_path / "fused"), read_checkpoint(tmp_path / "separate")
    assert set(fused.tensors) == set(separate.tensors)
    assert all(torch.equal(tensor, separate.tensors[name]) for name, tensor in fused.tensors.items())
    assert compute(fused) == compute(separate)
    torch.testing.assert_close(our_logits(our_model(tmp_path / "fused")), hf_logits(reference), rtol=1e-4, atol=1e-4)


def test_sharded_directory_is_the_same_model(tmp_path: Path) -> None:
    reference = random_hf_model("qwen3", tie_word_embeddings=False)
    reference.save_pretrained(tmp_path / "one")
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    one, sharded = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "sharded")
    assert compute(one) == compute(sharded)
    assert torch.equal(our_logits(our_model(tmp_path / "sharded")), our_logits(our_model(tmp_path / "one")))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_bfloat16_stays_near_float32_and_as_near_as_transformers(kind: str, tmp_path: Path) -> None:
    reference = random_hf_model(kind)
    reference.save_pretrained(tmp_path)
    exact = hf_logits(reference)
    ours = our_logits(our_model(tmp_path, torch.bfloat16))
    assert ours.dtype == torch.bfloat16
    theirs = hf_logits(reference.bfloat16())
    error, their_error = (ours.float() - exact).norm() / exact.norm(), (theirs.float() - exact).norm() / exact.norm()
    assert 0 < error < max(1.5 * their_error, 0.02)
