"""Models of transformers with random weights, and what this package computes for the same tokens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from loraserve.base.attention import PackedAttention
from loraserve.base.checkpoint import read_checkpoint
from loraserve.base.load import build_model
from loraserve.base.model import Model
from loraserve.lora.adapter import LoraWeight
from loraserve.lora.batch import LoraBatch

CPU, F32 = torch.device("cpu"), torch.float32
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 56, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19, 71, 69, 39, 93]


def random_hf_model(kind: str, **options: Any) -> PreTrainedModel:
    """A model of transformers whose logits depend strongly on every weight."""
    sizes = SIZES | (EXPERTS if kind == "qwen3_moe" else {}) | options
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**sizes), dtype=F32).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    return model


def hf_logits(model: torch.nn.Module, ids: Sequence[int] = IDS) -> Tensor:
    """(T, vocab_size) of one sequence."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0]


def our_model(path: Path, dtype: torch.dtype = F32) -> Model:
    return build_model(read_checkpoint(path), CPU, dtype)


def our_logits(model: Model, ids: Sequence[int] = IDS, adapter: Mapping[str, LoraWeight] | None = None) -> Tensor:
    """(T, vocab_size) of one sequence."""
    attention = PackedAttention([len(ids)])
    lora = LoraBatch.uniform(adapter, len(ids)) if adapter is not None else None
    with torch.no_grad():
        return model(torch.tensor(list(ids)), attention.positions, attention, lora)


def edit_config(folder: Path, remove: Sequence[str] = (), **changes: Any) -> None:
    file = folder / "config.json"
    raw = {key: value for key, value in json.loads(file.read_text()).items() if key not in remove}
    file.write_text(json.dumps(raw | changes))
