"""`loraserve adapters`: what users see of the registry."""

import json
import shutil
from pathlib import Path

import pytest

from loraserve.base.load import Base
from loraserve.lora.config import LoraConfig
from loraserve.lora.minimind import read_minimind
from loraserve.lora.peft import read_adapter
from loraserve.registry import Registry
from tests.cli.conftest import Cli


@pytest.fixture
def own(here: Path, adapters_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the adapters that a test may change."""
    shutil.copytree(adapters_dir, here / "adapters")
    monkeypatch.setenv("LORASERVE_ADAPTERS", str(here / "adapters"))
    return here / "adapters"


def test_list_is_a_table_and_json(cli: Cli, own: Path) -> None:
    (own / "broken").mkdir()
    (own / "broken" / "adapter_config.json").write_text("{")
    result = cli("adapters", "list")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["ADAPTER", "VERSION", "RANK", "PARAMETERS", "SIZE", "CREATED", "DESCRIPTION"]
    assert [line.split()[0] for line in lines[1:]] == ["head", "pirate", "poet"]
    assert "speaks like a pirate" in lines[2]
    assert "adapter 'broken' refused: adapter_config.json is not JSON" in result.stderr
    entries = json.loads(cli("adapters", "list", "--json").stdout)
    assert [entry["name"] for entry in entries] == ["broken", "head", "pirate", "poet"]
    assert "not JSON" in entries[0]["problems"][0]
    assert (entries[2]["rank"], entries[2]["version"], entries[2]["description"]) == (2, 1, "speaks like a pirate")


def test_empty_directory_says_how_to_make_an_adapter(cli: Cli) -> None:
    result = cli("adapters", "list", "--adapters-dir", "nowhere")
    assert (result.exit_code, result.stdout.count("loraserve train")) == (0, 1)
    assert json.loads(cli("adapters", "list", "--adapters_dir", "nowhere", "--json").stdout) == []
    assert not Path("nowhere").exists()


def test_show_tells_what_an_adapter_is(cli: Cli, base: Base, own: Path) -> None:
    text = cli("adapters", "show", "pirate").stdout
    for part in ("speaks like a pirate", base.fingerprint[:19], "version", "sha256"):
        assert part in text
    facts = json.loads(cli("adapters", "show", "pirate", "--json").stdout)
    assert facts["base_fingerprint"] == base.fingerprint
    assert len(facts["targets"]) == 2 * base.config.num_hidden_layers
    assert facts["config"]["peft_type"] == "LORA"


def test_unknown_name_is_one_line_with_a_close_match(cli: Cli, own: Path) -> None:
    for command in (["show"], ["history"], ["rollback"], ["remove"], ["verify"]):
        result = cli("adapters", *command, "pirat")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: no adapter named 'pirat'; did you mean 'pirate'?")
    assert cli("adapters", "rename", "pirate", "../x").exit_code == 2


def test_import_versions_rollback_and_removal(cli: Cli, own: Path) -> None:
    assert cli("adapters", "export", "pirate", "out").exit_code == 0
    assert cli("adapters", "export", "pirate", "out").exit_code == 1
    assert "imported as version 1" in cli("adapters", "import", "out", "--name", "copy").stdout
    assert "imported as version 2" in cli("adapters", "import", own / "poet", "--name", "copy").stdout
    digests = {name: Registry(own).load(name).digest for name in ("pirate", "poet", "copy")}
    assert digests["copy"] == digests["poet"] != digests["pirate"]
    assert "back at version 1" in cli("adapters", "rollback", "copy").stdout
    assert Registry(own).load("copy").digest == digests["pirate"]
    history = json.loads(cli("adapters", "history", "copy", "--json").stdout)
    assert [(entry["version"], entry["current"]) for entry in history] == [(2, False), (1, True)]
    assert cli("adapters", "history", "copy").stdout.splitlines()[2].split()[:2] == ["*", "1"]
    assert cli("adapters", "rollback", "copy", "2").exit_code == 0
    assert cli("adapters", "rename", "copy", "renamed").exit_code == 0
    assert cli("adapters", "remove", "renamed", "nope").exit_code == 1
    assert "renamed" in Registry(own).names()
    assert cli("adapters", "remove", "renamed", "--yes").exit_code == 0
    assert "renamed" not in Registry(own).names()


def test_import_is_checked_against_the_base(cli: Cli, own: Path, tmp_path: Path) -> None:
    registry = Registry(own)
    record = registry.get("pirate")
    adapter, config = read_adapter(record.path, "pirate")
    Registry(tmp_path / "other").publish("foreign", adapter, config, {"base_fingerprint": "sha256:0", "base_name": "X"})
    result = cli("adapters", "import", tmp_path / "other" / "foreign")
    assert result.exit_code == 1
    assert "trained on another base (X)" in result.stderr
    assert "foreign" not in registry.names()
    result = cli("adapters", "import", tmp_path / "other" / "foreign", "--allow-base-mismatch")
    assert result.exit_code == 0
    assert "warning: trained on another base" in result.stderr


def test_minimind_export_and_import(cli: Cli, own: Path, base: Base, random_adapter) -> None:
    refused = cli("adapters", "export", "poet", "poet.pth")
    assert refused.exit_code == 1
    assert "only square linear layers" in refused.stderr
    assert cli("adapters", "export", "pirate", "x", "--format", "minimind").exit_code == 2
    assert cli("adapters", "export", "pirate", "x.pth", "--format", "peft").exit_code == 2
    adapter = random_adapter(base.shapes, "minimind", 3, 9)
    Registry(own).publish("square", adapter, LoraConfig.describing(adapter, base.shapes))
    assert cli("adapters", "export", "square", "lora_square_64.pth").exit_code == 0
    assert {weight.r for weight in read_minimind(Path("lora_square_64.pth")).weights.values()} == {16}
    result = cli("adapters", "import", "lora_square_64.pth")
    assert "adapter 'lora_square_64' imported as version 1: rank 16" in result.stdout
    assert "warning: it does not say which base it was trained on" in result.stderr


def test_blend_is_published(cli: Cli, own: Path) -> None:
    result = cli("adapters", "blend", "pirate:0.5+poet:0.5", "captain")
    assert "published as version 1: rank 5" in result.stdout
    assert cli("adapters", "blend", "base", "nothing").exit_code == 2
    assert json.loads(cli("adapters", "show", "captain", "--json").stdout)["recipe"] == {"blend": "pirate:0.5+poet:0.5"}


def test_verify_finds_damage_and_exits_with_one(cli: Cli, own: Path) -> None:
    result = cli("adapters", "verify")
    assert (result.exit_code, result.stdout) == (0, "3 adapters checked, no problems\n")
    file = own / "poet/.versions/1/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    result = cli("adapters", "verify")
    assert result.exit_code == 1
    assert "poet version 1: adapter_model.safetensors: cut short" in result.stdout
    assert cli("adapters", "verify", "pirate").exit_code == 0
