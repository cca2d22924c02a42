"""`loraserve base`: what is listed, shown and converted."""

import json
from pathlib import Path

import pytest
import torch

from loraserve.base.checkpoint import read_checkpoint
from loraserve.base.load import Base
from tests.cli.conftest import Cli, Shell


def test_listed_bases_can_be_loaded_by_the_ref_that_is_shown(cli: Cli, base: Base) -> None:
    listed = json.loads(cli("base", "list", base.path, "--json").stdout)
    mine = [entry for entry in listed if entry["path"] == str(base.path)]
    assert [(entry["ref"], entry["architecture"], entry["format"]) for entry in mine] == [
        (str(base.path), "qwen3", "hf")
    ]
    shown = json.loads(cli("base", "show", mine[0]["ref"], "--json").stdout)
    assert shown["size_bytes"] == mine[0]["size_bytes"] == (base.path / "model.safetensors").stat().st_size


def test_the_list_is_a_table(cli: Cli, base: Base) -> None:
    lines = cli("base", "list", base.path).stdout.splitlines()
    assert lines[0].split() == ["BASE", "ARCHITECTURE", "FORMAT", "SIZE"]
    assert any(line.startswith(f"{base.path}  qwen3 ") for line in lines)


def test_a_directory_to_list_must_exist(cli: Cli) -> None:
    result = cli("base", "list", "nowhere")
    assert result.exit_code == 2
    assert "'nowhere' does not exist" in result.stderr


def test_show_tells_what_a_base_is(cli: Cli, base: Base) -> None:
    facts = json.loads(cli("base", "show", "--json").stdout)  # the one in LORASERVE_BASE
    assert facts["fingerprint"] == base.fingerprint
    assert facts["parameters"] == base.config.num_parameters
    assert (facts["path"], facts["format"], facts["dtype"]) == (str(base.path), "hf", "float16")
    assert facts["config"]["num_key_value_heads"] == 2
    text = cli("base", "show").stdout
    assert base.fingerprint in text
    assert f"({base.config.num_parameters:,})" in text
    assert "num_experts" not in text


def test_show_of_a_pth_without_tokenizer_says_so(cli: Cli, here: Path) -> None:
    assert cli("base", "convert", str(read_path(cli)), "alone/full_sft_64.pth").exit_code == 0
    shown = cli("base", "show", "alone/full_sft_64.pth")
    assert shown.exit_code == 0, shown.stderr
    assert "none found; give its directory with --tokenizer" in shown.stdout
    facts = json.loads(cli("base", "show", "alone/full_sft_64.pth", "--json", "--tokenizer", read_path(cli)).stdout)
    assert facts["tokenizer"] == str(read_path(cli))


def read_path(cli: Cli) -> Path:
    return Path(json.loads(cli("base", "show", "--json").stdout)["path"])


def test_there_and_back_is_the_same_base(cli: Cli, here: Path, base: Base) -> None:
    there = cli("base", "convert", base.path, "full_sft_64.pth")
    assert there.exit_code == 0, there.stderr
    assert f"{base.fingerprint[:19]}, the same as before" in there.stdout
    back = cli("base", "convert", "full_sft_64.pth", "hf", "--tokenizer", base.path)
    assert back.exit_code == 0, back.stderr
    before, after = read_checkpoint(base.path), read_checkpoint(here / "hf")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
    assert (here / "hf" / "tokenizer.model").read_bytes() == (base.path / "tokenizer.model").read_bytes()


def test_real_minimind_files_convert_both_ways(cli: Cli, here: Path, conformance: Path) -> None:
    for kind, suffix in (("minimind-3-dense", ""), ("minimind-3-moe", "_moe"), ("minimind2-dense", "")):
        source = conformance / kind / f"full_sft_64{suffix}.pth"
        tokenizer = conformance / f"{kind.partition('-dense')[0].partition('-moe')[0]}-tokenizer"
        assert cli("base", "convert", source, kind, "--tokenizer", tokenizer).exit_code == 0
        result = cli("base", "convert", kind, f"{kind}.pth")
        assert "the same as before" in result.stdout, result.stderr
        theirs, ours = torch.load(source, weights_only=True), torch.load(f"{kind}.pth", weights_only=True)
        weights = {name for name in theirs if "freqs" not in name}
        assert ours.keys() == weights
        assert all(torch.equal(ours[name], theirs[name]) for name in weights)


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (["show", "nowhere"], 1, "no model named 'nowhere'"),
        (["show", "."], 1, ". has no model.safetensors"),
        (["pull", "."], 2, "'.' is not a hub id"),
        (["pull", "a b/c"], 2, "is not a hub id"),
        (["pull", "no/where"], 1, "cannot be reached"),
        (["convert", "nowhere", "x"], 1, "no model named 'nowhere'"),
        (["convert", "--format", "hf", "nowhere", "x.pth"], 2, "needs a directory's name"),
    ],
)
def test_what_cannot_be_done_is_one_line(cli: Cli, here: Path, line: list[str], code: int, says: str) -> None:
    result = cli("base", *line)
    assert result.exit_code == code
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(here.iterdir())


def test_converting_overwrites_nothing(cli: Cli, here: Path, base: Base) -> None:
    (here / "mine.pth").write_text("mine")
    assert cli("base", "convert", base.path, "mine.pth").exit_code == 1
    assert (here / "mine.pth").read_text() == "mine"


def test_a_real_process_prints_the_same(cli: Cli, shell: Shell) -> None:
    assert shell("base", "show").stdout == cli("base", "show").stdout
