"""Early stop, the weights that are published, and when nothing is."""

import io
import json
import random
import signal

import pytest
import torch

from loraserve.errors import InvalidRequest, NotBetter, TrainingInterrupted
from loraserve.registry import Registry
from loraserve.train.best import BestWeights
from loraserve.train.options import TrainOptions
from loraserve.train.trainer import train
from tests.train.test_dora import values, with_magnitudes
from tests.train.test_step import trainable
from tests.train.test_trainer import SignalAt, replace


@pytest.fixture
def registry(base, tmp_path):
    return Registry(tmp_path / "adapters", base.shapes, base.fingerprint)


@pytest.fixture
def overfitting(tmp_path, write_rows):
    """Six dialogues of random letters can only be learned by heart: it does not help with the other two."""
    rng = random.Random(0)
    rows = [
        {"instruction": f"say {i}", "output": "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=24))}
        for i in range(8)
    ]
    path = write_rows(tmp_path / "colours.jsonl", rows)
    return TrainOptions(
        data=path, name="colours", epochs=12, batch_size=2, learning_rate=3e-2, val_split=0.25, log_interval=1
    )


def val_losses(record):
    rows = [json.loads(line) for line in (record.path / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


def test_the_weights_of_the_best_epoch_are_published_and_not_the_last(base, registry, overfitting, tmp_path):
    log = io.StringIO()
    record = train(base, registry, overfitting, log).record
    losses = val_losses(record)
    best = min((step for step in losses if step), key=losses.get)
    assert 0 < best < 36 and losses[36] > 1.05 * losses[best]
    metrics = record.manifest.metrics
    assert metrics["val_loss"] == pytest.approx(losses[best], abs=1e-4)
    assert metrics["val_loss_base"] == pytest.approx(losses[0], abs=1e-4) and metrics["best_epoch"] == best // 3
    stopped = Registry(tmp_path / "stopped", base.shapes, base.fingerprint)
    with pytest.raises(TrainingInterrupted):
        train(base, stopped, overfitting, SignalAt(f"step {best + 1}/36", signal.SIGINT))
    checkpoint = tmp_path / "stopped" / ".training" / "colours" / "checkpoint.pt"
    (state,) = torch.load(checkpoint, weights_only=True)
    kept = registry.load("colours").weights
    assert all(torch.equal(state["best"]["weights"][f"{target}.B"], weight.B) for target, weight in kept.items())
    assert any("by heart after epoch" in warning for warning in record.warnings)
    assert "warning: it began to learn the dialogues by heart" in log.getvalue()
    assert "by heart after epoch" in (record.path / "README.md").read_text("utf-8")


def test_patience_ends_the_run_and_publishes_what_the_whole_run_would(base, registry, overfitting, tmp_path):
    whole = train(base, registry, overfitting, io.StringIO()).record
    patient = Registry(tmp_path / "patient", base.shapes, base.fingerprint)
    record = train(base, patient, replace(overfitting, patience=2), io.StringIO()).record
    losses = val_losses(record)
    best = min((step for step in losses if step), key=losses.get)
    assert max(losses) == best + 2 * 3 < 36 and record.manifest.metrics["steps"] == best + 6
    if best == min((step for step in val_losses(whole) if step), key=val_losses(whole).get):
        assert patient.load("colours").digest == registry.load("colours").digest


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_stopped_after_its_best_epoch_resumes_to_the_same_adapter(base, registry, overfitting, tmp_path, after):
    options = replace(overfitting, patience=2)
    whole = Registry(tmp_path / "whole", base.shapes, base.fingerprint)
    best = train(base, whole, options, io.StringIO()).metrics["best_epoch"] * 3
    with pytest.raises(TrainingInterrupted):
        train(base, registry, options, SignalAt(f"step {best + after}/36", signal.SIGTERM))
    record = train(base, registry, replace(options, resume=True), io.StringIO()).record
    assert registry.load("colours").digest == whole.load("colours").digest
    assert val_losses(record) == val_losses(whole.get("colours"))


def test_an_adapter_worse_than_the_base_is_not_published_unless_asked(base, registry, overfitting):
    """At this rate the first steps throw the head far away."""
    options = replace(overfitting, learning_rate=3.0, epochs=2, targets="all")
    log = io.StringIO()
    with pytest.raises(NotBetter, match=r"was not published: .* --resume --publish always") as caught:
        train(base, registry, options, log)
    folder = registry.root / ".training" / "colours"
    assert str(folder) in str(caught.value) and registry.names() == []
    assert "the learning rate is too high" in log.getvalue()
    assert (folder / "checkpoint.pt").exists()
    log = io.StringIO()
    record = train(base, registry, replace(options, resume=True, publish="always"), log).record
    assert "step 1/" not in log.getvalue() and record.manifest.metrics["steps"] == 6
    assert not folder.exists()


def test_without_validation_an_adapter_is_published_with_a_note(base, registry, overfitting):
    log = io.StringIO()
    record = train(base, registry, replace(overfitting, val_split=0.0, epochs=1), log).record
    assert record.manifest.metrics["val_loss"] is None and "--val-split 0.1 would tell" in log.getvalue()


def test_patience_without_validation_is_refused(overfitting):
    with pytest.raises(InvalidRequest, match="patience needs validation dialogues"):
        replace(overfitting, patience=1, val_split=0.0).check()


def test_all_of_an_adapter_is_kept_and_restored(base):
    """Its magnitudes too, by the state that a resumed run takes up."""
    weights, later = with_magnitudes(base, trainable(base)), with_magnitudes(base, trainable(base, 1), 1)
    best, again = BestWeights(weights), BestWeights(later)
    best.begin(3.0, None)
    best.offer(4, 2.0)
    wanted = values(weights)
    with torch.no_grad():
        for weight in weights.values():
            for tensor in weight.tensors:
                tensor.mul_(2)
    best.offer(8, 2.5)
    again.load(best.state())
    for each, trained in ((best, weights), (again, later)):
        assert not values(trained).equal(wanted)
        each.restore()
        assert values(trained).equal(wanted)
