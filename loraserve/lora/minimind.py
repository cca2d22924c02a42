"""MiniMind's own adapter files: a `.pth` with A and B of square linear layers, scale 1.

    model.layers.0.self_attn.q_proj.lora.A.weight   (r, in)
    model.layers.0.self_attn.q_proj.lora.B.weight   (out, r)

Upstream gives every square linear layer a LoRA of fixed rank and loads it strictly, so a written file has exactly those
layers at exactly that rank (16 in float16 for minimind-3, 8 in float32 for minimind2): missing layers and ranks are
zeros, the scaling is folded into B. Prefixes that wrapping a model left in the keys (`module.`, `_orig_mod.`) are
stripped. Pickles are only ever read with `weights_only=True`, and never unpacked.
Source: MiniMind, model/model_lora.py.
"""

import io
import os
import re
import zipfile
from pathlib import Path

import torch

from loraserve.errors import AdapterRefused
from loraserve.lora.adapter import Adapter, LoraWeight, Shapes, find_size_problems, find_value_problems, list_some
from loraserve.lora.files import storage_errors, write_file

_KEY = re.compile(r"(?:(?:module|_orig_mod)\.)*(?P<target>.+)\.lora\.(?P<half>[AB])\.weight")


def read_minimind(path: Path, name: str = "") -> Adapter:
    """Read an adapter `.pth`; the rank comes from the shapes.

    Raises:
        AdapterRefused: it cannot be read, is not an adapter, or holds anything but pairs of A and B that fit.
    """
    name = name or path.stem
    halves: dict[str, dict[str, torch.Tensor]] = {}
    left = []
    for key, value in _load(path, name).items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match and isinstance(value, torch.Tensor) and value.is_floating_point() and _has_own_bytes(value):
            halves.setdefault(match["target"], {})[match["half"]] = value.detach()
        else:
            left.append(str(key))
    problems = []
    if not halves:
        problems.append(f"{path} has no MiniMind adapter in it (keys ending in .lora.A.weight and .lora.B.weight)")
    elif left:
        problems.append(f"entries that are not A and B of a layer: {list_some(left)}")
    single = [target for target, found in halves.items() if len(found) < 2]
    if single:
        problems.append(f"only one of A and B for {list_some(single)}")
    weights = {t: LoraWeight(f["A"], f["B"], 1.0) for t, f in halves.items() if len(f) == 2}
    if weights:
        problems += find_size_problems({t: (tuple(w.A.shape), tuple(w.B.shape)) for t, w in weights.items()}, None)
        problems += find_value_problems(Adapter(weights))
    if problems:
        raise AdapterRefused(name, problems)
    return Adapter(weights, name)


def write_minimind(
    path: Path, adapter: Adapter, shapes: Shapes, rank: int = 16, dtype: torch.dtype = torch.float16
) -> None:
    """Write `adapter` as a `.pth` that upstream's `load_lora` accepts.

    Args:
        shapes: the base's layers, of which upstream adapts the square ones.
        rank: upstream's, 16 for minimind-3 and 8 for minimind2.

    Raises:
        AdapterRefused: a target is not square, has a higher rank, or overflows `dtype`; all are named.
        StorageError: writing failed; a file that was there is as before.
    """
    square = {target: shape[0] for target, shape in shapes.items() if shape[0] == shape[1]}
    problems = []
    if adapter.is_dora:
        problems.append("MiniMind's format has no magnitudes for DoRA; merge it into the base with loraserve merge")
    if others := [target for target in adapter.weights if target not in square]:
        problems.append(f"MiniMind's format has only square linear layers, not {list_some(others)}")
    if wide := [f"{target} (rank {w.r})" for target, w in adapter.weights.items() if w.r > rank]:
        problems.append(f"MiniMind's rank is {rank}, lower than that of {list_some(wide)}")
    state = {}
    for target, width in square.items():
        A, B = torch.zeros(rank, width), torch.zeros(width, rank)
        weight = adapter.weights.get(target)
        if weight is not None and weight.r <= rank:
            A[: weight.r], B[:, : weight.r] = weight.A.float(), weight.scaling * weight.B.float()
        state[f"{target}.lora.A.weight"], state[f"{target}.lora.B.weight"] = A.to(dtype), B.to(dtype)
    if over := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        problems.append(f"values too large for {dtype}: {list_some(over)}")
    if problems:
        raise AdapterRefused(adapter.name or path.stem, problems)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with storage_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, buffer.getvalue())


def _load(path: Path, name: str) -> dict[object, object]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inflated = sum(entry.file_size for entry in archive.infolist())
            if inflated > os.path.getsize(path):
                raise AdapterRefused(name, [f"{path} unpacks to more bytes than it has: not a file torch.save wrote"])
        state = torch.load(path, map_location="cpu", weights_only=True)
    except AdapterRefused:
        raise
    except OSError as error:
        raise AdapterRefused(name, [f"{path} cannot be opened ({error.strerror or error})"]) from None
    except Exception as error:  # a hostile pickle can fail in any way; it is never opened with weights_only=False
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise AdapterRefused(name, [f"{path} is damaged or holds more than tensors ({reason})"]) from None
    if not isinstance(state, dict):
        raise AdapterRefused(name, [f"{path} holds a {type(state).__name__}, not a dictionary of tensors"])
    return state


def _has_own_bytes(tensor: torch.Tensor) -> bool:
    """Whether the file really holds a value for each element: strides can claim terabytes over four bytes."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
