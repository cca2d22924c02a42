"""`train` with several adapters on one command line."""

import pytest

from loraserve.registry import Registry
from tests.train.test_train_command import run


@pytest.fixture
def other(tmp_path, write_rows):
    return write_rows(tmp_path / "other.jsonl", [{"instruction": f"say {i}", "output": f"it is {i}"} for i in range(6)])


@pytest.fixture
def common(base_dir, tmp_path):
    return f"--base {base_dir} --adapters-dir {tmp_path / 'adapters'} --device cpu --dtype float32 --epochs 1".split()


def manifests(tmp_path):
    registry = Registry(tmp_path / "adapters")
    return {name: registry.get(name).manifest for name in registry.names()}


def test_pairs_of_data_and_name_train_at_once(common, dialogue_file, other, tmp_path):
    result = run(*common, "--data", dialogue_file, "--name", "robot", "--data", other, "--name", "counter", "-r", 2)
    assert result.exit_code == 0, result.output
    assert "published 'robot' version 1" in result.stdout and "published 'counter' version 1" in result.stdout
    assert "training 2 adapters at once" in result.stderr
    found = manifests(tmp_path)
    assert {name: m.recipe["data"] for name, m in found.items()} == {"robot": "robot.jsonl", "counter": "other.jsonl"}
    assert all(m.recipe["r"] == 2 for m in found.values())
    assert run(*common, "--data", dialogue_file, "--data", other).exit_code == 0  # names are the files' stems
    assert sorted(manifests(tmp_path)) == ["counter", "other", "robot"]


def test_a_table_of_a_file_has_its_own_options_over_the_command_lines(common, dialogue_file, other, tmp_path):
    file = tmp_path / "runs.toml"
    file.write_text(
        '[[run]]\nname = "robot"\ndata = "robot.jsonl"\nrank = 3\nlearning_rate = 2e-3\nval-split = 0.2\n'
        'targets = ["q_proj", "v_proj"]\nrank_pattern = {q_proj = 5}\npublish = "always"\n'
        '[[run]]\ndata = "other.jsonl"\nrslora = true\ndora = true\nepochs = 2\n'
    )
    result = run(*common, "--runs", file, "--batch-size", 3, "--learning-rate", 5e-4)
    assert result.exit_code == 0, result.output
    robot, plain = manifests(tmp_path)["robot"].recipe, manifests(tmp_path)["other"].recipe
    assert (robot["r"], robot["learning_rate"], robot["val_split"], robot["epochs"]) == (3, 2e-3, 0.2, 1)
    assert robot["rank_pattern"] == ["q_proj=5"] and robot["targets"] == ["q_proj", "v_proj"]
    assert (plain["r"], plain["learning_rate"], plain["use_rslora"], plain["epochs"]) == (8, 5e-4, True, 2)
    assert robot["batch_size"] == plain["batch_size"] == 3 and not robot["use_rslora"]
    assert plain["use_dora"] and not robot["use_dora"]


def test_one_that_fails_is_told_and_the_exit_code_says_so(common, dialogue_file, other, tmp_path):
    file = tmp_path / "runs.toml"
    file.write_text('[[run]]\ndata = "robot.jsonl"\n[[run]]\ndata = "other.jsonl"\nlearning_rate = 1e30\nepochs = 3\n')
    result = run(*common, "--runs", file)
    assert result.exit_code == 1
    assert result.stdout.startswith("published 'robot' version 1") and "'other'" not in result.stdout
    assert "error: 'other': the " in result.stderr and "1 of 2 adapters were not published" in result.stderr
    assert list(manifests(tmp_path)) == ["robot"]


def test_a_sweep_publishes_one_adapter(common, dialogue_file, tmp_path):
    result = run(
        *common, "--data", dialogue_file, "--val-split", 0.2, "--lr-sweep", "1e-5, 1e-2", "--publish", "always"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.count("published") == 1
    manifest = manifests(tmp_path)["robot"]
    assert list(manifest.metrics["lr_sweep"]) == ["1e-05", "0.01"] and manifest.recipe["learning_rate"] == 1e-2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('rnak = 3\ndata = "x"', "run 1 has 'rnak'; did you mean 'rank'?"),
        ('save_dir = "x"\ndata = "x"', "run 1 has 'save_dir'"),
        ('rank = 0\ndata = "x"', "rank cannot be 0"),
        ('rank = true\ndata = "x"', "rank cannot be True: true and false are for switches"),
        ('publish = "never"\ndata = "x"', "publish cannot be 'never'"),
        ('name = "x"', "run 1 has no data"),
        ("rank", "is not TOML"),
    ],
)
def test_a_file_that_cannot_be_is_refused_with_the_place(common, tmp_path, table, message):
    file = tmp_path / "runs.toml"
    file.write_text(f"[[run]]\n{table}\n")
    result = run(*common, "--runs", file)
    assert result.exit_code == 2 and str(file) in result.stderr and message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "missing option '--data'"),
        ("--runs none.toml", "none.toml: No such file"),
        ("--runs x.toml --data y", "leave out --data and --name"),
        ("--data x --data y --name z", "2 --data and 1 --name"),
        ("--data x --name a --data y --name a --epochs 0", "epochs"),
        ("--data x --data y --dry-run", "--dry-run takes one run"),
        ("--data x --data y --lr-sweep 1e-3,1e-4", "--lr-sweep takes one run"),
        ("--data x --learning-rate 1e-3 --lr-sweep 1e-3,1e-4", "both say the rate"),
        ("--data x --lr-sweep 1e-3,much", "'much' is not a valid float"),
        ("--data x/a.jsonl --data y/a.jsonl", "2 runs have the name 'a'"),
    ],
)
def test_a_command_line_that_cannot_be_is_refused(common, line, message):
    result = run(*(line.split() if "epochs" in line else [*common, *line.split()]))
    assert result.exit_code == 2 and message in result.stderr, result.stderr
