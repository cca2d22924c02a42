"""What `loraserve base list` finds: bases, and only bases, wherever they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loraserve.base.catalog import find_bases
from loraserve.base.checkpoint import read_checkpoint
from loraserve.base.export import write_minimind
from loraserve.base.resolve import resolve_base


@pytest.fixture
def models(tiny_base_dir: Path, tmp_path: Path) -> Path:
    """A folder with a directory, a `.pth`, and things that are not bases."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "tiny").symlink_to(tiny_base_dir)
    write_minimind(read_checkpoint(tiny_base_dir), folder / "full_sft_64.pth")
    adapter = {"model.layers.0.self_attn.q_proj.lora.A.weight": torch.ones(2, 64)}
    torch.save(adapter, folder / "lora_style_64.pth")
    (folder / "broken.pth").write_bytes(b"not a checkpoint")
    (folder / "notes.txt").write_text("hello")
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (folder / "bert" / "model.safetensors").write_bytes(b"")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "config.json").write_text('{"model_type": "qwen3"}')
    return folder


def test_bases_in_a_directory_are_found_and_nothing_else(models: Path) -> None:
    found = [entry for entry in find_bases([models]) if str(models) in entry.ref]
    assert [(Path(entry.ref).name, entry.architecture, entry.format) for entry in found] == [
        ("full_sft_64.pth", "minimind", "minimind"),
        ("tiny", "qwen3", "hf"),
    ]
    assert all(entry.size_bytes > 100_000 for entry in found)
    assert all(read_checkpoint(resolve_base(entry.ref)) for entry in found)


def test_a_base_itself_may_be_given(models: Path) -> None:
    for ref in (models / "tiny", models / "full_sft_64.pth"):
        assert str(ref) in [entry.ref for entry in find_bases([ref])]


def test_hub_ids_in_the_local_cache_are_found_with_their_revisions(tiny_base_dir: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--someone--tiny"
    for number, ref in enumerate(("main", "v1")):
        commit = str(number) * 40
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repo / "blobs").mkdir(exist_ok=True)
        for file in tiny_base_dir.iterdir():
            blob = repo / "blobs" / f"{number}-{file.name}"
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(blob)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    code = (
        "import json; from loraserve.base.catalog import find_bases;"
        "from loraserve.base.resolve import resolve_base;"
        "print(json.dumps([(e.ref, e.architecture, str(resolve_base(e.ref)) == str(e.path)) for e in find_bases()]))"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = [entry for entry in json.loads(run.stdout) if entry[0] != "bundled"]
    assert found == [["someone/tiny", "qwen3", True], ["someone/tiny@v1", "qwen3", True]]


def test_an_empty_cache_is_no_error(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "nowhere")}
    code = "from loraserve.base.catalog import find_bases; find_bases()"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
