"""`loraserve train --dry-run`: what it counts, how it looks, and that it touches nothing."""

import json
import re
from itertools import pairwise

import pytest
from click.testing import CliRunner

from loraserve.cli.main import main
from loraserve.train.memory import UNITS
from loraserve.train.rows import DataFile
from loraserve.train.survey import Survey, _histogram
from tests.train.test_data import TOOLS, encoder_of


def ask(question, *answers):
    turns = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for answer in answers]
    return {"messages": [message for turn in turns for message in turn]}


ROWS = [
    ask("who", "me"),
    ask("who", "you"),
    ask("who", "me"),
    ask("hello", "hi", "hi again"),
    {"instruction": "who", "input": "", "output": "me"},
    ask("long", "word " * 35),
    {**ask("time?", "noon"), "tools": TOOLS},
]
BAD = [{"text": "x"}, ask("who", " ")]


@pytest.fixture
def data(tmp_path, write_rows):
    return write_rows(tmp_path / "data.jsonl", [*ROWS, *BAD])


@pytest.fixture
def dry_run(base_dir, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["train", "--base", str(base_dir), "--device", "cpu", "--data", str(data), "--targets", "all", "--dry-run"]
    return lambda *more: CliRunner().invoke(main, [*given, *more])


def test_every_count_is_that_of_the_rows(base_dir, data):
    encoder = encoder_of(base_dir, max_seq_len=70)
    survey = Survey().read(DataFile(data), encoder, print)
    facts = survey.facts()
    assert (facts["rows"], facts["accepted"], facts["rejected"]) == (9, 7, 2)
    assert [(reason["first_lines"], reason["rows"]) for reason in facts["reasons"]] == [([8], 1), ([9], 1)]
    assert facts["formats"] == {"OpenAI": 6, "Alpaca": 1} and facts["answers_per_row"] == {"1": 6, "2": 1}
    assert facts["truncated"] == 1 and facts["tokens_cut"] > 30 and facts["lengths"]["longest"] == 70
    assert facts["not_in_template"] == {"tools": 1}
    # "who" has "me" three times, the Alpaca row being the same dialogue, and "you" once
    assert (facts["duplicates"], facts["ambiguous_prompts"], facts["ambiguous_rows"]) == (2, 1, 4)
    assert sum(each["rows"] for each in facts["histogram"]) == 7
    lengths, supervised = [], 0
    for question, *answers in (("who", "me"),) * 3 + (("who", "you"), ("hello", "hi", "hi again"), ("time?", "noon")):
        parts = [
            (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", f"{a}<|im_end|>\n") for a in answers
        ]
        encode = encoder._tokenizer.encode
        lengths.append(sum(len(encode(part)) for turn in parts for part in turn))
        supervised += sum(len(encode(answer)) for _, answer in parts)
    prompt = len(encode("<|im_start|>user\nlong<|im_end|>\n<|im_start|>assistant\n"))
    assert facts["tokens"] == sum(lengths) + 70
    assert facts["supervised_tokens"] == supervised + 70 - prompt


@pytest.mark.parametrize("lengths", [[1], [7, 7], [3, 950], [1, 2, 3, 10**6], list(range(1000, 1100))])
def test_a_histogram_has_at_most_ten_bins_and_every_row_is_in_one(lengths):
    import numpy as np

    bins = _histogram(np.array(lengths))
    assert 1 <= len(bins) <= 10
    for before, after in pairwise(bins):
        assert after["from"] == before["to"] + 1
    for each in bins:
        assert each["rows"] == sum(each["from"] <= length <= each["to"] for length in lengths)
    assert sum(each["rows"] for each in bins) == len(lengths)


def test_the_report_fits_80_columns_and_training_would_say_the_same(dry_run, tmp_path):
    result = dry_run("--val-split", "0.2", "--batch-size", "2", "--accumulation-steps", "2", "--epochs", "3")
    assert result.exit_code == 1  # as training would be
    assert "data.jsonl: 2 rows cannot be used: line 8: has neither" in result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in result.stdout
    for expected in (
        "  rows        7 accepted, 2 rejected",
        "  formats     OpenAI 6, Alpaca 1",
        "  turns       6 with one answer, 1 with two",
        "  duplicates  2 rows repeat an earlier one",
        "  ambiguous   1 prompts have different answers, in 4 rows",
        "  not shown   'tools' of 1 rows, by the chat template",
        "  line 9: an assistant message is empty",
        "  rows     6 to train on, 1 for validation",
        "  steps    3 an epoch, 9 in 3 epochs",
        "  updates  6, of 2 steps each",
    ):
        assert expected in lines
    assert any(line.startswith("  memory   about") and line.endswith("in whole batches") for line in lines)
    assert any("█" * 40 in line for line in lines)
    assert not (tmp_path / "adapters").exists()
    assert dry_run("--on-bad-row", "skip").exit_code == 0


def test_json_has_the_same_figures_and_goes_with_a_dry_run_only(dry_run, data):
    facts = json.loads(dry_run("--on-bad-row", "skip", "--json").stdout)
    assert facts["data"] == "data.jsonl" and facts["survey"]["accepted"] == 7 and facts["run"]["steps"] == 10
    assert facts["sha256"] == DataFile(data).sha256
    result = CliRunner().invoke(main, ["train", "--data", str(data), "--json"])
    assert result.exit_code == 2 and "--json goes with --dry-run" in result.stderr


def test_a_file_without_a_usable_row_has_a_report_too(dry_run, data):
    data.write_text('{"text": "x"}\n')
    result = dry_run()
    assert result.exit_code == 1 and "0 accepted, 1 rejected" in result.stdout
    assert "no row can be used; 1 row cannot be used: line 1" in result.stderr


def test_the_plan_is_what_training_does(base_dir, dialogue_file, tmp_path):
    arguments = (
        f"train --base {base_dir} --data {dialogue_file} --adapters-dir {tmp_path / 'a'} --device cpu --epochs 2"
    )
    arguments = [*arguments.split(), "--batch-size", "4", "--val-split", "0.2", "--accumulation-steps", "2"]
    facts = json.loads(CliRunner().invoke(main, [*arguments, "--dry-run", "--json"]).stdout)
    plan, memory = facts["run"], facts["memory"]
    result = CliRunner().invoke(main, [*arguments, "--log-interval", "1"])
    assert result.exit_code == 0, result.stderr
    assert (
        f"{plan['train_rows']} dialogues and {plan['val_rows']} for validation, {plan['steps']} steps" in result.stderr
    )
    assert (plan["steps_per_epoch"], plan["steps"], plan["updates"]) == (3, 6, 4)
    found = re.search(r"memory: about ([\d.]+) (\w+) at the peak; whole batches", result.stderr)
    assert found and memory["peak"] / UNITS[found[2]] == pytest.approx(float(found[1]), rel=0.2)
    assert (memory["checkpointing"], memory["max_rows"]) == (False, None)
    refused = CliRunner().invoke(main, [*arguments, "--dry-run", "--memory-budget", "1MB"])
    assert refused.exit_code == 2 and "a memory budget of 1 MB is too small" in refused.stderr
    assert "  updates  4, of 2 steps each" in refused.stdout.splitlines()
