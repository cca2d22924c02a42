"""Reading bases: every layout, and files that are broken, incomplete or hostile."""

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraserve.base.checkpoint import expected_tensors, read_checkpoint, read_safetensors
from loraserve.base.config import ModelConfig
from loraserve.base.fingerprint import compute
from loraserve.errors import CheckpointError
from tests.base.reference import edit_config, our_logits, our_model
from tests.conftest import random_weights

THIRD = ModelConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=40, qk_norm=True, norm_in_float32=True,
)  # fmt: skip
SECOND = ModelConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=4,
    intermediate_size=40, rms_norm_eps=1e-5,
)  # fmt: skip


@pytest.fixture
def third() -> dict[str, Tensor]:
    """A minimind-3's tensors as upstream saves them, the tied head included."""
    state = {name: tensor.half() for name, tensor in random_weights(THIRD).items()}
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


@pytest.fixture
def write(tmp_path: Path, third: dict[str, Tensor]) -> Callable[..., Path]:
    """Writes a minimind-3 `.pth`, with changes by name; None removes a tensor."""

    def write(name: str = "full_sft_32.pth", prefix: str = "", **changes: Tensor | None) -> Path:
        state = {key: tensor for key, tensor in (third | changes).items() if tensor is not None}
        torch.save({prefix + key: tensor for key, tensor in state.items()}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def hf_dir(tiny_base_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may break."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in tiny_base_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    read_checkpoint(folder)
    return folder


# MiniMind's own files


def test_pth_of_minimind_3(write: Callable[..., Path]) -> None:
    checkpoint = read_checkpoint(write())
    assert checkpoint.config == THIRD
    assert checkpoint.format == "minimind"
    assert set(checkpoint.tensors) == set(expected_tensors(THIRD)) and "lm_head.weight" not in checkpoint.tensors


def test_pth_of_minimind_2_takes_its_heads_from_the_caller(tmp_path: Path) -> None:
    state = random_weights(SECOND)
    torch.save(state, tmp_path / "base.pth")
    assert read_checkpoint(tmp_path / "base.pth").config == SECOND
    four = read_checkpoint(tmp_path / "base.pth", num_attention_heads=4).config
    assert (four.num_attention_heads, four.num_key_value_heads, four.head_dim) == (4, 1, 8)
    with pytest.raises(CheckpointError, match="3 heads do not divide 32 query"):
        read_checkpoint(tmp_path / "base.pth", num_attention_heads=3)


def test_heads_that_contradict_the_tensors_of_minimind_3_are_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="8 heads do not divide"):
        read_checkpoint(write(), num_attention_heads=8)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_models_are_stripped(prefix: str, write: Callable[..., Path]) -> None:
    plain = read_checkpoint(write("plain.pth"))
    wrapped = read_checkpoint(write("wrapped.pth", prefix=prefix))
    assert wrapped.config == plain.config and compute(wrapped) == compute(plain)


def test_buffers_and_a_missing_tied_head_make_no_difference(write: Callable[..., Path]) -> None:
    plain = compute(read_checkpoint(write("a.pth")))
    buffers = {"freqs_cos": torch.ones(9, 8), "model.freqs_sin": torch.ones(9, 8)}
    assert compute(read_checkpoint(write("b.pth", **buffers, **{"lm_head.weight": None}))) == plain


def test_head_of_its_own_in_a_pth_is_kept(write: Callable[..., Path], third: dict[str, Tensor]) -> None:
    head = third["lm_head.weight"] * 2
    path = write(**{"lm_head.weight": head})
    checkpoint = read_checkpoint(path)
    assert not checkpoint.config.tie_word_embeddings
    assert torch.equal(checkpoint.tensors["lm_head.weight"], head)
    assert not torch.equal(our_logits(our_model(path), [1, 2]), our_logits(our_model(write("tied.pth")), [1, 2]))


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_code_in_a_pickle_is_not_executed(tmp_path: Path, third: dict[str, Tensor]) -> None:
    touched = tmp_path / "touched"
    pickle.loads(pickle.dumps(Bomb(touched))).close()
    assert touched.exists()  # the bomb works
    touched.unlink()
    torch.save(third | {"bomb": Bomb(touched)}, tmp_path / "bomb.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Bomb(touched), protocol=2))
    hf = tmp_path / "hf"
    hf.mkdir()
    torch.save({"bomb": Bomb(touched)}, hf / "pytorch_model.bin")
    for path in (tmp_path / "bomb.pth", tmp_path / "raw.pth", hf):
        with pytest.raises(
            CheckpointError, match=r"not a checkpoint of plain tensors: it calls \S*open; it is not loaded"
        ):
            read_checkpoint(path)
    assert not touched.exists()


@pytest.mark.parametrize("value", [[1, 2], {"epoch": 3}, {"model": {"a": torch.ones(1)}}, torch.ones(2)])
def test_pth_that_is_no_state_dict(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no state dict of tensors"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("length", [0, 7, 1000, 20000])
def test_truncated_pth(length: int, write: Callable[..., Path]) -> None:
    path = write()
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"full_sft_32\.pth is not a checkpoint of plain tensors: it is damaged"):
        read_checkpoint(path)


def test_missing_pth_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth is missing"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_adapters_file_is_recognised_as_no_base(tmp_path: Path) -> None:
    torch.save({"model.layers.0.self_attn.q_proj.lora.A.weight": torch.ones(2, 32)}, tmp_path / "lora.pth")
    with pytest.raises(CheckpointError, match="is it an adapter's file"):
        read_checkpoint(tmp_path / "lora.pth")


@pytest.mark.parametrize("shape", [(), (61,), (0, 32)])
def test_embeddings_of_an_impossible_shape(shape: tuple[int, ...], write: Callable[..., Path]) -> None:
    path = write(**{"model.embed_tokens.weight": torch.ones(shape)})
    with pytest.raises(CheckpointError, match=r"has no model\.embed_tokens\.weight"):
        read_checkpoint(path)


def test_missing_unknown_and_misshapen_tensors_are_all_named(write: Callable[..., Path]) -> None:
    path = write(
        **{
            "model.layers.1.mlp.up_proj.weight": None,
            "model.norm.weight": None,
            "model.layers.0.mlp.down_proj.bias": torch.ones(32),
            "model.layers.1.self_attn.o_proj.weight": torch.ones(32, 31),
        }
    )
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    for fault in (
        "missing model.layers.1.mlp.up_proj.weight",
        "missing model.norm.weight",
        "unknown tensor model.layers.0.mlp.down_proj.bias",
        "model.layers.1.self_attn.o_proj.weight has shape (32, 31), want (32, 32)",
    ):
        assert fault in str(caught.value)


def test_of_many_missing_tensors_some_are_named_and_the_rest_counted(write: Callable[..., Path]) -> None:
    path = write(**dict.fromkeys(name for name in expected_tensors(THIRD) if name.startswith("model.layers.0.mlp")))
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.0\.mlp\.gate_proj\.weight"):
        read_checkpoint(path)
    path = write(**dict.fromkeys(name for name in expected_tensors(THIRD) if name.startswith("model.layers.1.")))
    assert read_checkpoint(path).config.num_hidden_layers == 1  # nothing says that there were two
    path = write(**dict.fromkeys(name for name in expected_tensors(THIRD) if "layers.1.self_attn" in name))
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.1\.self_attn\.q_proj\.weight; .* and 1 more"):
        read_checkpoint(path)


# Hugging Face directories


def test_directory_without_weights(hf_dir: Path) -> None:
    (hf_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors, model\.safetensors\.index\.json or"):
        read_checkpoint(hf_dir)


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", '"qwen3"', "\udcff\udcfe", '{"a": ' + "9" * 5000 + "}", "[" * 200_000]
)
def test_missing_or_broken_config_json(content: str | None, hf_dir: Path) -> None:
    (hf_dir / "config.json").unlink()
    if content is not None:
        (hf_dir / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_checkpoint(hf_dir)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 4000, -1])
def test_truncated_safetensors(keep: int, hf_dir: Path) -> None:
    file = hf_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*fetch it again"):
        read_checkpoint(hf_dir)


@pytest.mark.parametrize("claim", [2 << 30, (1 << 64) - 1])
def test_header_that_claims_gigabytes(claim: int, hf_dir: Path) -> None:
    file = hf_dir / "model.safetensors"
    file.write_bytes(struct.pack("<Q", claim) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="truncated or is not a safetensors file"):
        read_checkpoint(hf_dir)


def test_header_of_gigabytes_in_a_file_of_that_size(hf_dir: Path) -> None:
    file = hf_dir / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2 << 30))
    os.truncate(file, (2 << 30) + 100)  # sparse
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_checkpoint(hf_dir)


def test_header_that_points_outside_the_file(hf_dir: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}}).encode()
    (hf_dir / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_checkpoint(hf_dir)


def test_missing_tensor_is_named(hf_dir: Path) -> None:
    tensors = load_file(hf_dir / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    save_file(tensors, hf_dir / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape("missing model.layers.1.self_attn.k_norm.weight")):
        read_checkpoint(hf_dir)


def test_configuration_of_another_size_is_refused(hf_dir: Path) -> None:
    edit_config(hf_dir, intermediate_size=97)
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight has shape \(96, 64\), want \(97, 64\)"):
        read_checkpoint(hf_dir)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**12}, {"num_hidden_layers": -1}])
def test_absurd_number_of_layers_is_refused_at_once(changes: dict[str, int], hf_dir: Path) -> None:
    edit_config(hf_dir, **changes)
    with pytest.raises(CheckpointError):
        read_checkpoint(hf_dir)


def test_tied_head_in_the_file_is_not_loaded_twice(hf_dir: Path) -> None:
    before = compute(read_checkpoint(hf_dir))
    tensors = load_file(hf_dir / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, hf_dir / "model.safetensors")
    checkpoint = read_checkpoint(hf_dir)
    assert "lm_head.weight" not in checkpoint.tensors and compute(checkpoint) == before


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as before torch 1.6"])
def test_pytorch_model_bin_is_the_same_base(hf_dir: Path, zipped: bool) -> None:
    before = read_checkpoint(hf_dir)
    torch.save(before.tensors, hf_dir / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (hf_dir / "model.safetensors").unlink()
    assert compute(read_checkpoint(hf_dir)) == compute(before)


@pytest.fixture
def sharded(hf_dir: Path) -> Path:
    tensors = load_file(hf_dir / "model.safetensors")
    (hf_dir / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        part = {name: tensors[name] for name in names[i::3]}
        save_file(part, hf_dir / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return hf_dir


def test_shards_make_one_base(sharded: Path, tiny_base_dir: Path) -> None:
    assert compute(read_checkpoint(sharded)) == compute(read_checkpoint(tiny_base_dir))


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors is missing"):
        read_checkpoint(sharded)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": {"a": "../secret.safetensors"}},
        {"weight_map": {"a": 3}},
    ],
)
def test_index_that_names_no_files_here(index: dict[str, object], sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names no usable files"):
        read_checkpoint(sharded)


def test_a_path_that_is_no_safetensors_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        read_safetensors(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, I am not a safetensors file")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_safetensors(tmp_path / "text.safetensors")


def test_number_of_parameters_counts_what_is_stored(tiny_base_dir: Path, write: Callable[..., Path]) -> None:
    for path in (tiny_base_dir, write()):
        checkpoint = read_checkpoint(path)
        assert checkpoint.config.num_parameters == sum(tensor.numel() for tensor in checkpoint.tensors.values())
