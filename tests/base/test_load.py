"""Loading a base for use: names, devices, dtypes, tokenizers that do not belong."""

import shutil
from pathlib import Path

import pytest
import torch

from loraserve.base.load import load_base, pick_device, pick_dtype
from loraserve.errors import CheckpointError, InvalidRequest, ModelNotFound
from tests.conftest import train_sentencepiece

CPU = torch.device("cpu")


def test_loaded_base_is_frozen_and_whole(tiny_base_dir: Path) -> None:
    base = load_base(str(tiny_base_dir), device="cpu", dtype="float32")
    assert base.name == "tiny" and base.path == tiny_base_dir
    parameters = dict(base.model.named_parameters())
    assert not any(p.requires_grad for p in parameters.values()) and not base.model.training
    assert {(p.device, p.dtype) for p in parameters.values()} == {(CPU, torch.float32)}
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert sum(p.numel() for p in parameters.values()) == base.config.num_parameters
    assert base.shapes["model.layers.1.mlp.down_proj"] == (64, 96)
    assert base.eos_ids == {2}


def test_ends_of_an_answer_are_those_of_tokenizer_and_configuration(tiny_base_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base_dir, tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"eos_token_id": 2', '"eos_token_id": [0, 7]'))
    assert load_base(str(tmp_path / "base"), device="cpu", dtype="float32").eos_ids == {0, 2, 7}


def test_directory_is_named_by_its_own_name(
    tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_base_dir, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert load_base(".", device="cpu", dtype="float32").name == "mine"


def test_tokenizer_with_more_tokens_than_the_base_is_refused(tiny_base_dir: Path, tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "other", vocab_size=530)
    with pytest.raises(CheckpointError, match=r"has 530 tokens, the base 520.*--tokenizer"):
        load_base(str(tiny_base_dir), tokenizer=str(tmp_path / "other"), device="cpu")


def test_base_without_a_chat_template_loads(tiny_base_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base_dir, tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").unlink()
    base = load_base(str(tmp_path / "base"), device="cpu", dtype="float32")
    assert base.template.source is None
    assert base.tokenizer.encode("你好")
    with pytest.raises(InvalidRequest, match="no chat template"):
        base.template.render([{"role": "user", "content": "hi"}])


def test_directory_without_a_tokenizer_says_how_to_give_one(tiny_base_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base_dir, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="--tokenizer"):
        load_base(str(tmp_path / "base"), device="cpu")
    assert load_base(str(tmp_path / "base"), tokenizer=str(tiny_base_dir), device="cpu").tokenizer.vocab_size == 520


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_as_asked_for(dtype: str, tiny_base_dir: Path) -> None:
    base = load_base(str(tiny_base_dir), device="cpu", dtype=dtype)
    assert base.dtype == getattr(torch, dtype) == base.model.lm_head.weight.dtype


def test_automatic_dtype_is_bfloat16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, wanted in [
        ({"avx2": True, "avx512_f": True}, torch.float32),
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert pick_dtype("auto", CPU) == wanted
        assert pick_dtype("float16", CPU) == torch.float16


@pytest.mark.parametrize("dtype", ["float64", "bf16", ""])
def test_unknown_dtype_lists_the_known_ones(dtype: str) -> None:
    with pytest.raises(InvalidRequest, match="is not one of auto, float32, bfloat16, float16") as caught:
        pick_dtype(dtype, CPU)
    assert caught.value.param == "dtype"


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("gpu", "cuda:x", ""):
        with pytest.raises(InvalidRequest, match="is not one of auto, cpu, cuda, cuda:N"):
            pick_device(device)
    with pytest.raises(InvalidRequest, match=r"'cuda:99' is not here: torch sees \d+ GPUs"):
        pick_device("cuda:99")


@pytest.mark.parametrize("device", ["mps", "meta", "xpu", "cpu:3"])
def test_devices_that_are_not_run_are_refused(device: str) -> None:
    with pytest.raises(InvalidRequest, match="is not one of auto, cpu, cuda, cuda:N"):
        pick_device(device)


def test_unknown_base_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        load_base(str(tmp_path / "nothing"), device="cpu")
