import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraserve.cli.main import main
from loraserve.registry import Registry

LINE = (
    "--epochs 20 --hidden_size 2048 --device cuda:6 --batch_size 16 --learning_rate 1e-4 --accumulation_steps 8 "
    "--log_interval 10 --save_interval 100 --data_path lora_identity.jsonl --num_hidden_layers 20 --use_wandb "
    "--from_resume 1 --from_weight full_sft"
)


def run(*args):
    return CliRunner().invoke(main, ["train", *map(str, args)])


@pytest.fixture
def arguments(base_dir, dialogue_file, tmp_path):
    return (
        f"--base {base_dir} --data {dialogue_file} --adapters-dir {tmp_path / 'adapters'} --device cpu --dtype float32 "
        "--batch-size 4 --epochs 2"
    ).split()


@pytest.fixture
def minimind_folder(conformance, dialogue_file, tmp_path, monkeypatch):
    """A MiniMind checkout as its user has it: we are in trainer/, weights are in out/, the tokenizer in model/."""
    for folder in ("trainer", "out"):
        (tmp_path / folder).mkdir()
    shutil.copy(conformance / "minimind-3-dense" / "full_sft_64.pth", tmp_path / "out")
    shutil.copytree(conformance / "minimind-3-tokenizer", tmp_path / "model")
    shutil.copy(dialogue_file, tmp_path / "trainer" / "lora_identity.jsonl")
    monkeypatch.chdir(tmp_path / "trainer")
    return tmp_path / "trainer"


def test_train_says_what_it_published_and_where(arguments, tmp_path):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("published 'robot' version 1 in ")
    assert "step 8/8" in result.stderr
    assert Registry(tmp_path / "adapters").names() == ["robot"]


def test_a_validation_file_is_validated_on_and_leaves_nothing(arguments, dialogue_file, tmp_path):
    result = run(*arguments, "--val-data", dialogue_file)
    assert result.exit_code == 0, result.stderr
    assert "14 dialogues and 14 for validation" in result.stderr and "validation after step 8/8" in result.stderr
    assert not (tmp_path / "adapters" / ".training" / "robot").exists()
    recipe = Registry(tmp_path / "adapters").get("robot").manifest.recipe
    assert recipe["val_data"] == "robot.jsonl"
    both = run(*arguments, "--val-data", dialogue_file, "--val-split", "0.1")
    assert both.exit_code == 2 and "give one" in both.stderr


def test_miniminds_command_line_runs_as_it_is(minimind_folder):
    line = (
        LINE.replace("2048", "64").replace("cuda:6", "cpu").replace("layers 20", "layers 3").replace("--use_wandb ", "")
    )
    result = run(*line.split())
    assert result.exit_code == 0, result.stderr
    record = Registry(minimind_folder / "adapters").get("lora_identity")
    assert record.manifest.base_name == "full_sft_64"
    assert record.manifest.recipe["accumulation_steps"] == 8 and record.manifest.recipe["learning_rate"] == 1e-4
    more = "--lora_name other --use_moe 0 --save_dir ../out --max_seq_len 340 --num_workers 8 --dtype float32 --grad_clip 1"
    result = run(*line.split(), *more.split(), "--use_compile", "0", "--targets", "minimind", "--epochs", "1")
    assert result.exit_code == 0, result.stderr
    assert Registry(minimind_folder / "adapters").get("other").rank == 16


def test_the_verbatim_line_names_what_is_missing_and_never_falls_back_to_the_bundled_base(minimind_folder):
    line = LINE.split()
    if importlib.util.find_spec("wandb") is None:
        result = run(*line)
        assert result.exit_code == 2 and result.stderr.strip().endswith("pip install 'loraserve[wandb]'")
    line.remove("--use_wandb")
    result = run(*line)
    assert result.exit_code == 1
    assert "../out/full_sft_2048.pth" in result.stderr and "out/full_sft_2048.pth" in result.stderr
    result = run(*line, "--save_dir", "elsewhere", "--use_moe", "1")
    assert "../out/full_sft_2048_moe.pth and elsewhere/full_sft_2048_moe.pth" in result.stderr
    line.remove("--from_weight"), line.remove("full_sft")
    assert "full_sft_2048.pth" in run(*line).stderr  # upstream's default weight
    assert not Path("adapters").exists()


def test_layers_that_are_not_those_of_the_weights_are_refused(minimind_folder):
    line = "--data_path lora_identity.jsonl --from_weight full_sft --hidden_size 64 --num_hidden_layers 20 --device cpu"
    result = run(*line.split())
    assert result.exit_code == 2 and "has 3 layers, not the 20 of --num-hidden-layers" in result.stderr


def test_two_bases_on_one_line_are_a_usage_error(arguments):
    result = run(*arguments, "--from_weight", "full_sft")
    assert result.exit_code == 2 and "--base and --from-weight both name a base" in result.stderr


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        ("down_proj", {"down_proj"}),
        (r"model\.layers\.[01]\.mlp\.(up|down)_proj", {"up_proj", "down_proj"}),
    ],
)
def test_targets_are_names_or_a_regex(arguments, tmp_path, targets, expected):
    result = run(*arguments, "--targets", targets, "--name", "some", "--rank", "3", "--alpha", "4.5")
    assert result.exit_code == 0, result.stderr
    record = Registry(tmp_path / "adapters").get("some")
    assert {target.rpartition(".")[2] for target in record.targets} == expected
    assert record.rank == 3 and record.config.lora_alpha == 4.5


def test_methods_are_options_and_an_adapter_can_be_gone_on_with(arguments, tmp_path):
    patterns = ["--rank-pattern", "layers.0.*=2", "--rank_pattern", "q_proj=5", "--alpha-pattern", "q_proj=2.5"]
    result = run(*arguments, *patterns, "--rslora", "--dora", "--lora-plus-ratio", "4", "--name", "some")
    assert result.exit_code == 0, result.stderr
    record = Registry(tmp_path / "adapters").get("some")
    config = record.config
    assert list(config.rank_pattern.items()) == [("layers.0.*", 2), ("q_proj", 5)]
    assert config.alpha_pattern == {"q_proj": 2.5} and config.use_rslora and config.lora_alpha == 16
    assert config.use_dora and Registry(tmp_path / "adapters").load("some").is_dora
    assert record.manifest.recipe["lora_plus_ratio"] == 4
    result = run(*arguments, "--init-from", "some", "--name", "more")
    assert result.exit_code == 0, result.stderr
    assert Registry(tmp_path / "adapters").get("more").config == config


def test_mistakes_are_one_line_on_stderr(arguments, tmp_path):
    for extra, code, text in (
        (("--rank-pattern", "q_proj"), 2, "'q_proj' is not PATTERN=NUMBER, such as q_proj=4"),
        (("--rank-pattern", "q_proj=1.5"), 2, "not a valid integer"),
        (("--rank-pattern", "q_proj=1", "--rank-pattern", "q_proj=2"), 2, "'q_proj' is given twice"),
        (("--alpha-pattern", "q_prj=1"), 2, "alpha_pattern: 'q_prj' matches no layer"),
        (("--init-from", "some", "--rank", "4"), 2, "--rank and --init-from do not go together"),
        (("--targets", "q_prj"), 2, "did you mean 'q_proj'"),
        (("--data", tmp_path / "none.jsonl"), 1, "No such file"),
        (("--name", "../up"), 2, "cannot name an adapter"),
        (("--learning-rate", "0"), 2, "is not in the range x>0"),
        (("--learning-rate", "inf"), 2, "learning_rate must be above 0"),
        (("--epochs", "many"), 2, "not a valid integer"),
    ):
        result = run(*arguments, *extra)
        assert result.exit_code == code and text in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


@pytest.fixture
def start():
    """Starts the real command in a process of its own, as a shell does in the foreground."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import runpy; "
    code += "runpy.run_module('loraserve', run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    processes = []

    def run(arguments):
        command = [sys.executable, "-c", code, "train", *arguments]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True, env=environment))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def finish(process):
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def wait_for(process, text):
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"the process ended before {text!r}")


def test_a_run_killed_with_9_and_resumed_ends_with_the_same_adapter_bit_for_bit(start, arguments, tmp_path):
    settings = "--epochs 15 --accumulation-steps 2 --log-interval 1 --save-interval 10 --val-split 0.1"
    whole = [*arguments, *settings.split(), "--adapters-dir", str(tmp_path / "whole")]
    killed = [*arguments, *settings.split(), "--adapters-dir", str(tmp_path / "killed")]
    code, _, stderr = finish(start(whole))
    assert code == 0, stderr
    process = start(killed)
    wait_for(process, "step 28/60")
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert Registry(tmp_path / "killed").names() == []
    code, stdout, stderr = finish(start([*killed, "--resume"]))
    assert code == 0, stderr
    assert "published 'robot' version 1" in stdout
    assert "step 2/60" not in stderr and "resuming after step " in stderr
    adapters = [tmp_path / which / "robot" / "adapter_model.safetensors" for which in ("whole", "killed")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_ctrl_c_saves_and_says_how_to_go_on(start, arguments, tmp_path):
    process = start([*arguments, "--epochs", "500", "--log-interval", "1"])
    wait_for(process, "step 5/2000")
    process.send_signal(signal.SIGINT)
    code, _, stderr = finish(process)
    assert code == 130
    assert "error: stopped by SIGINT after step" in stderr and "--resume" in stderr and "Traceback" not in stderr
    assert (tmp_path / "adapters" / ".training" / "robot" / "checkpoint.pt").exists()


def test_two_runs_on_one_name_are_refused(start, arguments):
    first = start([*arguments, "--epochs", "500", "--log-interval", "1"])
    wait_for(first, "step 1/2000")
    result = run(*arguments)
    first.kill()
    finish(first)
    assert result.exit_code == 1 and "another run is training 'robot'" in result.stderr
    assert run(*arguments).exit_code == 0  # the lock died with its process


def test_eight_bit_weights_are_refused_for_training(arguments, tmp_path):
    result = run(*arguments, "--dtype", "int8")
    assert result.exit_code == 2
    assert "dtype int8 is for serving; train in float32" in result.stderr
    assert not (tmp_path / "adapters").exists()


def test_bad_rows_end_a_run_unless_they_are_skipped_and_the_card_says_which(arguments, dialogue_file, tmp_path):
    with dialogue_file.open("a") as file:
        file.write('{"text": "x"}\n{"messages": [\n')
    result = run(*arguments)
    assert result.exit_code == 1 and "2 rows cannot be used: line 15: has neither" in result.stderr
    assert "--on-bad-row skip" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not any((tmp_path / "adapters").glob("robot*"))
    result = run(*arguments, "--on-bad-row", "skip")
    assert result.exit_code == 0, result.stderr
    rejected = tmp_path / "adapters" / ".training" / "robot" / "rejected.jsonl"
    assert f"2 rows left out, in full in {rejected}: line 15: has neither" in result.stderr
    assert '{"messages": [' in [json.loads(line)["row"] for line in rejected.read_text().splitlines()]
    record = Registry(tmp_path / "adapters").get("robot")
    assert record.manifest.metrics["dialogues"] == 14 and record.manifest.metrics["rejected_rows"] == 2
    card = (record.path / "README.md").read_text("utf-8")
    assert "2 rows of the file were left out: line 15: has neither" in card and "line 16: broken JSON" in card
    assert sorted(path.name for path in rejected.parent.iterdir()) == ["rejected.jsonl"]


def test_what_the_template_does_not_show_is_told_before_training(arguments, dialogue_file):
    row = {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yo", "reasoning_content": "hm"},
        ]
    }
    with dialogue_file.open("a") as file:
        file.write(json.dumps(row) + "\n")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "warning: the base's chat template does not show 'reasoning_content' of 1 dialogues" in result.stderr


def test_a_memory_budget_is_planned_for_or_refused(arguments):
    result = run(*arguments, "--memory-budget", "64GB")
    assert result.exit_code == 0, result.stderr
    assert "at the peak; whole batches" in result.stderr
    result = run(*arguments, "--memory-budget", "1MB")
    assert result.exit_code == 2 and "a memory budget of 1 MB is too small: the least is" in result.stderr
