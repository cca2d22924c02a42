"""`loraserve adapters compare` on the tiny base: figures are those of the adapters, answers those of each alone."""

import json

import pytest

from loraserve.lora.stack import AdapterStack
from loraserve.registry import Registry
from loraserve.train.general import perplexity


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    pairs = [("Hello!", "I am fine."), ("你是谁？", "我是模型。"), ("Tell me a story.", "It is sunny.")]
    rows = [{"instruction": question, "output": answer} for question, answer in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_two_adapters_side_by_side_as_json(cli, base, adapters_dir, questions):
    result = cli("adapters", "compare", "pirate", "poet", "--data", questions, "--json", "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["adapters"] == ["pirate", "poet"] and found["figures"]["rank"] == [2, 3]
    registry = Registry(adapters_dir, base.shapes, base.fingerprint)
    expected = [perplexity(base, AdapterStack([registry.load(name).weights])) for name in ("pirate", "poet")]
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)
    assert found["figures"]["perplexity on general text"] == pytest.approx(expected, rel=1e-4)
    losses = found["figures"]["loss on questions.jsonl"]
    assert losses[0] != losses[1]
    assert [each["question"] for each in found["answers"]] == ["Hello!", "你是谁？", "Tell me a story."]
    swapped = json.loads(
        cli("adapters", "compare", "poet", "pirate", "--data", questions, "--json", "--dtype", "float32").stdout
    )
    assert swapped["figures"]["loss on questions.jsonl"] == pytest.approx(losses[::-1])
    assert [(a["second"], a["first"]) for a in swapped["answers"]] == [
        (a["first"], a["second"]) for a in found["answers"]
    ]


def test_an_adapter_beside_the_base_as_tables(cli, questions):
    result = cli("adapters", "compare", "base", "pirate", "--data", questions)
    assert result.exit_code == 0, result.stderr
    assert "perplexity on general text" in result.stdout and "pirate answers" in result.stdout
    assert "loss on questions.jsonl" in result.stdout and "你是谁？" in result.stdout


def test_an_unknown_name_is_one_line_with_close_matches(cli):
    result = cli("adapters", "compare", "base", "pirat")
    assert result.exit_code == 1 and "did you mean 'pirate'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
