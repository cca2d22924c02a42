"""Adapters that come from elsewhere, go elsewhere, or are made of others."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from loraserve.errors import AdapterNotFound, AdapterRefused, Conflict, InvalidRequest
from loraserve.lora.minimind import read_minimind, write_minimind
from loraserve.lora.peft import read_adapter, write_adapter
from loraserve.registry import Registry

FINGERPRINT = "sha256:" + "a" * 64
Q, OUT, UP = (f"model.layers.0.{m}" for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"))


def test_peft_directory_is_imported_byte_by_byte_with_its_card(registry, make, tmp_path):
    source = tmp_path / "theirs"
    write_adapter(source, *make(1))
    config = json.loads((source / "adapter_config.json").read_text()) | {"peft_version": "0.99", "auto_mapping": None}
    (source / "adapter_config.json").write_text(json.dumps(config))
    (source / "README.md").write_text("# card")
    (source / "optimizer.pt").write_bytes(b"not an adapter's")
    (source / "checkpoint-5").mkdir()
    record = registry.import_(source)
    assert (record.name, record.version) == ("theirs", 1)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (record.path / name).read_bytes() == (source / name).read_bytes()
    assert sorted(p.name for p in record.path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "loraserve.json",
    ]  # fmt: skip
    assert registry.import_(source).version == 2
    assert registry.import_(source, "other").name == "other"


def test_snapshot_of_symlinks_is_imported_as_files(registry, make, tmp_path):
    """The hub's cache consists of symlinks; the user named it, so they are followed, and files arrive."""
    write_adapter(tmp_path / "blobs", *make(1))
    (tmp_path / "snapshot").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    record = registry.import_(tmp_path / "snapshot", "x")
    shutil.rmtree(tmp_path / "blobs")
    assert registry.load("x").digest == make(1)[0].digest
    assert not (record.path / "adapter_model.safetensors").is_symlink()


def test_bad_sources_are_refused_and_leave_nothing(registry, make, tmp_path):
    write_adapter(tmp_path / "bad.name.", *make(1))
    with pytest.raises(InvalidRequest, match="cannot name an adapter"):
        registry.import_(tmp_path / "bad.name.")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterRefused, match=r"adapter_model\.safetensors is missing") as refused:
        registry.import_(tmp_path / "empty")
    assert len(refused.value.problems) == 2
    shutil.copytree(tmp_path / "bad.name.", tmp_path / "pickled")
    (tmp_path / "pickled/adapter_model.safetensors").rename(tmp_path / "pickled/adapter_model.bin")
    with pytest.raises(AdapterRefused, match=r"adapter_model\.bin is a pickle"):
        registry.import_(tmp_path / "pickled")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(AdapterRefused, match="neither a PEFT directory nor a MiniMind"):
        registry.import_(tmp_path / "notes.txt")
    with pytest.raises(AdapterRefused, match="nowhere does not exist"):
        registry.import_(tmp_path / "nowhere")
    wide = Registry(registry.root, dict.fromkeys(registry.shapes, (7, 7)))
    with pytest.raises(AdapterRefused, match="made for a layer of shape"):
        wide.import_(tmp_path / "bad.name.", "x")
    assert registry.names() == []
    assert not list((registry.root / ".staging").iterdir())


def test_exported_directory_is_what_was_published_and_comes_back(registry, make, publish, tmp_path):
    adapter, config = make(1)
    registry.publish("x", adapter, config, {"base_fingerprint": FINGERPRINT, "metrics": {"loss": 1}}, {"a.png": b"png"})
    out = registry.export("x", tmp_path / "out")
    assert read_adapter(out, "x")[0].digest == adapter.digest
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in registry.get("x").path.iterdir())
    again = registry.import_(out, "y")
    assert again.manifest == registry.get("x").manifest
    with pytest.raises(Conflict, match="it exists"):
        registry.export("x", out)
    with pytest.raises(AdapterNotFound):
        registry.export("nope", tmp_path / "other")
    with pytest.raises(InvalidRequest, match="no adapter format 'gguf'"):
        registry.export("x", tmp_path / "other", "gguf")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("form", "r", "dtype"), [("minimind", 16, torch.float16), ("minimind2", 8, torch.float32)])
def test_minimind_file_goes_out_and_comes_back(registry, make, tmp_path, form, r, dtype):
    adapter, config = make(1, r=5, targets=("q_proj",))
    registry.publish("x", adapter, config)
    file = registry.export("x", tmp_path / "lora_x_32.pth", form)
    assert {(w.r, w.A.dtype) for w in read_minimind(file).weights.values()} == {(r, dtype)}
    record = registry.import_(file)
    assert (record.name, record.rank, record.manifest.description) == ("lora_x_32", r, "imported from lora_x_32.pth")
    assert list(record.config.target_modules) == ["q_proj", "o_proj"]
    back = registry.load("lora_x_32")
    tolerance = 2e-3 if dtype == torch.float16 else 1e-6
    delta = adapter.weights[Q].delta()
    torch.testing.assert_close(
        back.weights[Q].delta(), delta, rtol=tolerance, atol=tolerance * delta.abs().max().item()
    )
    assert not back.weights[OUT].delta().any()


def test_minimind_export_needs_a_base_and_square_layers(registry, make, publish, tmp_path):
    publish("x", 1)
    with pytest.raises(AdapterRefused, match="only square linear layers, not"):
        registry.export("x", tmp_path / "x.pth", "minimind")
    with pytest.raises(InvalidRequest, match="give --base"):
        Registry(registry.root).export("x", tmp_path / "x.pth", "minimind")
    assert not list(tmp_path.glob("*.pth"))


def test_upstream_s_own_file_is_imported(conformance, shapes, tmp_path):
    """Through the registry and PEFT's format, the values are those of upstream's file."""
    file = conformance / "minimind-3-dense" / "lora_identity_64.pth"
    registry = Registry(tmp_path / "adapters")
    registry.import_(file, "identity")
    direct, loaded = read_minimind(file), registry.load("identity")
    assert loaded.digest == direct.digest
    config = registry.get("identity").config
    assert {config.matches("model.layers.0.self_attn.k_proj"), config.rank_of(Q)} == {False, 16}
    again = dict.fromkeys(loaded.weights, (64, 64))
    write_minimind(tmp_path / "again.pth", loaded, again)
    before, after = torch.load(file, weights_only=True), torch.load(tmp_path / "again.pth", weights_only=True)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_published_blend_is_the_sum_of_its_parts(registry, make, publish):
    first = publish("a", 1)
    adapter, config = make(2, r=3, targets=("q_proj", "up_proj"))
    registry.publish("b", adapter, config, {"base_fingerprint": FINGERPRINT, "base_name": None})
    record = registry.blend("a:0.7+b:-0.3", "mix")
    assert (record.rank, record.manifest.base_fingerprint) == (7, FINGERPRINT)
    assert record.manifest.recipe == {"blend": "a:0.7+b:-0.3"}
    assert [parent.partition("@")[0] for parent in record.manifest.parents] == ["a", "b"]
    mix = registry.load("mix")
    for target in (Q, UP):
        parts = [(first, 0.7), (adapter, -0.3)]
        expected = sum(f * a.weights[target].delta() for a, f in parts if target in a.weights)
        torch.testing.assert_close(mix.weights[target].delta(), expected, rtol=1e-5, atol=1e-5)
    assert {w.scaling for w in mix.weights.values()} == {1.0}
    keys = load_file(record.path / "adapter_model.safetensors")
    assert keys[f"base_model.model.{Q}.lora_A.weight"].shape == (7, 32)


def test_blends_that_cannot_be_are_refused(registry, publish):
    publish("a", 1)
    for spec, error in (("base", InvalidRequest), ("a:0", AdapterRefused), ("a:nan", InvalidRequest)):
        with pytest.raises(error):
            registry.blend(spec, "mix")
    with pytest.raises(AdapterNotFound):
        registry.blend("a+nope", "mix")
    with pytest.raises(AdapterRefused, match="every lora_B is zero"):
        registry.blend("a:1e-60", "mix")
    assert registry.names() == ["a"]
