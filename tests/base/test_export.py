"""Written bases: what is read back, what transformers computes, and what happens when writing fails."""

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraserve.base.checkpoint import Checkpoint, read_checkpoint
from loraserve.base.config import ModelConfig
from loraserve.base.export import write_hf, write_minimind
from loraserve.base.fingerprint import compute
from loraserve.base.load import load_base
from loraserve.errors import CheckpointError, Conflict, StorageError
from tests.base.reference import edit_config, hf_logits, our_logits, our_model
from tests.conftest import random_weights

THIRD = ModelConfig(
    vocab_size=520, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=40, qk_norm=True, norm_in_float32=True,
)  # fmt: skip
MODELS = {
    "minimind-3": THIRD,
    "minimind-3-moe": replace(THIRD, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=40),
    "minimind2": replace(
        THIRD, qk_norm=False, norm_in_float32=False, rms_norm_eps=1e-5, num_attention_heads=8, head_dim=4
    ),
    "minimind2-moe": replace(
        THIRD, qk_norm=False, norm_in_float32=False, rms_norm_eps=1e-5, num_attention_heads=8, head_dim=4,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, num_shared_experts=1,
    ),
}  # fmt: skip
IN_TRANSFORMERS = [name for name in MODELS if name != "minimind2-moe"]


@pytest.fixture
def pth(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the `.pth` that upstream would save."""

    def pth(name: str) -> Path:
        state = {key: tensor.half() for key, tensor in random_weights(MODELS[name]).items()}
        torch.save(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, tmp_path / f"{name}.pth")
        return tmp_path / f"{name}.pth"

    return pth


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: writes fail as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_hugging_face_directory_of_a_pth(
    name: str, pth: Callable[[str], Path], tmp_path: Path, tiny_base_dir: Path
) -> None:
    source = read_checkpoint(pth(name))
    out = tmp_path / "new" / "hf"
    write_hf(source, out, tiny_base_dir)
    ids = [1, 300, 20, 431, 7]
    ours = our_logits(our_model(pth(name)), ids)
    assert ours.std() > 0.2
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(hf_logits(theirs, ids), ours, rtol=1e-4, atol=1e-4)
    again = load_base(str(out), dtype="float32", device="cpu")
    assert again.fingerprint == compute(source)
    torch.testing.assert_close(our_logits(again.model, ids), ours, rtol=1e-5, atol=1e-5)
    assert again.tokenizer.decode(again.tokenizer.encode("你好")) == "你好"
    assert not list(out.parent.glob(".*"))


@pytest.mark.parametrize("name", MODELS)
def test_minimind_file_reads_back_bit_for_bit(name: str, pth: Callable[[str], Path], tmp_path: Path) -> None:
    source = read_checkpoint(pth(name))
    assert source.config == MODELS[name]
    write_minimind(source, tmp_path / "out" / "again.pth")
    again = read_checkpoint(tmp_path / "out" / "again.pth")
    assert again.config == source.config
    assert again.tensors.keys() == source.tensors.keys()
    assert all(torch.equal(tensor, source.tensors[key]) for key, tensor in again.tensors.items())
    state, upstream = torch.load(tmp_path / "out" / "again.pth"), torch.load(pth(name))
    assert state.keys() == upstream.keys()  # the tied head included, or upstream's strict loading fails
    assert {key: tensor.dtype for key, tensor in state.items()} == dict.fromkeys(state, torch.float16)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_from_minimind_to_hugging_face_and_back(
    name: str, pth: Callable[[str], Path], tmp_path: Path, tiny_base_dir: Path
) -> None:
    source = read_checkpoint(pth(name))
    write_hf(source, tmp_path / "hf", tiny_base_dir)
    write_minimind(read_checkpoint(tmp_path / "hf"), tmp_path / "back.pth")
    assert compute(read_checkpoint(tmp_path / "back.pth")) == compute(source)
    assert read_checkpoint(tmp_path / "back.pth").config == source.config


def test_head_of_its_own_survives_in_a_directory_and_is_refused_in_a_pth(tmp_path: Path, tiny_base_dir: Path) -> None:
    tied = read_checkpoint(tiny_base_dir)
    head = {"lm_head.weight": tied.tensors["model.embed_tokens.weight"] * 3}
    untied = Checkpoint(replace(tied.config, tie_word_embeddings=False), tied.tensors | head, tied.path, "hf")
    write_hf(untied, tmp_path / "hf", tiny_base_dir)
    again = read_checkpoint(tmp_path / "hf")
    assert not again.config.tie_word_embeddings and torch.equal(again.tensors["lm_head.weight"], head["lm_head.weight"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = [1, 300, 20, 431, 7]
    torch.testing.assert_close(
        our_logits(our_model(tmp_path / "hf"), ids), hf_logits(theirs, ids), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(CheckpointError, match=r"ties lm_head.*--format hf"):
        write_minimind(again, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_theta": 5000.0}, "rope_theta is 5000.0, in a .pth always 1000000.0"),
        ({"rms_norm_eps": 1e-4}, "rms_norm_eps is 0.0001"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
    ],
)
def test_what_a_pth_cannot_say_is_refused_by_name(
    changes: dict[str, object], named: str, tiny_base_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in tiny_base_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write_minimind(read_checkpoint(folder), tmp_path / "fine.pth")
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=named):
        write_minimind(read_checkpoint(folder), tmp_path / "out.pth")


def test_shared_experts_are_refused_as_a_hugging_face_directory(
    pth: Callable[[str], Path], tmp_path: Path, tiny_base_dir: Path
) -> None:
    with pytest.raises(CheckpointError, match="shared experts"):
        write_hf(read_checkpoint(pth("minimind2-moe")), tmp_path / "hf", tiny_base_dir)
    assert not (tmp_path / "hf").exists()


def test_nothing_that_exists_is_overwritten(pth: Callable[[str], Path], tmp_path: Path, tiny_base_dir: Path) -> None:
    source = read_checkpoint(pth("minimind-3"))
    taken, empty, file = tmp_path / "taken", tmp_path / "empty", tmp_path / "file.pth"
    taken.mkdir()
    (taken / "note.txt").write_text("mine")
    empty.mkdir()
    file.write_text("mine")
    with pytest.raises(Conflict, match="taken exists already"):
        write_hf(source, taken, tiny_base_dir)
    with pytest.raises(Conflict, match=r"file\.pth exists already"):
        write_hf(source, file, tiny_base_dir)
    with pytest.raises(Conflict, match=r"file\.pth exists already"):
        write_minimind(source, file)
    assert [p.name for p in taken.iterdir()] == ["note.txt"] and file.read_text() == "mine"
    write_hf(source, empty, tiny_base_dir)
    assert json.loads((empty / "config.json").read_text())["model_type"] == "qwen3"


def test_full_disk_leaves_nothing_behind(pth: Callable[[str], Path], tmp_path: Path, tiny_base_dir: Path) -> None:
    source = read_checkpoint(pth("minimind-3"))
    out = tmp_path / "out"
    out.mkdir()
    with disk_full_after(2000):
        with pytest.raises(StorageError, match=r"hf could not be written.*free some space"):
            write_hf(source, out / "hf", tiny_base_dir)
        with pytest.raises(StorageError, match=r"a\.pth could not be written"):
            write_minimind(source, out / "a.pth")
    assert list(out.iterdir()) == []
    write_minimind(source, out / "a.pth")
    assert compute(read_checkpoint(out / "a.pth")) == compute(source)


def test_place_that_is_a_file_is_an_error_of_storage(
    pth: Callable[[str], Path], tmp_path: Path, tiny_base_dir: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="could not be written"):
        write_hf(read_checkpoint(pth("minimind-3")), tmp_path / "file" / "hf", tiny_base_dir)
