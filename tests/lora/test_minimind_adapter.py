"""MiniMind's own adapter files, both ways."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from loraserve.base.attention import PackedAttention
from loraserve.base.checkpoint import read_checkpoint
from loraserve.base.model import Model
from loraserve.errors import AdapterRefused, StorageError
from loraserve.lora.batch import LoraBatch
from loraserve.lora.merge import merged_weight
from loraserve.lora.minimind import read_minimind, write_minimind

MODELS = {
    "minimind-3-dense": ("full_sft_64.pth", "", 16, torch.float16),
    "minimind-3-moe": ("full_sft_64_moe.pth", "_moe", 16, torch.float16),
    "minimind2-dense": ("full_sft_64.pth", "", 8, torch.float32),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("adapter", ["identity", "style"])
def test_upstream_file_is_read_and_written_back_bit_by_bit(conformance, tmp_path, model, adapter):
    base, suffix, rank, dtype = MODELS[model]
    file = conformance / model / f"lora_{adapter}_64{suffix}.pth"
    shapes = read_checkpoint(conformance / model / base).config.linear_shapes()
    read = read_minimind(file)
    assert {(w.r, w.scaling, w.A.dtype) for w in read.weights.values()} == {(rank, 1.0, dtype)}
    write_minimind(tmp_path / "again.pth", read, shapes, rank, dtype)
    before, after = torch.load(file, weights_only=True), torch.load(tmp_path / "again.pth", weights_only=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("model", ["minimind-3-dense", "minimind-3-moe"])
def test_merged_weights_are_those_of_upstream(conformance, model):
    base, suffix, _, _ = MODELS[model]
    folder = conformance / model
    pristine = read_checkpoint(folder / base).tensors
    theirs = read_checkpoint(folder / f"merged_lora_identity_64{suffix}.pth").tensors
    adapter = read_minimind(folder / f"lora_identity_64{suffix}.pth")
    for target, weight in adapter.weights.items():
        W = pristine[f"{target}.weight"]
        bound = 2**-9 * (W.float().abs() + weight.delta().abs())
        merged = merged_weight(W, [(weight, 1.0)])
        assert weight.delta().abs().max() > 0.01
        assert ((merged.float() - theirs[f"{target}.weight"].float()).abs() <= bound + 1e-7).all()


@pytest.fixture
def model(tiny_config) -> Model:
    torch.manual_seed(0)
    model = Model(tiny_config).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.2)
    return model


def logits(model: Model, adapter) -> torch.Tensor:
    attention = PackedAttention([5])
    return model(torch.tensor([3, 1, 4, 1, 5]), attention.positions, attention, LoraBatch.uniform(adapter.weights, 5))


def test_exported_adapter_has_exactly_the_square_layers_at_upstream_s_rank(model, shapes, make_adapter, lora, tmp_path):
    """Upstream loads strictly, and has no scaling: it is folded into B, and what the adapter lacks is zeros."""
    adapter = make_adapter(shapes, lora(["o_proj"], r=3, lora_alpha=6))
    write_minimind(tmp_path / "lora.pth", adapter, shapes)
    state = torch.load(tmp_path / "lora.pth", weights_only=True)
    square = [f"model.layers.{i}.self_attn.{m}" for i in (0, 1) for m in ("q_proj", "o_proj")]
    assert set(state) == {f"{target}.lora.{half}.weight" for target in square for half in "AB"}
    assert {(tuple(t.shape), t.dtype) for k, t in state.items() if ".A." in k} == {((16, 32), torch.float16)}
    again = read_minimind(tmp_path / "lora.pth")
    plain = logits(model, make_adapter(shapes, lora(["o_proj"], lora_alpha=1e-9)))
    assert (logits(model, adapter) - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(model, again), logits(model, adapter), rtol=0.01, atol=0.02)


def test_what_minimind_cannot_express_is_refused_by_name(shapes, make_adapter, lora, tmp_path):
    adapter = make_adapter(shapes, lora(["q_proj", "up_proj"], r=17, lora_alpha=1e9))
    with pytest.raises(AdapterRefused) as refused:
        write_minimind(tmp_path / "lora.pth", adapter, shapes)
    others, rank = refused.value.problems
    assert "not model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj" in others
    assert "model.layers.0.self_attn.q_proj (rank 17)" in rank
    with pytest.raises(AdapterRefused, match=r"too large for torch\.float16"):
        write_minimind(tmp_path / "lora.pth", make_adapter(shapes, lora(["q_proj"], lora_alpha=1e9)), shapes)
    assert not list(tmp_path.iterdir())


def save(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def pair(prefix: str = "", r: int = 2) -> dict[str, torch.Tensor]:
    key = f"{prefix}model.layers.0.self_attn.q_proj.lora"
    return {f"{key}.A.weight": torch.ones(r, 32), f"{key}.B.weight": torch.ones(32, r)}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_models_are_stripped(tmp_path, prefix):
    adapter = read_minimind(save(tmp_path / "a.pth", pair(prefix)))
    assert set(adapter.weights) == {"model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize("spoil", [torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_tensors_without_plain_values_are_refused(tmp_path, spoil):
    state = pair()
    state["model.layers.0.self_attn.q_proj.lora.A.weight"] = spoil(torch.ones(2, 32))
    with pytest.raises(AdapterRefused, match=r"lora\.A\.weight"):
        read_minimind(save(tmp_path / "a.pth", state))


class Evil:
    """A pickle that would create a file if it were run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, zipped):
    path = tmp_path / "evil.pth"
    torch.save(pair() | {"x": Evil(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(AdapterRefused, match="holds more than tensors"):
        read_minimind(path)
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(AdapterRefused, match="holds more than tensors"):
        read_minimind(path)
    assert not (tmp_path / "ran").exists()


BAD = {
    "a base, not an adapter": ({"model.embed_tokens.weight": torch.ones(2, 2)}, "no MiniMind adapter"),
    "a list": ([1], "holds a list"),
    "more keys": (pair() | {"model.norm.weight": torch.ones(2)}, "entries that are not A and B"),
    "B alone": ({k: v for k, v in pair().items() if ".B." in k}, "only one of A and B"),
    "ranks that differ": (pair() | {k: v for k, v in pair(r=3).items() if ".B." in k}, "do not fit"),
    "NaN": ({k: v * float("nan") for k, v in pair().items()}, "NaN"),
    "zeros": ({k: v * 0 for k, v in pair().items()}, "every lora_B is zero"),
    "strides that claim a terabyte": (
        pair() | {"x.lora.A.weight": torch.ones(1, 1).expand(1 << 20, 1 << 20)},
        r"entries .* x\.lora\.A",
    ),
}


@pytest.mark.parametrize(("state", "message"), BAD.values(), ids=BAD)
def test_bad_files_are_refused(tmp_path, state, message):
    with pytest.raises(AdapterRefused, match=message):
        read_minimind(save(tmp_path / "bad.pth", state))


def test_damaged_and_inflated_files_are_refused(tmp_path):
    path = save(tmp_path / "a.pth", pair(r=16))
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], b"garbage"):
        path.write_bytes(content)
        with pytest.raises(AdapterRefused, match="damaged"):
            read_minimind(path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry) + b"\0" * (1 << 20))
    with pytest.raises(AdapterRefused, match="unpacks to more bytes"):
        read_minimind(tmp_path / "bomb.pth")
    with pytest.raises(AdapterRefused, match="cannot be opened"):
        read_minimind(tmp_path / "missing.pth")


def test_file_that_cannot_be_written_is_a_storage_error(shapes, make_adapter, lora, tmp_path):
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(StorageError, match="cannot write"):
        write_minimind(tmp_path / "file" / "lora.pth", make_adapter(shapes, lora(["q_proj"])), shapes)
