"""Read a base from disk into one canonical form, whatever wrote it.

Read: Hugging Face directories of Qwen3, Qwen3-MoE, Llama and MiniMind (safetensors, sharded or not, or
`pytorch_model.bin`), and MiniMind's native `.pth`. Canonical form: MiniMind's and Hugging Face's tensor names, experts
one by one, a tied `lm_head.weight` dropped, dtypes as stored. Pickles are only ever read with `weights_only=True`.
"""

import json
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraserve.base.config import ModelConfig
from loraserve.base.hf_config import config_from_hf
from loraserve.errors import CheckpointError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A base's weights on the CPU as they are stored, with what is needed to run or rewrite them."""

    config: ModelConfig
    tensors: Tensors
    path: Path
    """The directory or the `.pth` file it was read from."""
    format: str
    """`hf` or `minimind`."""


def read_checkpoint(path: Path, *, num_attention_heads: int | None = None) -> Checkpoint:
    """Read the base at `path`, a directory or a `.pth` file.

    Args:
        num_attention_heads: for a `.pth` without per-head norms (MiniMind 2), which does not record it; 8 by default.

    Raises:
        CheckpointError: something is missing, unreadable, of the wrong shape or not supported; all faults are named.
    """
    if path.is_dir():
        tensors = _canonical(_read_directory(path))
        config = config_from_hf(_read_json(path / "config.json"), path, has_qk_norm=_has_qk_norm(tensors))
        checkpoint = Checkpoint(config, tensors, path, "hf")
    else:
        tensors = _canonical(_read_pickle(path))
        checkpoint = Checkpoint(config_from_tensors(tensors, path, num_attention_heads), tensors, path, "minimind")
    if checkpoint.config.tie_word_embeddings:
        checkpoint.tensors.pop("lm_head.weight", None)
    _check(checkpoint)
    return checkpoint


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of `config` holds in canonical form, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {f"{t}.weight": s for t, s in config.linear_shapes().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    shapes["model.embed_tokens.weight"] = (config.vocab_size, config.hidden_size)
    shapes["model.norm.weight"] = (config.hidden_size,)
    for i in range(config.num_hidden_layers):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (config.hidden_size,)
        shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (config.hidden_size,)
        if config.qk_norm:
            shapes[f"model.layers.{i}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"model.layers.{i}.self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def _check(checkpoint: Checkpoint) -> None:
    config, have = checkpoint.config, checkpoint.tensors
    if config.num_hidden_layers * max(config.num_experts, 1) > len(have):
        raise CheckpointError(
            f"{checkpoint.path} holds {len(have)} tensors, too few for {config.num_hidden_layers} layers"
            + (f" of {config.num_experts} experts" if config.num_experts else "")
        )
    want = expected_tensors(config)
    problems = [f"missing {name}" for name in want if name not in have]
    problems += [f"unknown tensor {name}" for name in have if name not in want]
    problems += [
        f"{name} has shape {tuple(have[name].shape)}, want {shape}"
        for name, shape in want.items()
        if name in have and tuple(have[name].shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{checkpoint.path} does not fit its configuration: {'; '.join(problems[:5])}{more}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a base directory needs config.json, weights and tokenizer") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or hostile JSON
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def _read_directory(path: Path) -> Tensors:
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        outside = [name for name in shards if not isinstance(name, str) or Path(name).name != name]
        if outside or not shards:
            raise CheckpointError(f"{index} names no usable files (it lists {outside or 'nothing'})")
        tensors: Tensors = {}
        for name in sorted(shards):
            tensors |= read_safetensors(path / name)
        return tensors
    if (path / "model.safetensors").exists():
        return read_safetensors(path / "model.safetensors")
    if (path / "pytorch_model.bin").exists():
        return _read_pickle(path / "pytorch_model.bin")
    raise CheckpointError(f"{path} has no model.safetensors, model.safetensors.index.json or pytorch_model.bin")


def read_safetensors(path: Path) -> Tensors:
    """Read every tensor of a safetensors file; the header's claims are checked against the file's size first."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
        if len(head) < 8 or struct.unpack("<Q", head)[0] > path.stat().st_size - 8:
            raise CheckpointError(f"{path} is truncated or is not a safetensors file; fetch it again")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}); fetch it again") from None


def _read_pickle(path: Path) -> Tensors:
    try:
        mapped = zipfile.is_zipfile(path)  # older files cannot be
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except Exception as error:  # torch raises many kinds for a file that is not a plain state dict
        code = re.search(r"\bGLOBAL (\S+)", str(error))
        reason = f"it calls {code[1]}" if code else "it is damaged or was not written by torch.save"
        raise CheckpointError(f"{path} is not a checkpoint of plain tensors: {reason}; it is not loaded") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is no state dict of tensors; save it with torch.save(model.state_dict(), ...)")
    return state


def _canonical(tensors: Tensors) -> Tensors:
    """Strip wrapper prefixes, drop buffers, split fused experts."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(?:module\.|_orig_mod\.)+", "", name)
        if re.search(r"(?:^|\.)(?:freqs_cos|freqs_sin|pos_cis|rotary_emb\.inv_freq)$", name):
            continue
        if name.endswith(".mlp.experts.gate_up_proj"):  # (E, 2·width, hidden)
            for e, fused in enumerate(tensor):
                gate, up = fused.chunk(2)
                result[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate.contiguous()
                result[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up.contiguous()
        elif name.endswith(".mlp.experts.down_proj"):  # (E, hidden, width)
            for e, down in enumerate(tensor):
                result[name.replace("down_proj", f"{e}.down_proj.weight")] = down.contiguous()
        else:
            result[name] = tensor
    return result


def _has_qk_norm(tensors: Tensors) -> bool:
    return "model.layers.0.self_attn.q_norm.weight" in tensors


def config_from_tensors(tensors: Tensors, path: Path, num_attention_heads: int | None) -> ModelConfig:
    """Infer a MiniMind configuration from the shapes in a `.pth` and the facts of its two generations.

    Raises:
        CheckpointError: these are not a MiniMind's tensors, or the heads do not divide them.
    """

    def shape(name: str) -> tuple[int, ...]:
        dimensions = 1 if name.endswith("_norm.weight") else 2
        if name not in tensors or tensors[name].ndim != dimensions or not tensors[name].numel():
            raise CheckpointError(f"{path} is not a MiniMind base: it has no {name} (is it an adapter's file?)")
        return tuple(tensors[name].shape)

    def count(pattern: str) -> int:
        found = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
        return max(found) + 1 if found else 0

    vocab, hidden = shape("model.embed_tokens.weight")
    query = shape("model.layers.0.self_attn.q_proj.weight")[0]
    key = shape("model.layers.0.self_attn.k_proj.weight")[0]
    third = _has_qk_norm(tensors)
    if third:
        head_dim = shape("model.layers.0.self_attn.q_norm.weight")[0]
    else:
        head_dim = query // (num_attention_heads or 8)
    heads = query // max(head_dim, 1)
    if not head_dim or heads * head_dim != query or key % head_dim or (num_attention_heads or heads) != heads:
        claim = num_attention_heads or 8
        raise CheckpointError(f"{path}: {claim} heads do not divide {query} query and {key} key rows")
    experts = count(r"model\.layers\.0\.mlp\.experts\.(\d+)\.")
    mlp = "model.layers.0.mlp.experts.0" if experts else "model.layers.0.mlp"
    width = shape(f"{mlp}.gate_proj.weight")[0]
    head = tensors.get("lm_head.weight")
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=count(r"model\.layers\.(\d+)\."),
        num_attention_heads=heads,
        num_key_value_heads=key // head_dim,
        head_dim=head_dim,
        intermediate_size=width,
        rms_norm_eps=1e-6 if third else 1e-5,
        tie_word_embeddings=head is None or torch.equal(head, tensors["model.embed_tokens.weight"]),
        qk_norm=third,
        norm_in_float32=third,
        num_experts=experts,
        num_experts_per_tok=(1 if third else 2) if experts else 0,
        moe_intermediate_size=width if experts else 0,
        num_shared_experts=count(r"model\.layers\.0\.mlp\.shared_experts\.(\d+)\."),
    )
