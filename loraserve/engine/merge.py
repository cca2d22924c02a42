"""Fold adapters into a standalone checkpoint.

    merged = cast(fp32(W) + Σ factor · ΔW)

W is the checkpoint's own weight, whatever the base runs in, and the sum is rounded once, to what the file stores. The
base is only read: its files, its model and its hash stay what they were. An adapter on a tied `lm_head` unties the
merged model, for the embeddings stay as they are.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loraserve
from loraserve.base.checkpoint import Checkpoint, read_checkpoint
from loraserve.base.config import ModelConfig
from loraserve.base.export import write_hf, write_minimind
from loraserve.base.fingerprint import compute
from loraserve.base.load import Base, build_model
from loraserve.engine.parity import Parity, Weighted, compare
from loraserve.errors import CheckpointError, Conflict, InvalidRequest, StorageError
from loraserve.lora.merge import merged_weight
from loraserve.lora.spec import Spec, format_spec
from loraserve.registry import Registry

log = logging.getLogger(__name__)
REPORT = "merge_report.json"


@dataclass(frozen=True)
class Merged:
    """What `merge` has written."""

    path: Path
    report_path: Path
    num_layers: int
    """Linear layers that changed."""
    untied: bool
    """The head was tied to the embeddings and is not any more."""
    dtype: str
    fingerprint: str
    parity: Parity


def merge_checkpoint(checkpoint: Checkpoint, adapters: Weighted, dtype: torch.dtype | None = None) -> Checkpoint:
    """Return `checkpoint` with `adapters` folded in. What they do not touch is shared, nothing is modified.

    Args:
        adapters: that fit the checkpoint, with the factor on each one's ΔW.
        dtype: of the merged weights; as stored by default.

    Raises:
        CheckpointError: a merged weight is beyond what the dtype can hold.
    """
    targets = dict.fromkeys(target for adapter, _ in adapters for target in adapter.weights)
    merged = {f"{target}.weight": merged_layer(checkpoint, target, adapters, dtype) for target in targets}
    config = merged_config(checkpoint.config, targets)
    return dataclasses.replace(checkpoint, config=config, tensors=checkpoint.tensors | merged)


def merged_config(config: ModelConfig, targets: Iterable[str]) -> ModelConfig:
    """The configuration of a base with `targets` merged: a head of its own is not the embeddings any more."""
    return dataclasses.replace(config, tie_word_embeddings=config.tie_word_embeddings and "lm_head" not in targets)


def merged_layer(checkpoint: Checkpoint, target: str, adapters: Weighted, dtype: torch.dtype | None = None) -> Tensor:
    """The weight (out, in) of one layer with `adapters` folded in, a new tensor; see `merge_checkpoint`."""
    source = f"{target}.weight"
    if target == "lm_head" and checkpoint.config.tie_word_embeddings:
        source = "model.embed_tokens.weight"
    updates = [(adapter.weights[target], factor) for adapter, factor in adapters if target in adapter.weights]
    merged = merged_weight(checkpoint.tensors[source], updates, dtype)
    if not torch.isfinite(merged).all():
        raise CheckpointError(f"{target} is beyond the range of {merged.dtype} when merged; use a smaller scale")
    return merged


def read_pristine(base: Base) -> Checkpoint:
    """Read the files of `base` again, for its weights as they are stored.

    Raises:
        CheckpointError: they are not the base that was loaded any more.
    """
    checkpoint = read_checkpoint(base.path, num_attention_heads=base.config.num_attention_heads)
    if compute(checkpoint) != base.fingerprint:
        raise CheckpointError(f"{base.path} is not the base that was loaded: its files have changed; start again")
    return checkpoint


def merge(base: Base, registry: Registry, spec: Spec, out: Path, form: str = "hf") -> Merged:
    """Write a standalone checkpoint of `base` with the adapters of `spec` folded in, and its report.

    The report compares the checkpoint, read back from disk, with the unmerged path. It is `merge_report.json` in a
    Hugging Face directory, and `<name>.merge_report.json` beside a `.pth`.

    Args:
        out: a directory that does not exist or is empty (`hf`), or a file that does not exist (`minimind`).
        form: `hf` or `minimind`.

    Raises:
        InvalidRequest: the SPEC names no adapter, or only at scale 0.
        AdapterNotFound, AdapterRefused: see `Registry.load`.
        Conflict: `out` exists.
        CheckpointError: the format cannot express the merged model, or a weight overflows.
        StorageError: writing failed; nothing is left behind.
    """
    terms = [term for term in spec if term.scale]
    if not terms:
        raise InvalidRequest(f"{format_spec(spec)!r} would change nothing: name an adapter to merge", param="adapter")
    if out.exists() and (form == "minimind" or not out.is_dir() or any(out.iterdir())):
        raise Conflict(f"{out} exists already; choose another --out or remove it")
    adapters = [(registry.load(term.name), term.scale) for term in terms]
    checkpoint = read_pristine(base)
    merged = merge_checkpoint(checkpoint, adapters, torch.float16 if form == "minimind" else None)
    with _beside(out) as folder:
        written = folder / out.name
        if form == "minimind":
            write_minimind(merged, written)
        else:
            write_hf(merged, written, base.tokenizer.path)
        log.info("comparing the merged checkpoint with the unmerged path")
        result = read_checkpoint(written, num_attention_heads=base.config.num_attention_heads)
        parity = compare(base, adapters, build_model(result, base.device, base.dtype))
        report_path = out.with_suffix(f".{REPORT}") if form == "minimind" else out / REPORT
        done = Merged(
            path=out,
            report_path=report_path,
            num_layers=len({target for adapter, _ in adapters for target in adapter.weights}),
            untied=checkpoint.config.tie_word_embeddings and not merged.config.tie_word_embeddings,
            dtype=str(result.tensors["model.embed_tokens.weight"].dtype).removeprefix("torch."),
            fingerprint=compute(result),
            parity=parity,
        )
        report = (written if form == "hf" else folder) / report_path.name
        report.write_text(json.dumps(_report(done, base, spec, adapters), indent=2, ensure_ascii=False) + "\n", "utf-8")
        if form == "minimind":
            os.replace(report, report_path)  # first, so that a merged checkpoint is never without its report
        os.replace(written, out)
    return done


def _report(done: Merged, base: Base, spec: Spec, adapters: Weighted) -> dict[str, Any]:
    return {
        "adapter": format_spec(spec),
        "adapters": [{"name": a.name, "scale": factor, "sha256": a.digest} for a, factor in adapters],
        "base": {"name": base.name, "fingerprint": base.fingerprint},
        "merged": {
            "fingerprint": done.fingerprint,
            "dtype": done.dtype,
            "changed_layers": done.num_layers,
            "untied_lm_head": done.untied,
        },
        "parity": done.parity.to_dict(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "loraserve": loraserve.__version__,
    }


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A scratch directory on the disk of `out`, gone afterwards."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            yield Path(folder)
    except StorageError as error:  # it names the scratch directory
        raise StorageError(str(error).replace(str(Path(folder) / out.name), str(out))) from None
    except OSError as error:
        raise StorageError(f"{out} could not be written: {error}; free some space or choose another place") from None
