"""The fingerprint names the weights, whatever file they are in, and is remembered only as long as that is true."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraserve.base import fingerprint as fingerprints
from loraserve.base.checkpoint import read_checkpoint
from loraserve.base.fingerprint import compute, fingerprint
from tests.base.reference import edit_config


@pytest.fixture
def folder(tiny_base_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    for file in tiny_base_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loraserve" / "fingerprints.json"


def rewrite(folder: Path, change: dict[str, Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | change, folder / "model.safetensors")


def test_precision_and_layout_of_the_file_make_no_difference(folder: Path) -> None:
    before = compute(read_checkpoint(folder))
    assert before.startswith("sha256:") and len(before) == 71
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, {name: tensor.float() for name, tensor in tensors.items()})
    edit_config(folder, rms_norm_eps=1e-4)
    assert compute(read_checkpoint(folder)) == before


def test_one_changed_weight_and_one_swapped_tensor_change_it(folder: Path) -> None:
    before = compute(read_checkpoint(folder))
    tensors = load_file(folder / "model.safetensors")
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    changed = tensors[name].clone()
    changed[3, 4] += 0.01
    rewrite(folder, {name: changed})
    once = compute(read_checkpoint(folder))
    rewrite(folder, {name: tensors[other], other: tensors[name]})
    assert len({before, once, compute(read_checkpoint(folder))}) == 3


def test_names_and_shapes_are_part_of_it(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    name = sorted(checkpoint.tensors)[-1]
    last = checkpoint.tensors[name]
    others = {other: tensor for other, tensor in checkpoint.tensors.items() if other != name}
    variants = [{name: last}, {f"{name}.more": last}, {name: last.unsqueeze(0)}]  # the same bytes in the same order
    assert len({compute(replace(checkpoint, tensors=others | variant)) for variant in variants}) == 3


def test_it_is_remembered_until_the_file_changes(folder: Path, cache: Path) -> None:
    checkpoint = read_checkpoint(folder)
    value = fingerprint(checkpoint)
    assert value == compute(checkpoint)
    [key] = known = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: "sha256:remembered"}))
    assert fingerprint(checkpoint) == "sha256:remembered"
    stat = (folder / "model.safetensors").stat()
    os.utime(folder / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fingerprint(checkpoint) == value
    assert len(json.loads(cache.read_text())) == 2 and known


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": 3}', "\0"])
def test_broken_cache_is_written_anew(folder: Path, cache: Path, content: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    checkpoint = read_checkpoint(folder)
    assert fingerprint(checkpoint) == compute(checkpoint)
    assert compute(checkpoint) in json.loads(cache.read_text()).values()


def test_cache_that_cannot_be_written_is_done_without(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.parent.write_text("a file where the folder should be")
    checkpoint = read_checkpoint(folder)
    found = compute(checkpoint)
    assert fingerprint(checkpoint) == found
    monkeypatch.setattr(fingerprints, "compute", None)
    assert fingerprint(checkpoint) == found  # a file is not hashed twice by one process


def test_bfloat16_file_has_the_fingerprint_of_its_values(folder: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    rewrite(folder, tensors)
    low = compute(read_checkpoint(folder))
    rewrite(folder, {name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    assert compute(read_checkpoint(folder)) == low
