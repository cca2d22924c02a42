"""Training on a base in fewer bits: it learns what the base as it is would, and what is published is the base's."""

import functools
import io
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from loraserve.base import quantize
from loraserve.base.load import load_base
from loraserve.cli.main import main
from loraserve.errors import InvalidRequest, TrainingInterrupted
from loraserve.lora.stack import AdapterStack
from loraserve.registry import Registry
from loraserve.train.batch import pack, summed_loss
from loraserve.train.data import Encoder
from loraserve.train.memory import Keeping, keepings, plan, plan_for, weight_bytes
from loraserve.train.options import TrainOptions
from loraserve.train.trainer import train
from tests.train.conftest import dataset_of, write_base
from tests.train.test_memory import NEEDS
from tests.train.test_step import gradients, optimizer, random_samples, trainable
from tests.train.test_trainer import SignalAt, mean_loss, replace

HOWS = pytest.mark.parametrize("how", quantize.QUANTIZATIONS)
LOSS = {"int8": 0.005, "nf4": 0.05}
"""How far a mean loss may be from that on the base as it is, for the bundled base, which is a trained one."""
COSINE = {"int8": 0.999, "nf4": 0.85}
"""Of the first gradient with that on the base as it is, likewise: 0.9997 and 0.89 as measured."""
LUMI = Path(__file__).parents[2] / "examples" / "data" / "lumi.jsonl"


def quantised(folder, how, dtype="float32"):
    base = load_base(str(folder), device="cpu", dtype=dtype, weights=False)
    base.load_weights(how)
    return base


def loss_and_gradient(base, **options):
    batch, weights = pack(random_samples(9)), trainable(base)
    loss = summed_loss(base.model, batch, AdapterStack([weights]), **options) / batch.num_supervised
    loss.backward()
    return loss.detach(), gradients(weights)


@HOWS
@pytest.mark.parametrize("which", ["base", "moe_base"])
def test_losses_and_gradients_are_those_of_the_dequantised_weights(how, which, request):
    """Catches a gradient that goes past a layer, or through a weight that the forward pass did not use."""
    base = request.getfixturevalue(which)
    folder = base.path
    rounded, dequantised = quantised(folder, how), load_base(str(folder), device="cpu", dtype="float32")
    with torch.no_grad():
        for target in quantize.quantized_shapes(base.config):
            dequantised.model.get_submodule(target).weight.copy_(rounded.weight_of(target))
    loss, _ = loss_and_gradient(base)
    want, want_gradient = loss_and_gradient(dequantised)
    found, found_gradient = loss_and_gradient(rounded)
    assert found != loss and found == want and found_gradient.equal(want_gradient)
    again, again_gradient = loss_and_gradient(rounded, checkpointing=True)
    assert again == found and again_gradient.equal(found_gradient)


@pytest.fixture(scope="module")
def on_the_bundled_base(tmp_path_factory):
    """Losses of ten steps on eight dialogues, and the first gradient of an adapter that does something already."""
    data = Path(shutil.copy(LUMI, tmp_path_factory.mktemp("lumi")))

    @functools.cache
    def measure(how):
        base = quantised("bundled", how)
        dataset = dataset_of(data, Encoder(base.tokenizer, base.template, 2048, None))
        batch = pack([dataset.sample(0, row) for row in range(8)])
        weights = trainable(base)
        (summed_loss(base.model, batch, AdapterStack([weights])) / batch.num_supervised).backward()
        new = trainable(base, zero=True)
        trainer = optimizer(base, new, peak_learning_rate=5e-3, max_rows=200, checkpointing=True)
        return [trainer.advance([batch])[0].loss for _ in range(10)], gradients(weights)

    return measure


@HOWS
def test_losses_and_gradients_are_near_those_on_the_base_as_it_is(how, on_the_bundled_base):
    losses, gradient = on_the_bundled_base(None)
    found, found_gradient = on_the_bundled_base(how)
    assert losses[0] - losses[-1] > 1 and found != losses
    assert found == pytest.approx(losses, abs=LOSS[how])
    assert COSINE[how] < F.cosine_similarity(found_gradient, gradient, dim=0) < 0.99999


@HOWS
def test_nothing_of_a_layers_weight_is_kept_for_the_backward_pass(how, base_dir):
    """Catches a dequantised copy in the graph, which would cost more than the base as it is."""
    base, saved = quantised(base_dir, how), []
    stored = sum(shape[0] * shape[1] for shape in quantize.quantized_shapes(base.config).values())
    shapes = {tuple(shape) for shape in base.shapes.values()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        summed_loss(base.model, pack(random_samples(3)), AdapterStack([trainable(base)]))
    assert len(saved) > 20 and stored > 20_000
    assert not [x for x in saved if tuple(x.shape) in shapes or tuple(x.shape)[::-1] in shapes]


@pytest.fixture
def options(dialogue_file):
    return TrainOptions(
        data=dialogue_file, name="robot", epochs=3, batch_size=4, learning_rate=1e-2, log_interval=1, save_interval=3
    )


@HOWS
def test_what_is_published_is_an_ordinary_adapter_of_the_base(how, base, base_dir, options, tmp_path):
    registry = Registry(tmp_path / "adapters", base.shapes, base.fingerprint)
    waiting, log = load_base(str(base_dir), device="cpu", dtype="float32", weights=False), io.StringIO()
    train(waiting, registry, replace(options, quantize=how, val_split=0.15), log)
    assert waiting.model.quantized == how
    assert f"in float32, the base in {how}" in log.getvalue() and f"the base's layers in {how}\n" in log.getvalue()
    record = registry.get("robot")
    assert record.manifest.base_fingerprint == base.fingerprint and record.manifest.recipe["quantize"] == how
    assert f"| quantize | {how} |" in (record.path / "README.md").read_text("utf-8")
    weights = registry.load("robot").weights
    assert mean_loss(base, weights, options.data) < mean_loss(base, None, options.data) - 0.3
    rows = [json.loads(line) for line in (record.path / "metrics.jsonl").read_text().splitlines()]
    before = next(row["val_loss"] for row in rows if "val_loss" in row)
    assert before == pytest.approx(record.manifest.metrics["val_loss_base"], abs=1e-4)


@HOWS
def test_a_stopped_run_resumes_to_the_same_bits_and_in_the_same_bits_alone(how, base, base_dir, options, tmp_path):
    registry, whole = (Registry(tmp_path / name, base.shapes, base.fingerprint) for name in ("adapters", "whole"))
    options = replace(options, quantize=how)
    train(quantised(base_dir, how), whole, options, io.StringIO())
    with pytest.raises(TrainingInterrupted):
        train(quantised(base_dir, how), registry, options, SignalAt("step 7/12", signal.SIGINT))
    for other in ("none", *quantize.QUANTIZATIONS):
        if other != how:
            waiting = load_base(str(base_dir), device="cpu", dtype="float32", weights=False)
            different = None if other == "none" else other
            with pytest.raises(InvalidRequest, match=f"quantize was '{how}' and is {different!r}; use the same"):
                train(waiting, registry, replace(options, quantize=other, resume=True), io.StringIO())
    train(quantised(base_dir, how), registry, replace(options, resume=True), io.StringIO())
    assert registry.load("robot").digest == whole.load("robot").digest


def test_a_run_goes_on_in_the_bits_it_was_begun_in(base, base_dir, options, large_base, tmp_path):
    """Whatever a larger or a smaller budget, or none, would choose when it is resumed."""

    def run(megabytes, stream=None, **changed):
        budget = megabytes and megabytes << 20
        waiting = load_base(str(base_dir), device="cpu", dtype="float32", weights=False)
        train(waiting, registry, replace(options, memory_budget=budget, **changed), stream or io.StringIO())
        return registry.load("robot").digest, waiting.model.quantized

    registry = Registry(tmp_path / "whole", base.shapes, base.fingerprint)
    whole = run(29)
    assert whole[1] == "int8"
    for megabytes in (64, None, 29):
        registry = Registry(tmp_path / f"adapters-{megabytes}", base.shapes, base.fingerprint)
        with pytest.raises(TrainingInterrupted):
            run(29, SignalAt("step 7/12", signal.SIGINT))
        with pytest.raises(InvalidRequest, match="quantize was 'int8' and is None"):
            run(64, quantize="none", resume=True)
        assert run(megabytes, resume=True) == whole
    registry = Registry(tmp_path / "adapters", base.shapes, base.fingerprint)
    assert run(29, resume=True) == whole  # there is nothing yet
    with pytest.raises(TrainingInterrupted):
        run(34, SignalAt("step 7/12", signal.SIGINT))
    with pytest.raises(InvalidRequest, match="a memory budget of 29 MB is too small"):
        run(29, resume=True)
    assert run(34, resume=True)[1] is None


def test_a_base_in_memory_stays_as_it_is(base, options, tmp_path):
    registry = Registry(tmp_path / "adapters", base.shapes, base.fingerprint)
    with pytest.raises(InvalidRequest, match="quantize is int8, but the base is in memory"):
        train(base, registry, replace(options, quantize="int8"), io.StringIO())
    assert base.model.quantized is None
    with pytest.raises(InvalidRequest, match="quantize is one of auto, none, int8, nf4"):
        replace(options, quantize="int3").check()


KEEPINGS = [
    [Keeping(50_000, None, True), Keeping(20_000)],
    [Keeping(10_000, "int8")],
    [Keeping(6_000, "nf4")],
]


def test_a_plan_gives_up_speed_before_bits_and_few_bits_before_many():
    """A step needs 1,000 bytes and 220 a row, or 110 with checkpointing; the longest dialogue has 100 rows."""
    least, chosen = 1000 + 100 * 110, []
    for budget in (
        1 << 20,
        50_000 + 1000 + 100 * 220,
        73_000 - 1,
        20_000 + least,
        20_000 + least - 1,
        10_000 + least - 1,
    ):
        found = plan(NEEDS, KEEPINGS, [50, 100], budget)
        chosen.append((found.quantize, found.packed, found.checkpointing, found.max_rows))
        assert found.peak <= budget and bool(found.reason) == bool(found.quantize)
    assert chosen == [
        (None, True, False, None),
        (None, True, False, 100),
        (None, False, False, None),
        (None, False, True, 100),
        ("int8", False, True, None),
        ("nf4", False, True, 136),
    ]
    assert "the base's layers in int8 (otherwise the least is 31.2 kB)" in str(plan(NEEDS, KEEPINGS, [100], 31_999))
    with pytest.raises(InvalidRequest, match=r"the least is 17.6 kB with the base's layers in nf4, of which 5.86 kB"):
        plan(NEEDS, KEEPINGS, [50, 100], 6_000 + least - 1)


def test_ways_to_keep_the_base_are_not_measured_before_they_are_needed():
    def ways():
        yield KEEPINGS[0]
        raise AssertionError("measured for nothing")

    assert plan(NEEDS, ways(), [100], 1 << 20).quantize is None


def test_a_refusal_names_the_bits_that_would_fit(monkeypatch):
    for there, hint in ((True, ""), (False, r" \(pip install 'loraserve\[bitsandbytes\]'\)")):
        monkeypatch.setattr(quantize, "installed", lambda there=there: there)
        with pytest.raises(InvalidRequest, match=f"give --memory-budget 1MB, --quantize nf4{hint}, --max-seq-len"):
            plan(NEEDS, KEEPINGS[:1], [100], 6_000 + 13_000, others=KEEPINGS[1:])


@pytest.mark.parametrize("how", [None, *quantize.QUANTIZATIONS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_base_will_take_is_what_it_takes(how, dtype, base_dir, monkeypatch):
    """Catches weights counted twice or not at all, and copies for the kernels."""
    monkeypatch.setattr("loraserve.train.memory.bytes_in_use", lambda base: 0)
    base = load_base(str(base_dir), device="cpu", dtype=dtype, weights=False)
    (ways,) = keepings(base, [how])
    base.load_weights(how)
    layers = [base.model.get_submodule(target) for target in quantize.quantized_shapes(base.config)]
    parameters = sum(p.nbytes for p in base.model.parameters() if not p.is_meta)
    kept = parameters + sum(layer._quantized.num_bytes for layer in layers if layer._quantized is not None)
    assert kept == weight_bytes(base.config, base.dtype, how)
    largest = base.dtype.itemsize * 48 * 32
    assert ways[-1] == Keeping(kept + (largest if how else 0), how)
    whole = weight_bytes(base.config, base.dtype, None)
    assert kept < whole * {None: 1.01, "int8": 0.8, "nf4": 0.7}[how]
    if how is None and len(ways) == 2:
        base.model.pack_for_training()
        linears = [base.model.get_submodule(target) for target in base.shapes]
        assert ways[0].resident - ways[1].resident == sum(2 * layer.weight.nbytes for layer in linears)
        assert all(layer._both_ways is not None for layer in linears)


@pytest.fixture
def large_base(monkeypatch):
    """As if the base were larger: 30 MB of weights, or 20, or 10, and nothing else in memory."""
    monkeypatch.setattr("loraserve.train.memory.bytes_in_use", lambda base: 0)
    sizes = {None: 30 << 20, "int8": 20 << 20, "nf4": 10 << 20}
    monkeypatch.setattr("loraserve.train.memory.weight_bytes", lambda config, dtype, how: sizes[how])


def test_a_budget_quantises_a_base_that_is_still_to_be_read_and_no_other(base, base_dir, large_base, monkeypatch):
    waiting = load_base(str(base_dir), device="cpu", dtype="float32", weights=False)

    def chosen(each, megabytes, how="auto"):
        return plan_for(each, [trainable(each)], [5], megabytes << 20, how).quantize

    assert [chosen(waiting, megabytes) for megabytes in (34, 29, 19)] == [None, "int8", "nf4"]
    assert chosen(waiting, 34, "nf4") == "nf4" and chosen(base, 34) is None
    with pytest.raises(
        InvalidRequest, match="give --memory-budget 32MB, --quantize int8, --quantize nf4, --max-seq-len"
    ):
        chosen(waiting, 29, "none")
    with pytest.raises(InvalidRequest, match=r"the least is [\d.]+ MB, of which"):
        chosen(base, 1)
    monkeypatch.setattr(quantize, "installed", lambda: False)
    with pytest.raises(InvalidRequest, match=r"with the base's layers in int8.*nf4 \(pip install"):
        chosen(waiting, 19)


def test_bits_that_a_layer_cannot_have_are_not_planned(tmp_path, large_base):
    odd = load_base(str(write_base(tmp_path / "odd", width=49)), device="cpu", dtype="float32", weights=False)
    weights = trainable(odd)
    with pytest.raises(InvalidRequest, match=r"quantize nf4 takes layers of 64·n weights, and model\.layers\.0\.mlp"):
        plan_for(odd, [weights], [5], None, "nf4")
    with pytest.raises(InvalidRequest, match=r"with the base's layers in int8.*MB, --max-seq-len"):
        plan_for(odd, [weights], [5], 19 << 20)


@pytest.fixture
def command(base_dir, dialogue_file, tmp_path):
    given = f"train --base {base_dir} --data {dialogue_file} --adapters-dir {tmp_path / 'adapters'} --device cpu"
    return lambda *more: CliRunner().invoke(main, [*given.split(), "--dtype", "float32", "--epochs", "1", *more])


def test_the_command_line_quantises_as_it_is_told_or_as_the_budget_needs(command, large_base, tmp_path):
    result = command("--quantize", "nf4", "--dry-run")
    assert result.exit_code == 0 and "in whole batches, the base in nf4" in result.stdout
    result = command("--memory-budget", "29M")
    assert result.exit_code == 0, result.stderr
    assert "the base's layers in int8 (otherwise the least is" in result.stderr
    assert Registry(tmp_path / "adapters").get("robot").manifest.recipe["quantize"] == "int8"
    result = command("--memory-budget", "29M", "--quantize", "none", "--name", "other")
    assert result.exit_code == 2 and "--quantize int8, --quantize nf4, " in result.stderr
    assert Registry(tmp_path / "adapters").names() == ["robot"]


def test_a_library_that_is_missing_is_named_with_its_extra(command, monkeypatch, tmp_path):
    monkeypatch.setattr(quantize, "installed", lambda: False)
    result = command("--quantize", "nf4")
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "pip install 'loraserve[bitsandbytes]', or use --quantize int8" in result.stderr
    assert not (tmp_path / "adapters").exists()
