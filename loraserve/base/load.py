"""Load a base for use: weights on the device, tokenizer, chat template, fingerprint."""

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from loraserve.base.chat import ChatTemplate
from loraserve.base.checkpoint import Checkpoint, read_checkpoint
from loraserve.base.config import ModelConfig
from loraserve.base.fingerprint import fingerprint
from loraserve.base.linear import Linear
from loraserve.base.mapped import page_out
from loraserve.base.model import Model
from loraserve.base.quantize import check_quantization, quantized_shapes
from loraserve.base.resolve import resolve_base, tokenizer_path
from loraserve.base.tokenizer import Tokenizer
from loraserve.errors import CheckpointError, InvalidRequest
from loraserve.kernels.threads import apart

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INT8 = "int8"


@dataclass(frozen=True)
class Base:
    """A frozen base, ready to run."""

    name: str
    config: ModelConfig
    model: Model
    tokenizer: Tokenizer
    template: ChatTemplate
    fingerprint: str
    device: torch.device
    dtype: torch.dtype
    """Of activations and adapters, and of the weights unless `int8`."""
    path: Path
    int8: bool = False
    """The layers' weights are rounded to 8 bits once the model is packed for serving."""

    def load_weights(self, quantize: str | None = None) -> None:
        """Read the weights of a base that was loaded without them; otherwise they stay as they are.

        Args:
            quantize: how the blocks' linear layers are kept in fewer bits, one of `quantize.QUANTIZATIONS`.

        Raises:
            CheckpointError: the files are no longer those of `fingerprint`; or see `read_checkpoint`.
            InvalidRequest: the weights are there, and kept otherwise; or see `quantize.check_quantization`.

        After either nothing has changed.
        """
        if self.has_weights:
            if quantize != self.model.quantized:
                raise InvalidRequest(
                    f"quantize is {quantize}, but the base is in memory with quantize {self.model.quantized}: load it "
                    "with weights=False",
                    param="quantize",
                )
            return
        if quantize is not None:
            check_quantization(quantize, self.config)
        apart(self._fill, quantize)

    def _fill(self, quantize: str | None) -> None:
        checkpoint = read_checkpoint(self.path, num_attention_heads=self.config.num_attention_heads)
        if checkpoint.config != self.config or fingerprint(checkpoint) != self.fingerprint:
            raise CheckpointError(
                f"{self.path} was changed after it was opened, before its weights were read; run the same command again"
            )
        fill(self.model, checkpoint, self.device, self.dtype, quantize)

    @property
    def has_weights(self) -> bool:
        return not self.model.lm_head.weight.is_meta

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return self.config.linear_shapes()

    def weight_of(self, target: str) -> torch.Tensor:
        """The weight (out, in) that products of one linear layer are made with, in `dtype`; once there are weights."""
        assert self.has_weights
        return cast(Linear, self.model.get_submodule(target)).weight_used()

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(self.tokenizer.eos_ids | set(self.config.eos_token_ids))


def load_base(
    ref: str = "bundled",
    *,
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: str | None = None,
    num_attention_heads: int | None = None,
    weights: bool = True,
) -> Base:
    """Load the base that `ref` names.

    Args:
        ref: `bundled`, a Hugging Face directory, a native `.pth`, or a hub id `owner/name[@revision]`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: `auto`, `float32`, `bfloat16`, `float16`, or `int8`: 8-bit weights when serving, on a CPU.
        tokenizer: the tokenizer's directory; for a `.pth` by default beside it, then `../model`.
        num_attention_heads: for a MiniMind 2 `.pth`, which does not record it; 8 by default.
        weights: read them now, and not by `Base.load_weights` later.

    Raises:
        ModelNotFound, CheckpointError: see `resolve_base` and `read_checkpoint`.
        InvalidRequest: a device or dtype that does not exist here.
    """
    return apart(_load, ref, device, dtype, tokenizer, num_attention_heads, weights)


def _load(
    ref: str, device: str, dtype: str, tokenizer: str | None, num_attention_heads: int | None, weights: bool
) -> Base:
    path = resolve_base(ref)
    where = pick_device(device)
    int8 = dtype == INT8
    if int8 and where.type != "cpu":
        raise InvalidRequest("dtype int8 runs on a CPU only; use --dtype bfloat16 or --device cpu", param="dtype")
    what = pick_dtype("auto" if int8 else dtype, where)
    tokens = Tokenizer(tokenizer_path(path, tokenizer))
    checkpoint = read_checkpoint(path, num_attention_heads=num_attention_heads)
    if tokens.vocab_size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {tokens.path} has {tokens.vocab_size} tokens, the base {checkpoint.config.vocab_size}: "
            "it belongs to another model; give the right one with --tokenizer"
        )
    model = build_model(checkpoint, where, what) if weights else empty_model(checkpoint.config)
    template = ChatTemplate(tokens)
    return Base(
        _name_of(ref, path),
        checkpoint.config,
        model,
        tokens,
        template,
        fingerprint(checkpoint),
        where,
        what,
        path,
        int8,
    )


def _name_of(ref: str, path: Path) -> str:
    if path.is_file():
        return path.stem
    return path.resolve().name if Path(ref).exists() else ref.partition("@")[0]


_building = threading.Lock()


def empty_model(config: ModelConfig) -> Model:
    """A Model whose weights are still to come: they take no memory."""
    with _building, torch.device("meta"):
        return Model(config)


def build_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Model:
    """Put a checkpoint's weights into a Model on `device`, frozen, in `dtype`."""
    model = empty_model(checkpoint.config)
    fill(model, checkpoint, device, dtype)
    return model


def fill(
    model: Model, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, quantize: str | None = None
) -> None:
    """Put a checkpoint's weights into an empty model, frozen, in `dtype`.

    Args:
        quantize: round the blocks' linear layers, one by one, from the checkpoint's own weights; of what has been read
            of a mapped file nothing then stays in memory.
    """
    rounded = {} if quantize is None else quantized_shapes(checkpoint.config)
    # MiniMind's trainers write over their `.pth` in place, and a mapping does not outlive that.
    copy = quantize is not None or checkpoint.format == "minimind"
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        target = name.removesuffix(".weight")
        if quantize is not None and target in rounded:
            cast(Linear, model.get_submodule(target)).quantize(tensor.to(device), quantize, dtype)
        else:
            tensors[name] = tensor.to(device, dtype, copy=copy)
        if quantize is not None:
            page_out(tensor)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie()
    model.model.rope.reset(device)
    model.quantized = quantize
    model.requires_grad_(False).eval()


def pick_device(device: str) -> torch.device:
    """Turn a `--device` into a torch device; `auto` is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", device):
        raise InvalidRequest(f"device {device!r} is not one of auto, cpu, cuda, cuda:N", param="device")
    picked = torch.device(device)
    if picked.type == "cuda" and (not torch.cuda.is_available() or (picked.index or 0) >= torch.cuda.device_count()):
        raise InvalidRequest(
            f"device {device!r} is not here: torch sees {torch.cuda.device_count()} GPUs; use --device cpu or auto",
            param="device",
        )
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turn a `--dtype` into a torch dtype.

    `auto` is bfloat16 where the processor has it, else float32 on a CPU and float16 on a GPU.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InvalidRequest(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}, {INT8}", param="dtype")
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    cpu = torch.cpu.get_capabilities()
    native = any(cpu.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32
