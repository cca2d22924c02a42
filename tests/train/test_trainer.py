import contextlib
import io
import json
import math
import os
import signal

import pytest
import torch

from loraserve.errors import (
    CheckpointError,
    Conflict,
    DataError,
    InvalidRequest,
    StorageError,
    TrainingFailed,
    TrainingInterrupted,
)
from loraserve.lora.stack import AdapterStack
from loraserve.registry import Registry
from loraserve.train.batch import pack, summed_loss
from loraserve.train.checkpoint import exclusive
from loraserve.train.data import Augmentation, Encoder
from loraserve.train.options import TrainOptions
from loraserve.train.rows import DataFile
from loraserve.train.trainer import train
from tests.train.conftest import dataset_of


class SignalAt(io.StringIO):
    """A log that sends this process a signal when a certain text is written to it."""

    def __init__(self, text, number):
        super().__init__()
        self.text, self.number, self.sent = text, number, False

    def write(self, text):
        if self.text in text and " loss " in text and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)
        return super().write(text)


@pytest.fixture
def registry(base, tmp_path):
    return Registry(tmp_path / "adapters", base.shapes, base.fingerprint)


@pytest.fixture
def options(dialogue_file):
    """14 dialogues by 4 make 4 micro-batches an epoch, in windows of 3 and 1."""
    return TrainOptions(
        data=dialogue_file,
        name="robot",
        epochs=3,
        batch_size=4,
        accumulation_steps=3,
        learning_rate=1e-2,
        log_interval=1,
        save_interval=3,
    )


def replace(options, **changes):
    return type(options)(**{field: getattr(options, field) for field in options.__dataclass_fields__} | changes)


def mean_loss(base, weights, data):
    dataset = dataset_of(data, Encoder(base.tokenizer, base.template, 256, None))
    batch = pack([dataset.sample(0, row) for row in range(len(dataset))])
    stack = AdapterStack([weights]) if weights else None
    return summed_loss(base.model, batch, stack).item() / batch.num_supervised


def test_a_published_adapter_is_the_trained_one_with_card_curve_and_manifest(base, registry, options):
    log = io.StringIO()
    result = train(base, registry, replace(options, val_split=0.15), log)
    adapter = registry.load("robot")
    before, after = mean_loss(base, None, options.data), mean_loss(base, adapter.weights, options.data)
    assert after < before - 0.3
    assert set(adapter.weights) == {target for target in base.shapes if target != "lm_head"}
    record = registry.get("robot")
    assert record.version == result.record.version == 1
    manifest = record.manifest
    assert manifest.base_fingerprint == base.fingerprint and manifest.base_name == base.name
    assert manifest.recipe["learning_rate"] == 1e-2 and manifest.recipe["data"] == "robot.jsonl"
    assert manifest.metrics["steps"] == 9 and manifest.metrics["dialogues"] == 12
    assert manifest.data_sha256 == DataFile(options.data).sha256
    assert (record.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (record.path / "README.md").read_text("utf-8")
    assert "![Training loss over 9 micro-batches](loss.png)" in card and "| learning_rate | 0.01 |" in card
    assert "## Before and after" in card and str(options.data.parent) not in card
    rows = [json.loads(line) for line in (record.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 3, 6, 9]
    assert [row["val_loss"] for row in rows if "val_loss" in row][-1] == pytest.approx(
        manifest.metrics["val_loss"], abs=1e-4
    )
    assert not (registry.root / ".training" / "robot").exists()
    assert registry.names() == ["robot"]


def test_log_lines_show_loss_rate_speed_and_time_left(base, registry, options):
    """A line comes after the optimizer step in which it falls due, so that its speed is that of whole steps."""
    log = io.StringIO()
    train(base, registry, replace(options, log_interval=5), log)
    lines = [line for line in log.getvalue().splitlines() if " loss " in line]
    assert [line.split("  ")[1] for line in lines] == ["step 7/12", "step 11/12", "step 12/12"]
    for line in lines:
        assert line.startswith("epoch ") and "tokens/s" in line and "  lr " in line and "ETA 0:" in line


def test_a_terminal_gets_a_progress_bar(base, registry, options):
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        train(base, registry, options, terminal)
    shown = b""
    with os.fdopen(leader, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # EIO: all is read
        while chunk := screen.read(65536):
            shown += chunk
    shown = shown.decode()
    assert "12/12" in shown and "tokens/s" in shown and "loss " in shown and "100%" in shown
    assert "ETA" not in shown


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(base, registry, options):
    digests = []
    for seed in (1, 1, 2):
        train(base, registry, replace(options, seed=seed), io.StringIO())
        digests.append(registry.load("robot").digest)
    assert digests[0] == digests[1] != digests[2]
    assert [record.version for record in registry.history("robot")][-1] in (1, 3)


@pytest.mark.parametrize("step", [3, 4, 7, 11])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_resumes_to_the_same_bits(base, registry, options, tmp_path, step, number):
    """An epoch is two windows of 3 and 1 micro-batches, so these stop inside an epoch and at its end."""
    options = replace(options, val_split=0.15, batch_size=3, augmentation=Augmentation(system_prompt=0.5))
    whole = Registry(tmp_path / "whole", base.shapes, base.fingerprint)
    train(base, whole, options, io.StringIO())
    with pytest.raises(TrainingInterrupted, match=f"stopped by {number.name} after step .* --resume to go on"):
        train(base, registry, options, SignalAt(f"step {step}/12", number))
    assert registry.names() == [] and (registry.root / ".training" / "robot" / "checkpoint.pt").exists()
    log = io.StringIO()
    train(base, registry, replace(options, resume=True), log)
    assert "resuming after step" in log.getvalue()
    assert registry.load("robot").digest == whole.load("robot").digest
    losses = []
    for each in (registry, whole):
        rows = [json.loads(line) for line in (each.get("robot").path / "metrics.jsonl").read_text().splitlines()]
        losses.append([(row["step"], row.get("loss"), row.get("val_loss")) for row in rows])
    assert losses[0] == losses[1] and len(losses[0]) == 12 + 4


def test_a_second_signal_is_not_held_back(base, registry, options):
    class Twice(SignalAt):
        def write(self, text):
            super().write(text)
            self.sent = False
            return super().write(text)

    with pytest.raises(KeyboardInterrupt):
        train(base, registry, options, Twice("step 4/12", signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resuming_with_another_recipe_is_refused_and_names_each_difference(base, registry, options, dialogue_file):
    with pytest.raises(TrainingInterrupted):
        train(base, registry, options, SignalAt("step 7/12", signal.SIGINT))
    changed = replace(options, resume=True, learning_rate=5e-3, r=4)
    with pytest.raises(InvalidRequest, match=r"r was 8 and is 4; .*learning_rate was 0\.01 and is 0\.005"):
        train(base, registry, changed, io.StringIO())
    with dialogue_file.open("a") as file:
        file.write(json.dumps({"instruction": "hm", "output": "yes"}) + "\n")
    with pytest.raises(InvalidRequest, match="data_sha256 was"):
        train(base, registry, replace(options, resume=True), io.StringIO())
    log = io.StringIO()
    train(base, registry, options, log)
    assert "resuming" not in log.getvalue() and registry.names() == ["robot"]


def test_resume_without_a_checkpoint_starts_from_the_beginning(base, registry, options):
    log = io.StringIO()
    train(base, registry, replace(options, resume=True), log)
    assert "no checkpoint in" in log.getvalue() and "step 3/12" in log.getvalue()


def test_a_damaged_checkpoint_is_named_and_not_overwritten_by_resume(base, registry, options):
    with pytest.raises(TrainingInterrupted):
        train(base, registry, options, SignalAt("step 7/12", signal.SIGINT))
    path = registry.root / ".training" / "robot" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read .*; delete it or train without --resume"):
        train(base, registry, replace(options, resume=True), io.StringIO())
    assert path.stat().st_size == 1000


def test_save_dir_keeps_the_state_of_the_unfinished_run(base, registry, options, tmp_path):
    options = replace(options, save_dir=tmp_path / "out")
    with pytest.raises(TrainingInterrupted, match=str(tmp_path / "out" / "robot")):
        train(base, registry, options, SignalAt("step 7/12", signal.SIGINT))
    assert (tmp_path / "out" / "robot" / "checkpoint.pt").exists()
    train(base, registry, replace(options, resume=True), io.StringIO())
    assert not (tmp_path / "out" / "robot").exists()


def test_a_run_that_diverges_publishes_nothing_and_keeps_what_was_there(base, registry, options):
    train(base, registry, options, io.StringIO())
    digest = registry.load("robot").digest
    with pytest.raises(TrainingFailed, match="nothing was published"):
        train(base, registry, replace(options, learning_rate=1e30), io.StringIO())
    assert registry.load("robot").digest == digest and registry.get("robot").version == 1


def test_bad_data_leaves_no_trace_in_the_registry(base, registry, options, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"conversations": [{"role": "wizard", "content": "hm"}]}\n')
    with pytest.raises(DataError, match="line 1: unknown role 'wizard'"):
        train(base, registry, replace(options, data=bad), io.StringIO())
    assert registry.names() == [] and registry.verify() == []


def test_a_place_that_cannot_be_written_is_a_storage_error_before_any_training(base, registry, options, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageError, match=f"{tmp_path / 'taken'}"):
        train(base, registry, replace(options, save_dir=tmp_path / "taken"), io.StringIO())
    (registry.root / ".training").mkdir(parents=True, exist_ok=True)
    (registry.root / ".training" / "robot").write_text("a file")
    with pytest.raises(StorageError):
        train(base, registry, options, io.StringIO())


def test_dialogues_that_are_cut_are_counted_in_the_log(base, registry, options):
    log = io.StringIO()
    train(base, registry, replace(options, max_seq_len=45), log)
    assert " dialogues were cut at 45 tokens" in log.getvalue()


def test_a_name_in_training_is_refused_to_a_second_run(base, registry, options):
    with (
        exclusive("robot", [registry.root / ".training"]),
        pytest.raises(Conflict, match="another run is training 'robot'"),
    ):
        train(base, registry, options, io.StringIO())
    train(base, registry, options, io.StringIO())
    assert registry.names() == ["robot"]


def test_the_minimind_preset_starts_as_upstream_does(base, registry, options):
    train(base, registry, replace(options, targets="minimind", learning_rate=1e-8), io.StringIO())
    adapter = registry.load("robot")
    assert set(adapter.weights) == {t for t, (out, inp) in base.shapes.items() if out == inp}
    assert {(w.r, w.scaling) for w in adapter.weights.values()} == {(16, 1.0)}
    values = torch.cat([w.A.flatten() for w in adapter.weights.values()])
    assert values.std().item() == pytest.approx(0.02, rel=0.1)


def test_the_default_adapter_starts_as_peft_starts_it(base, registry, options):
    train(base, registry, replace(options, targets="all", learning_rate=1e-8), io.StringIO())
    adapter = registry.load("robot")
    assert set(adapter.weights) == set(base.shapes)
    assert {(w.r, w.scaling) for w in adapter.weights.values()} == {(8, 2.0)}
    for target, weight in adapter.weights.items():
        bound = 1 / math.sqrt(base.shapes[target][1])
        assert 0.9 * bound < weight.A.abs().max().item() <= bound * 1.001


def test_a_mixture_of_experts_trains_on_its_experts(moe_base, options, tmp_path):
    registry = Registry(tmp_path / "moe", moe_base.shapes, moe_base.fingerprint)
    for reduction in ("tokens", "mean"):
        train(moe_base, registry, replace(options, loss_reduction=reduction), io.StringIO())
        weights = registry.load("robot").weights
        assert any(".experts." in target and weight.B.any() for target, weight in weights.items())
        assert mean_loss(moe_base, weights, options.data) < mean_loss(moe_base, None, options.data) - 0.1


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("learning_rate", math.nan), ("val_split", 1.0), ("r", 0), ("name", "../up"), ("name", "base")],
)
def test_impossible_options_are_refused_before_anything_is_read(base, registry, options, field, value):
    with pytest.raises(InvalidRequest) as caught:
        train(base, registry, replace(options, **{field: value}), io.StringIO())
    assert caught.value.param == field
    assert not registry.root.joinpath(".training").exists()
