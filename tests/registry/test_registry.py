"""Adapters by name: publishing, reading, versions, and everything that is refused."""

import json
import os
import shutil
import time
from pathlib import Path

import peft
import pytest
import torch

from loraserve.errors import AdapterNotFound, AdapterRefused, Conflict, InvalidRequest, StorageError, VersionNotFound
from loraserve.lora.peft import read_adapter, write_adapter
from loraserve.registry import Manifest, Registry

FINGERPRINT = "sha256:" + "a" * 64


def files_of(root: Path) -> dict[str, tuple[int, bytes]]:
    """Everything under a directory, to show that nothing changed."""
    return {str(p.relative_to(root)): (p.lstat().st_ino, p.read_bytes()) for p in root.rglob("*") if p.is_file()}


def test_published_adapter_is_loaded_bit_by_bit_with_its_record(registry, make):
    adapter, config = make(1)
    manifest = Manifest(base_fingerprint=FINGERPRINT, base_name="bundled", metrics={"loss": 1.5}, description="d")
    record = registry.publish("pirate", adapter, config, manifest, {"README.md": b"# card", "loss.png": b"png"})
    assert registry.names() == ["pirate"]
    assert registry.load("pirate").digest == adapter.digest
    assert registry.get("pirate") == record
    assert (record.version, record.rank, record.config) == (1, 4, config)
    assert record.num_parameters == sum(w.A.numel() + w.B.numel() for w in adapter.weights.values())
    assert set(record.targets) == set(adapter.weights)
    assert record.size_bytes == (record.path / "adapter_model.safetensors").stat().st_size
    assert record.warnings == []
    assert (record.manifest.metrics, record.manifest.description) == ({"loss": 1.5}, "d")
    assert abs(record.created - time.time()) < 60
    assert sorted(p.name for p in record.path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "loraserve.json", "loss.png",
    ]  # fmt: skip


def test_top_level_is_a_peft_directory_of_hard_links(registry, publish):
    adapter = publish("pirate", 1)
    folder = registry.root / "pirate"
    read, _ = read_adapter(folder, "pirate")
    assert read.digest == adapter.digest
    assert peft.LoraConfig.from_pretrained(str(folder)).r == 4
    for name in ("adapter_config.json", "adapter_model.safetensors", "loraserve.json"):
        assert (folder / name).samefile(folder / ".versions" / "1" / name)


def test_where_hard_links_fail_the_top_level_is_copies(registry, publish, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    publish("pirate", 1)
    adapter = publish("pirate", 2)
    folder = registry.root / "pirate"
    assert not (folder / "adapter_model.safetensors").samefile(folder / ".versions/2/adapter_model.safetensors")
    assert read_adapter(folder, "pirate")[0].digest == adapter.digest
    assert registry.get("pirate").version == 2
    assert registry.verify() == []


def test_dropped_in_peft_directory_is_an_adapter(registry, make):
    adapter, config = make(1)
    write_adapter(registry.root / "dropped", adapter, config)
    before = files_of(registry.root)
    assert registry.names() == ["dropped"]
    record = registry.get("dropped")
    assert (record.version, record.path) == (0, registry.root / "dropped")
    assert "does not say which base" in record.warnings[0]
    assert registry.load("dropped").digest == adapter.digest
    assert [r.version for r in registry.history("dropped")] == [0]
    assert files_of(registry.root) == before, "reading wrote something"


def test_dropped_in_directory_that_is_replaced_is_noticed_at_once(registry, make):
    write_adapter(registry.root / "dropped", *make(1))
    first = registry.get("dropped")
    assert registry.get("dropped") is first
    adapter, config = make(2, r=6)
    write_adapter(registry.root / "dropped", adapter, config)
    assert registry.get("dropped").signature != first.signature
    assert registry.get("dropped").rank == 6
    assert registry.load("dropped").digest == adapter.digest


def test_publishing_over_a_dropped_in_directory_keeps_it_as_version_one(registry, make, publish):
    dropped, config = make(1)
    write_adapter(registry.root / "x", dropped, config)
    (registry.root / "x" / "README.md").write_text("theirs")
    adapter = publish("x", 2)
    assert [r.version for r in registry.history("x")] == [1, 2]
    assert registry.load("x").digest == adapter.digest
    registry.rollback("x")
    assert registry.load("x").digest == dropped.digest
    assert (registry.root / "x" / "README.md").read_text() == "theirs"


def test_running_reader_sees_a_version_published_by_another_registry(registry, shapes, make, publish):
    publish("x", 1)
    first = registry.get("x")
    other = Registry(registry.root, shapes, FINGERPRINT)
    adapter, config = make(2)
    other.publish("x", adapter, config)
    assert registry.get("x").version == 2
    assert registry.get("x").path != first.path
    assert registry.load("x").digest == adapter.digest
    assert read_adapter(first.path, "x")[0].digest != adapter.digest, "the version in use changed under its reader"


def test_rollback_and_history(registry, publish):
    adapters = [publish("x", seed, r=seed + 1) for seed in range(3)]
    assert [(r.version, r.rank) for r in registry.history("x")] == [(1, 1), (2, 2), (3, 3)]
    assert registry.rollback("x").version == 2
    assert registry.load("x").digest == adapters[1].digest
    assert read_adapter(registry.root / "x", "x")[0].digest == adapters[1].digest
    assert registry.rollback("x", 3).version == 3
    assert registry.rollback("x", 1).version == 1
    with pytest.raises(VersionNotFound, match="no version named 'older than 1'; adapter 'x' has versions 1, 2, 3"):
        registry.rollback("x")
    with pytest.raises(VersionNotFound, match="'7'"):
        registry.rollback("x", 7)
    last = publish("x", 9)
    assert registry.get("x").version == 4
    assert registry.load("x").digest == last.digest
    assert registry.verify() == []


def test_rollback_to_a_damaged_version_is_refused_and_changes_nothing(registry, publish):
    publish("x", 1)
    adapter = publish("x", 2)
    weights = registry.root / "x/.versions/1/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(AdapterRefused, match="sha256"):
        registry.rollback("x")
    assert registry.get("x").version == 2
    assert registry.load("x").digest == adapter.digest


def test_remove_and_rename(registry, publish):
    adapter = publish("x", 1)
    publish("x", 2)
    publish("taken", 3)
    with pytest.raises(Conflict, match="exists"):
        registry.rename("x", "taken")
    registry.rename("x", "y")
    assert registry.get("y").version == 2
    assert registry.names() == ["taken", "y"]
    registry.rollback("y")
    assert registry.load("y").digest == adapter.digest
    registry.remove("y")
    assert registry.names() == ["taken"]
    assert not (registry.root / "y").exists()
    assert not list((registry.root / ".staging").iterdir())
    for action in (registry.get, registry.load, registry.remove, registry.history, registry.rollback, registry.verify):
        with pytest.raises(AdapterNotFound):
            action("y")
    with pytest.raises(AdapterNotFound):
        registry.rename("y", "z")


def test_unknown_name_comes_with_close_matches(registry, publish):
    with pytest.raises(AdapterNotFound, match="there are no adapters in"):
        registry.load("pirate")
    publish("pirate", 1)
    publish("poet", 2)
    with pytest.raises(AdapterNotFound, match="'pirat'; did you mean 'pirate'"):
        registry.load("pirat")


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", "base", "x" * 65, "a\0b", "x.", "..", "-x", 3, None])
def test_names_that_could_reach_elsewhere_are_refused(registry, make, name, tmp_path):
    write_adapter(tmp_path / "x", *make(1))
    for action in (registry.get, registry.load, registry.remove, registry.history, registry.rollback):
        with pytest.raises(InvalidRequest, match="name"):
            action(name)
    with pytest.raises(InvalidRequest, match="name"):
        registry.publish(name, *make(1))
    assert (tmp_path / "x").is_dir()
    assert not registry.root.exists()


def test_symlinks_are_neither_listed_nor_followed(registry, make, publish, tmp_path):
    publish("real", 1)
    write_adapter(tmp_path / "outside", *make(2))
    (registry.root / "linked").symlink_to(tmp_path / "outside")
    (registry.root / "half").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (registry.root / "half" / name).symlink_to(tmp_path / "outside" / name)
    shutil.copytree(registry.root / "real", registry.root / "moved")
    shutil.rmtree(registry.root / "moved/.versions")
    (registry.root / "moved/.versions").symlink_to(registry.root / "real/.versions")
    assert registry.names() == ["half", "moved", "real"]
    with pytest.raises(AdapterNotFound):
        registry.load("linked")
    with pytest.raises(Conflict, match="not a directory"):
        registry.publish("linked", *make(3))
    with pytest.raises(AdapterRefused, match="it is a symlink"):
        registry.load("half")
    assert registry.get("moved").version == 0  # its top-level files alone
    assert {p.name for p in registry.verify()} == {"linked", "half"} | {p.name for p in registry.verify("moved")}
    assert (tmp_path / "outside").is_dir()


def test_stray_entries_are_not_listed_and_verify_tells(registry, publish):
    publish("good", 1)
    (registry.root / "empty").mkdir()
    (registry.root / "file.txt").write_text("x")
    (registry.root / ".staging" / "left.over").mkdir()
    (registry.root / "bad name").mkdir()
    (registry.root / "bad name" / "adapter_config.json").write_text("{}")
    assert registry.names() == ["good"]
    assert sorted(p.name for p in registry.verify()) == ["bad name", "empty"]
    publish("good", 2)
    assert not list((registry.root / ".staging").iterdir())


def test_registry_that_does_not_exist_is_empty_and_stays_away(registry):
    assert registry.names() == []
    assert registry.verify() == []
    assert not registry.root.exists()


def test_adapter_of_another_base_is_refused_unless_allowed(registry, shapes, make):
    adapter, config = make(1)
    owner = Registry(registry.root, shapes, "sha256:" + "b" * 64)
    owner.publish("x", adapter, config, {"base_fingerprint": owner.fingerprint, "base_name": "other"})
    for action in (registry.get, registry.load):
        with pytest.raises(AdapterRefused, match="trained on another base \\(other\\)"):
            action("x")
    with pytest.raises(AdapterRefused, match="another base"):
        registry.publish("y", adapter, config, {"base_fingerprint": owner.fingerprint})
    assert [p.message for p in registry.verify("x")] != []
    tolerant = Registry(registry.root, shapes, FINGERPRINT, allow_base_mismatch=True)
    assert "another base" in tolerant.get("x").warnings[0]
    assert tolerant.load("x").digest == adapter.digest


def test_another_base_s_shapes_are_never_allowed(registry, shapes, publish):
    publish("x", 1)
    wider = {target: (out * 2, width) for target, (out, width) in shapes.items()}
    tolerant = Registry(registry.root, wider, None, allow_base_mismatch=True)
    for action in (tolerant.get, tolerant.load):
        with pytest.raises(AdapterRefused, match="made for a layer of shape"):
            action("x")
    publish("x", 2)
    with pytest.raises(AdapterRefused, match="made for a layer of shape"):
        tolerant.rollback("x")
    tolerant.rename("x", "y")
    assert [r.version for r in tolerant.history("y")] == [1, 2]
    tolerant.remove("y")
    assert tolerant.names() == []


def test_bad_adapters_are_not_published_and_nothing_changes(registry, make, publish):
    publish("x", 1)
    before = files_of(registry.root)
    adapter, config = make(2)
    target, weight = next(iter(adapter.weights.items()))
    zero = {t: type(w)(w.A, torch.zeros_like(w.B), w.scaling) for t, w in adapter.weights.items()}
    bad = {
        "NaN": dict(adapter.weights) | {target: type(weight)(weight.A * float("nan"), weight.B, 2.0)},
        "zero": zero,
        "no linear layer": dict(adapter.weights) | {"model.layers.7.self_attn.q_proj": weight},
        "scaling": dict(adapter.weights) | {target: type(weight)(weight.A, weight.B, 3.0)},
    }
    for message, weights in bad.items():
        with pytest.raises(AdapterRefused, match=message):
            registry.publish("x", type(adapter)(weights), config)
    with pytest.raises(InvalidRequest, match="base_fingerprint"):
        registry.publish("x", adapter, config, {"base_fingerprint": 3})
    for name in ("../evil", "a/b", ".hidden", "adapter_config.json", "loraserve.json"):
        with pytest.raises(InvalidRequest, match="file beside an adapter"):
            registry.publish("x", adapter, config, extra_files={name: b""})
    with pytest.raises(StorageError):
        registry.publish("x", adapter, config, extra_files={"a.png": Path("/nowhere/a.png")})
    assert files_of(registry.root) == before


def test_damaged_dropped_in_adapters_are_listed_but_refused(registry, make):
    write_adapter(registry.root / "x", *make(1))
    file = registry.root / "x" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert registry.names() == ["x"]
    for action in (registry.get, registry.load):
        with pytest.raises(AdapterRefused, match="cut short"):
            action("x")
    assert registry.verify()[0].name == "x"


def test_manifest_that_cannot_be_read_is_a_warning(registry, make):
    write_adapter(registry.root / "x", *make(1))
    for content in ("{", "[]", '{"recipe": 3}', '{"parents": "x"}'):
        (registry.root / "x" / "loraserve.json").write_text(content)
        record = Registry(registry.root).get("x")
        assert record.manifest.recipe == {}
        if content != "[]":
            assert "loraserve.json cannot be read" in record.warnings[0]


def test_weights_that_are_not_those_of_the_manifest_are_refused(registry, make, publish, tmp_path):
    """A directory exported from a registry whose weights were damaged on the way."""
    publish("x", 1)
    registry.export("x", tmp_path / "out")
    write_adapter(tmp_path / "out", *make(2))
    shutil.copytree(tmp_path / "out", registry.root / "y")
    with pytest.raises(AdapterRefused, match="sha256"):
        registry.load("y")
    with pytest.raises(AdapterRefused, match="sha256"):
        registry.import_(tmp_path / "out", "z")
    assert registry.names() == ["x", "y"]


def test_verify_finds_a_flipped_bit_in_any_version(registry, publish):
    publish("x", 1)
    publish("x", 2)
    publish("y", 3)
    assert registry.verify() == []
    weights = registry.root / "x/.versions/1/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    config = registry.root / "y/.versions/1/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    before = files_of(registry.root)
    found = [(p.name, p.version, p.message.split()[0]) for p in registry.verify() if "sha256" in p.message]
    assert found == [("x", 1, "adapter_model.safetensors"), ("y", 1, "adapter_config.json")]
    assert files_of(registry.root) == before, "verify changed something"


def test_names_of_thousands_of_adapters_open_no_file(registry, monkeypatch):
    registry.root.mkdir()
    for i in range(2_000):
        folder = registry.root / f"a{i:05}"
        folder.mkdir()
        (folder / "adapter_config.json").touch()
    opened = []
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(a))
    names = registry.names()
    assert (len(names), names[0], names[-1], opened) == (2_000, "a00000", "a01999", [])


def test_get_of_an_untouched_adapter_opens_no_file(registry, publish, monkeypatch):
    publish("x", 1)
    registry.get("x")
    calls = []
    lstat = os.lstat
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", lambda *a, **k: calls.append(a) or lstat(*a, **k))
        patch.setattr("builtins.open", lambda *a, **k: pytest.fail(f"opened {a}"))
        patch.setattr(os, "open", lambda *a, **k: pytest.fail(f"opened {a}"))
        registry.get("x")
    assert len(calls) <= 5


def test_record_is_plain_enough_for_json(registry, publish):
    publish("x", 1)
    record = registry.get("x")
    json.dumps([record.warnings, record.manifest.metrics, record.config.to_peft(), record.targets])
