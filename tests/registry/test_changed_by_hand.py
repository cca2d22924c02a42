"""Top-level files that somebody changed: adopted as a new version if they are an adapter, and nothing is lost."""

import json
import os
import shutil
from pathlib import Path

import pytest

from loraserve.errors import AdapterRefused
from loraserve.lora.config import LoraConfig
from loraserve.lora.peft import read_adapter, write_adapter
from loraserve.registry import Registry

FINGERPRINT = "sha256:" + "a" * 64
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def replace_file(source: Path, target: Path) -> None:
    """As editors, PEFT's weights and `cp -f` do: a new file takes the name."""
    shutil.copyfile(source, target.with_name("scratch"))
    os.replace(target.with_name("scratch"), target)


def overwrite(source: Path, target: Path) -> None:
    """As `cp` and PEFT's config do: written into the file that is there, and through the hard link into the version."""
    shutil.copyfile(source, target)


@pytest.mark.parametrize("write", [replace_file, overwrite])
@pytest.mark.parametrize("fresh", [True, False])
def test_weights_changed_by_hand_are_adopted_and_the_old_ones_kept(
    registry, shapes, make, publish, tmp_path, write, fresh
):
    old = publish("x", 1)
    registry.get("x")
    new, config = make(2)
    write_adapter(tmp_path / "new", new, config)
    write(tmp_path / "new" / WEIGHTS, registry.root / "x" / WEIGHTS)
    reader = Registry(registry.root, shapes, FINGERPRINT) if fresh else registry
    assert reader.get("x").version == 2
    assert reader.load("x").digest == new.digest
    assert reader.get("x").manifest.base_fingerprint is None, "whose base these weights are for is not known"
    assert len(reader.get("x").manifest.parents) == 1
    assert reader.verify() == []
    assert reader.rollback("x").version == 1
    assert reader.load("x").digest == old.digest
    assert read_adapter(registry.root / "x", "x")[0].digest == old.digest
    assert reader.get("x").manifest.base_fingerprint == FINGERPRINT


@pytest.mark.parametrize("write", [replace_file, overwrite])
def test_adapter_of_another_base_put_there_by_hand_does_not_replace_the_good_one(
    registry, shapes, publish, random_adapter, tmp_path, write
):
    good = publish("x", 1)
    wider = {target: (2 * rows, 2 * columns) for target, (rows, columns) in shapes.items()}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    write_adapter(tmp_path / "new", random_adapter(wider, ["q_proj", "v_proj"], 4, 0), config)
    for file in (WEIGHTS, CONFIG):
        write(tmp_path / "new" / file, registry.root / "x" / file)
    assert "this base has" in registry.get("x").warnings[-1]
    assert registry.get("x").version == 1
    assert registry.load("x").digest == good.digest


@pytest.mark.parametrize("write", [replace_file, overwrite])
def test_config_changed_by_hand_is_adopted_and_keeps_its_base(registry, publish, tmp_path, write):
    publish("x", 1)
    config = json.loads((registry.root / "x" / CONFIG).read_text())
    (tmp_path / "new").write_text(json.dumps(config | {"lora_alpha": 2}))
    write(tmp_path / "new", registry.root / "x" / CONFIG)
    record = registry.get("x")
    assert (record.version, record.config.lora_alpha) == (2, 2)
    assert record.manifest.base_fingerprint == FINGERPRINT
    assert {w.scaling for w in registry.load("x").weights.values()} == {0.5}
    registry.rollback("x")
    assert {w.scaling for w in registry.load("x").weights.values()} == {2.0}
    assert registry.verify() == []


def test_content_of_an_older_version_put_back_by_hand_is_a_new_version(registry, publish):
    old = publish("x", 1)
    publish("x", 2)
    overwrite(registry.root / "x/.versions/1" / WEIGHTS, registry.root / "x" / WEIGHTS)
    assert registry.get("x").version == 3
    assert registry.load("x").digest == old.digest
    assert registry.verify() == []


@pytest.mark.parametrize("write", [replace_file, overwrite])
def test_file_being_copied_is_not_adopted_until_it_is_whole(registry, make, publish, tmp_path, write):
    old = publish("x", 1)
    new, config = make(2)
    write_adapter(tmp_path / "new", new, config)
    whole = (tmp_path / "new" / WEIGHTS).read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "half", registry.root / "x" / WEIGHTS)
    for _ in range(2):
        assert registry.load("x").digest == old.digest
        record = registry.get("x")
        assert record.version == 1
        assert "cut short" in record.warnings[0]
    write(tmp_path / "new" / WEIGHTS, registry.root / "x" / WEIGHTS)
    assert registry.load("x").digest == new.digest
    assert registry.get("x").version == 2
    assert registry.get("x").warnings == [
        "it does not say which base it was trained on (no base_fingerprint in loraserve.json)"
    ]
    registry.rollback("x")
    assert registry.load("x").digest == old.digest


def test_both_files_replaced_by_an_exported_directory_bring_their_manifest(registry, publish, tmp_path):
    publish("x", 1)
    other = publish("y", 2, r=7)
    registry.export("y", tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        replace_file(file, registry.root / "x" / file.name)
    assert registry.load("x").digest == other.digest
    assert registry.get("x").manifest.base_fingerprint == FINGERPRINT
    assert registry.get("x").rank == 7


def test_deleted_top_level_files_come_back(registry, publish):
    adapter = publish("x", 1)
    for name in (WEIGHTS, CONFIG):
        (registry.root / "x" / name).unlink()
    assert registry.load("x").digest == adapter.digest
    assert read_adapter(registry.root / "x", "x")[0].digest == adapter.digest


def test_registry_that_was_copied_adopts_nothing(registry, shapes, publish, tmp_path):
    """`cp -r` gives every file a new inode and time; the content is that of the version."""
    publish("x", 1)
    adapter = publish("x", 2)
    shutil.copytree(registry.root, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = Registry(tmp_path / "copy", shapes, FINGERPRINT)
    assert copy.get("x").version == 2
    assert copy.load("x").digest == adapter.digest
    assert [r.version for r in copy.history("x")] == [1, 2]
    assert copy.verify() == []


def test_change_by_hand_is_not_lost_when_something_is_published_over_it(registry, make, publish, tmp_path):
    publish("x", 1)
    hand, config = make(2)
    write_adapter(tmp_path / "new", hand, config)
    replace_file(tmp_path / "new" / WEIGHTS, registry.root / "x" / WEIGHTS)
    last = publish("x", 3)
    assert registry.load("x").digest == last.digest
    assert registry.rollback("x").version == 2
    assert registry.load("x").digest == hand.digest


def test_symlink_at_the_top_level_is_not_adopted(registry, make, publish, tmp_path):
    old = publish("x", 1)
    write_adapter(tmp_path / "new", *make(2))
    (registry.root / "x" / WEIGHTS).unlink()
    (registry.root / "x" / WEIGHTS).symlink_to(tmp_path / "new" / WEIGHTS)
    assert registry.load("x").digest == old.digest
    assert "is a symlink" in registry.get("x").warnings[0]


def test_damage_without_a_trace_in_the_times_is_refused(registry, publish):
    """A flipped bit on the disk: the file's size and time are what they were."""
    publish("x", 1)
    publish("x", 2)
    file = registry.root / "x/.versions/2" / WEIGHTS
    before = file.stat()
    with open(file, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(AdapterRefused, match="sha256"):
        registry.load("x")
    assert registry.rollback("x").version == 1
    registry.load("x")
