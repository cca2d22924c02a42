"""The model with adapters computes what PEFT computes; for what PEFT cannot target, what ΔW in the weights gives."""

from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from loraserve.base.attention import PackedAttention
from loraserve.lora.adapter import LoraWeight
from loraserve.lora.batch import LoraBatch
from loraserve.lora.peft import read_adapter
from loraserve.lora.stack import AdapterStack
from tests.base.reference import IDS, hf_logits, our_logits, our_model, random_hf_model
from tests.conftest import MakeAdapter

ADAPTERS = {
    "mixed ranks everywhere": peft.LoraConfig(
        r=5, lora_alpha=8, target_modules="all-linear", rank_pattern={"q_proj": 9, r"layers\.1\.mlp\.down_proj": 2},
        alpha_pattern={"v_proj": 32, r"layers\.1\.mlp\.down_proj": 3},
    ),
    "rslora on attention and head": peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "o_proj", "lm_head"], rank_pattern={"lm_head": 3}
    ),
    "one layer": peft.LoraConfig(r=3, lora_alpha=3, target_modules=["gate_proj", "up_proj"], layers_to_transform=[1]),
}  # fmt: skip


def peft_model(base: PreTrainedModel, config: peft.LoraConfig, folder: Path) -> torch.Tensor:
    """Save a random adapter made by PEFT to `folder`, return PEFT's logits with it."""
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(len(str(config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    logits = hf_logits(model)
    model.unload()
    return logits


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # it writes the frozen head as well
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft uses it
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_peft_adapters_of_mixed_ranks_alone_and_in_one_batch(kind: str, tmp_path: Path) -> None:
    untied = {"tie_word_embeddings": False}
    reference = random_hf_model(kind, **untied)
    reference.save_pretrained(tmp_path / "base")
    wanted = [hf_logits(reference)]
    for i, config in enumerate(ADAPTERS.values()):
        wanted.append(peft_model(random_hf_model(kind, **untied), config, tmp_path / str(i)))
    for i, logits in enumerate(wanted):
        assert all((logits - other).abs().max() > 0.1 for other in wanted[:i])

    model = our_model(tmp_path / "base")
    shapes = model.config.linear_shapes()
    adapters = [read_adapter(tmp_path / str(i), shapes=shapes)[0].weights for i in range(len(ADAPTERS))]
    assert {w.r for w in adapters[0].values()} == {2, 5, 9}
    for adapter, logits in zip([None, *adapters], wanted, strict=True):
        torch.testing.assert_close(our_logits(model, IDS, adapter), logits, rtol=1e-4, atol=1e-4)

    lengths = [len(IDS), 5, len(IDS), 11, 2]  # base, 0, 1, 2, 0
    slots: list[list[tuple[int, float]]] = [[], [(0, 1.0)], [(1, 1.0)], [(2, 1.0)], [(0, 1.0)]]
    attention = PackedAttention(lengths)
    lora = LoraBatch.from_segments(AdapterStack(adapters), list(zip(lengths, slots, strict=True)), "cpu")
    ids = torch.tensor([token for length in lengths for token in IDS[:length]])
    mixed = model(ids, attention.positions, attention, lora).split(lengths)
    for got, length, which in zip(mixed, lengths, [0, 1, 2, 3, 1], strict=True):
        torch.testing.assert_close(got, wanted[which][:length], rtol=1e-4, atol=1e-4)


def add_to_weights(model: PreTrainedModel, adapter: Mapping[str, LoraWeight]) -> None:
    """Fold ΔW into a model of transformers, fused experts included."""
    width = model.config.moe_intermediate_size
    modules = dict(model.named_modules())
    with torch.no_grad():
        for target, weight in adapter.items():
            parent, _, leaf = target.rpartition(".")
            experts, _, number = parent.rpartition(".")
            if leaf in ("gate_proj", "up_proj"):
                rows = slice(0, width) if leaf == "gate_proj" else slice(width, 2 * width)
                modules[experts].gate_up_proj[int(number), rows] += weight.delta()
            elif leaf == "down_proj":
                modules[experts].down_proj[int(number)] += weight.delta()
            else:
                layer = modules[target]
                layer.weight = nn.Parameter(layer.weight + weight.delta())  # a tied head is tied no longer


@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": False, "num_experts_per_tok": 1}], ids=["top2", "top1"])
def test_adapters_on_experts_router_and_tied_head(
    options: dict[str, object], tmp_path: Path, random_adapter: MakeAdapter
) -> None:
    reference = random_hf_model("qwen3_moe", **options)
    reference.save_pretrained(tmp_path)
    model = our_model(tmp_path)
    shapes = model.config.linear_shapes()
    adapter = dict(random_adapter(shapes, list(shapes), 3, 0).weights)
    adapter |= random_adapter(shapes, ["experts.2.up_proj", "gate"], 6, 1).weights
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.experts.3.down_proj"} <= set(adapter)
    plain = hf_logits(reference)
    add_to_weights(reference, adapter)
    wanted = hf_logits(reference)
    assert (wanted - plain).abs().max() > 1
    torch.testing.assert_close(our_logits(model, IDS, adapter), wanted, rtol=2e-4, atol=2e-4)
    assert torch.equal(our_logits(model), our_logits(our_model(tmp_path)))  # the base is what it was


def test_some_experts_alone(tmp_path: Path, random_adapter: MakeAdapter) -> None:
    reference = random_hf_model("qwen3_moe")
    reference.save_pretrained(tmp_path)
    model = our_model(tmp_path)
    targets = ["model.layers.0.mlp.experts.1.gate_proj", "model.layers.1.mlp.experts.0.down_proj"]
    adapter = random_adapter(model.config.linear_shapes(), targets, 4, 2).weights
    assert list(adapter) == targets
    plain = hf_logits(reference)
    add_to_weights(reference, adapter)
    wanted = hf_logits(reference)
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(our_logits(model, IDS, adapter), wanted, rtol=1e-4, atol=1e-4)
