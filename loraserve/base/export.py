"""Write a base to disk: a Hugging Face directory, bit for bit what was read, or MiniMind's `.pth`, in float16."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from loraserve.base.checkpoint import Checkpoint, config_from_tensors
from loraserve.base.config import ModelConfig
from loraserve.base.hf_config import config_to_hf
from loraserve.errors import CheckpointError, Conflict, StorageError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

MINIMIND_FIXES = ("rms_norm_eps", "rope_theta", "rope_scaling")
MINIMIND_FIXES_EXPERTS = ("num_experts_per_tok", "norm_topk_prob")
"""What a `.pth` does not record: every MiniMind of a generation has the same."""


def write_hf(checkpoint: Checkpoint, out: Path, tokenizer: Path) -> None:
    """Write `out/` as a directory that transformers and loraserve load, tokenizer included.

    Raises:
        Conflict: `out` exists and is not an empty directory.
        CheckpointError: Hugging Face has no architecture for this base.
        StorageError: writing failed; nothing is left behind.
    """
    dtype = next(iter(checkpoint.tensors.values())).dtype
    config = config_to_hf(checkpoint.config, str(dtype).removeprefix("torch."))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Conflict(f"{out} exists already; choose another --out or remove it")
    with _staged(out) as staging:
        staging.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        shutil.copymode(staging / "config.json", staging / "model.safetensors")  # safetensors lets only its owner read
        for name in TOKENIZER_FILES:
            if (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, staging / name)


def write_minimind(checkpoint: Checkpoint, out: Path) -> None:
    """Write MiniMind's `.pth`: one state dict in float16 with the tied head repeated, as upstream saves it.

    Raises:
        Conflict: `out` exists.
        CheckpointError: MiniMind's model cannot express it; what differs is named.
        StorageError: writing failed; nothing is left behind.
    """
    config = checkpoint.config
    if not config.tie_word_embeddings:
        raise CheckpointError("MiniMind ties lm_head to the embeddings and this model does not; use --format hf")
    fixed = _minimind_config(checkpoint)
    if problems := [
        f"{name} is {getattr(config, name)}, in a .pth always {getattr(fixed, name)}"
        for name in (*MINIMIND_FIXES, *(MINIMIND_FIXES_EXPERTS if config.num_experts else ()))
        if getattr(config, name) != getattr(fixed, name)
    ]:
        raise CheckpointError(f"MiniMind's model cannot express this one: {'; '.join(problems)}; use --format hf")
    if out.exists():
        raise Conflict(f"{out} exists already; choose another --out or remove it")
    state = {name: tensor.half().clone() for name, tensor in checkpoint.tensors.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with _staged(out) as staging:
        torch.save(state, staging)


def _minimind_config(checkpoint: Checkpoint) -> ModelConfig:
    """What a reader of the `.pth` would take the tensors for, if told the number of heads where they do not show it."""
    heads = None if checkpoint.config.qk_norm else checkpoint.config.num_attention_heads
    return config_from_tensors(checkpoint.tensors, checkpoint.path, heads)


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Hand out a path beside `out` and move it into place when all went well."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            yield Path(folder) / out.name
            if out.is_dir():
                out.rmdir()
            os.replace(Path(folder) / out.name, out)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two are how torch and safetensors report I/O
        raise StorageError(f"{out} could not be written: {error}; free some space or choose another place") from None
