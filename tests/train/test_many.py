"""Several adapters in shared passes: each comes out as alone, and none suffers from another's end."""

import io
import json
import signal

import pytest
import torch

from loraserve.errors import Conflict, InvalidRequest, NotBetter, TrainingFailed, TrainingInterrupted
from loraserve.registry import Registry
from loraserve.train.options import TrainOptions
from loraserve.train.trainer import TrainResult, sweep, train, train_all
from tests.train.conftest import PAIRS
from tests.train.test_trainer import SignalAt, replace


@pytest.fixture
def registry(base, tmp_path):
    return Registry(tmp_path / "adapters", base.shapes, base.fingerprint)


@pytest.fixture
def each(dialogue_file, tmp_path, write_rows):
    """Three runs that differ in data, lengths, ranks, rates, targets, windows and epochs; the second one ends first."""
    rows = [{"instruction": q * 3, "output": a[::-1] * 2} for q, a in PAIRS]
    other = write_rows(tmp_path / "mirror.jsonl", rows)
    common = {"batch_size": 4, "log_interval": 1, "save_interval": 3}
    return [
        TrainOptions(dialogue_file, "robot", epochs=3, learning_rate=1e-2, val_split=0.15, **common),
        TrainOptions(other, "mirror", r=3, targets="attention", epochs=2, learning_rate=2e-2, seed=1, **common),
        TrainOptions(
            dialogue_file,
            "whole",
            r=5,
            targets="all",
            epochs=4,
            learning_rate=5e-3,
            accumulation_steps=2,
            loss_reduction="mean",
            grad_clip=0.2,
            val_data=other,
            publish="always",
            **common,
        ),
    ]


def assert_alike(trained, alone, name):
    ours, theirs = trained.load(name).weights, alone.load(name).weights
    assert ours.keys() == theirs.keys()
    for target, weight in ours.items():
        torch.testing.assert_close(weight.A, theirs[target].A, atol=2e-3, rtol=0)
        torch.testing.assert_close(weight.B, theirs[target].B, atol=2e-3, rtol=0)
    assert max(weight.B.abs().max() for weight in ours.values()) > 1e-2


@pytest.mark.parametrize("budget", [None, "tight"])
def test_each_adapter_is_the_one_that_is_trained_alone(base, registry, each, tmp_path, budget, monkeypatch):
    """Catches rows, rates, losses, epochs or validation of a neighbour, and a run that stays when it is done."""
    if budget:
        monkeypatch.setattr("loraserve.train.memory.bytes_in_use", lambda base: 0)
        each = [replace(one, memory_budget=6_000_000) for one in each]
    alone = Registry(tmp_path / "alone", base.shapes, base.fingerprint)
    for one in each:
        train(base, alone, replace(one, memory_budget=None), io.StringIO())
    log = io.StringIO()
    outcomes = train_all(base, registry, each, log)
    assert all(isinstance(outcome, TrainResult) for outcome in outcomes)
    assert ("passes of up to 768 tokens" not in log.getvalue()) == bool(budget)
    for one, outcome in zip(each, outcomes, strict=True):
        assert_alike(registry, alone, one.name)
        expected = alone.get(one.name).manifest
        assert outcome.record.manifest.recipe == expected.recipe
        for figure in ("steps", "tokens", "best_epoch", "dialogues", "num_parameters"):
            assert outcome.metrics[figure] == expected.metrics[figure]
        assert outcome.metrics["loss"] == pytest.approx(expected.metrics["loss"], abs=5e-3)
        assert outcome.metrics["val_loss"] == pytest.approx(expected.metrics["val_loss"], abs=5e-3)
    lines = log.getvalue().splitlines()
    last = {
        name: max(i for i, line in enumerate(lines) if line.startswith(f"{name}: epoch")) for name in registry.names()
    }
    assert last["mirror"] < last["whole"] < last["robot"]
    assert not (registry.root / ".training" / "robot").exists()


def test_a_preference_run_beside_another_is_the_one_that_is_trained_alone(base, registry, each, tmp_path, write_rows):
    def messages(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": messages(q, a), "rejected": messages(q, a[::-1])} for q, a in PAIRS]
    prefers = replace(each[1], data=write_rows(tmp_path / "likes.jsonl", rows), objective="dpo", name="likes")
    alone = Registry(tmp_path / "alone", base.shapes, base.fingerprint)
    expected = [train(base, alone, one, io.StringIO()).metrics for one in (prefers, each[0])]
    outcomes = train_all(base, registry, [prefers, each[0]], io.StringIO())
    for name in ("likes", "robot"):
        assert_alike(registry, alone, name)
    assert outcomes[0].metrics["reward_margin"] == pytest.approx(expected[0]["reward_margin"], abs=5e-3)
    assert outcomes[0].metrics["reward_margin"] > 0.05 and "reward_margin" not in outcomes[1].metrics


@pytest.mark.parametrize("step", ["robot: epoch 2/3  step 5/9", "mirror: epoch 2/2  step 4/4", "whole: epoch 4/4"])
def test_a_stopped_set_resumes_to_the_same_bits(base, registry, each, tmp_path, step):
    whole = Registry(tmp_path / "whole", base.shapes, base.fingerprint)
    train_all(base, whole, each, io.StringIO())
    with pytest.raises(TrainingInterrupted, match=r"'whole' after step \d+ of 16.*--resume"):
        train_all(base, registry, each, SignalAt(step, signal.SIGTERM))
    assert registry.names() == []
    with pytest.raises(InvalidRequest, match="is of robot, mirror, whole at once and not of one run alone"):
        train(base, registry, replace(each[0], resume=True), io.StringIO())
    with pytest.raises(InvalidRequest, match=r"mirror: r was 3 and is 4"):
        train_all(base, registry, [replace(each[0], resume=True), replace(each[1], r=4), each[2]], io.StringIO())
    train_all(base, registry, [replace(each[0], resume=True), *each[1:]], io.StringIO())
    for name in whole.names():
        assert registry.load(name).digest == whole.load(name).digest
        losses = [
            [
                (row["step"], row.get("loss"), row.get("val_loss"))
                for row in map(json.loads, path.read_text().splitlines())
            ]
            for path in (r.get(name).path / "metrics.jsonl" for r in (registry, whole))
        ]
        assert losses[0] == losses[1]


def test_what_fails_leaves_the_others_and_is_told(base, registry, each, tmp_path):
    """One loses its numbers, one is worse than the base; the third is what it is alone."""
    alone = Registry(tmp_path / "alone", base.shapes, base.fingerprint)
    train(base, alone, each[0], io.StringIO())
    diverges = replace(each[1], learning_rate=1e30)
    worse = replace(each[2], learning_rate=3.0, publish="better")
    diverged, done, bad = train_all(base, registry, [diverges, each[0], worse], io.StringIO())
    assert isinstance(diverged, TrainingFailed) and isinstance(bad, NotBetter) and isinstance(done, TrainResult)
    assert registry.names() == ["robot"]
    assert_alike(registry, alone, "robot")
    assert (registry.root / ".training" / "mirror" / "checkpoint.pt").exists()
    again = [replace(diverges, resume=True), each[0], replace(worse, publish="always")]
    log = io.StringIO()
    diverged, done, bad = train_all(base, registry, again, log)
    assert isinstance(diverged, TrainingFailed) and done is None and isinstance(bad, TrainResult)
    assert "step 1/" not in log.getvalue() and "robot: resuming after step 9 of 9: published" in log.getvalue()
    assert registry.names() == ["robot", "whole"] and len(registry.history("robot")) == 1


def test_a_set_that_cannot_be_is_refused(base, registry, each, tmp_path):
    with pytest.raises(InvalidRequest, match="2 runs have the name 'robot'"):
        train_all(base, registry, [each[0], replace(each[1], name="robot")], io.StringIO())
    with pytest.raises(InvalidRequest, match="--report-to takes one run"):
        train_all(base, registry, [replace(one, report_to=("tensorboard",)) for one in each], io.StringIO())

    class Meanwhile(io.StringIO):
        def write(self, text):
            if "mirror: epoch" in text:
                with pytest.raises(Conflict, match="another run is training 'mirror'"):
                    train(base, registry, each[1], io.StringIO())
                self.asked = True
            return super().write(text)

    log = Meanwhile()
    train_all(base, registry, each[:2], log)
    assert log.asked


def test_a_sweep_publishes_the_rate_that_does_best(base, registry, each, tmp_path):
    alone = Registry(tmp_path / "alone", base.shapes, base.fingerprint)
    rates = [1e-5, 1e-2, 1e30]
    losses = {}
    for rate in rates[:2]:
        one = replace(each[0], learning_rate=rate, publish="always")
        losses[rate] = train(base, alone, one, io.StringIO()).metrics["val_loss"]
    assert losses[1e-2] < losses[1e-5] - 0.05
    log = io.StringIO()
    result = sweep(base, registry, each[0], rates, log)
    assert_alike(registry, alone, "robot")  # the last one published there is the better one
    found = result.record.manifest.metrics["lr_sweep"]
    assert list(found) == ["1e-05", "0.01", "1e+30"] and found["1e+30"] is None
    assert [found["1e-05"], found["0.01"]] == pytest.approx(list(losses.values()), abs=5e-3)
    assert result.record.manifest.recipe["learning_rate"] == 1e-2
    card = (result.record.path / "README.md").read_text("utf-8")
    assert f"| 0.01 | {found['0.01']:.4f} |" in card and "| 1e+30 | failed |" in card
    assert "best" in next(line for line in log.getvalue().splitlines() if line.split()[:1] == ["0.01"])
    assert registry.names() == ["robot"] and not (registry.root / ".training" / "robot").exists()
    with pytest.raises(InvalidRequest, match="--val-split"):
        sweep(base, registry, replace(each[0], val_split=0.0), rates, log)
    with pytest.raises(InvalidRequest, match="different"):
        sweep(base, registry, each[0], [1e-2, 1e-2], log)
    with pytest.raises(TrainingFailed):
        sweep(base, registry, each[0], [1e29, 1e30], log)


def test_a_stopped_sweep_resumes_to_the_same_bits(base, registry, each, tmp_path):
    whole = Registry(tmp_path / "whole", base.shapes, base.fingerprint)
    sweep(base, whole, each[0], [1e-2, 3e-3], io.StringIO())
    with pytest.raises(TrainingInterrupted):
        sweep(base, registry, each[0], [1e-2, 3e-3], SignalAt("lr-0.01: epoch 2/3  step 5/9", signal.SIGINT))
    sweep(base, registry, replace(each[0], resume=True), [1e-2, 3e-3], io.StringIO())
    assert registry.load("robot").digest == whole.load("robot").digest


def test_a_run_alone_after_a_stopped_sweep_leaves_nothing_of_it(base, registry, each):
    with pytest.raises(TrainingInterrupted):
        sweep(base, registry, each[0], [1e-2, 3e-3], SignalAt("lr-0.01: epoch 2/3  step 5/9", signal.SIGINT))
    folder = registry.root / ".training" / "robot"
    assert (folder / "lr-0.003" / "metrics.jsonl").exists()
    train(base, registry, each[0], io.StringIO())
    assert registry.names() == ["robot"] and not folder.exists()
