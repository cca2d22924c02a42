import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from loraserve.base.attention import PackedAttention
from loraserve.base.chat import ChatTemplate
from loraserve.base.load import load_base
from loraserve.errors import TrainingFailed
from loraserve.lora.adapter import LoraWeight
from loraserve.lora.batch import LoraBatch
from loraserve.lora.stack import AdapterStack
from loraserve.train.batch import RouterLoss, pack, summed_loss
from loraserve.train.checkpoint import RunState, load_states, save_states
from loraserve.train.data import Encoder, Sample
from loraserve.train.step import AdapterOptimizer, advance_together
from tests.train.conftest import dataset_of


def trainable(base, seed=0, zero=False):
    """An adapter of mixed rank on every layer but one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for i, (target, (out, inp)) in enumerate(base.shapes.items()):
        if target != "model.layers.1.self_attn.k_proj":
            r = 2 + i % 3
            A = torch.randn(r, inp, generator=generator) * 0.1
            B = torch.randn(out, r, generator=generator) * (0.0 if zero else 0.1)
            weights[target] = LoraWeight(nn.Parameter(A), nn.Parameter(B), scaling=1.5)
    return weights


def random_samples(count, seed=0):
    """Dialogues of different lengths, each with unsupervised rows before, between and after the supervised ones."""
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        length = rng.randint(6, 40)
        mask = [False, False, True] + [rng.random() < 0.5 for _ in range(length - 5)] + [False, False]
        ids = [rng.randrange(3, 250) for _ in range(length)]
        samples.append(Sample(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask)))
    return samples


def gradients(weights):
    return torch.cat([t.grad.flatten() for w in weights.values() for t in (w.A, w.B)])


def values(weights):
    return torch.cat([t.detach().flatten() for w in weights.values() for t in (w.A, w.B)])


def logits_of(model, batch, stack):
    """The plain form: every logit of the rows that predict, in one piece."""
    attention = PackedAttention(batch.lengths)
    lora = LoraBatch(stack, torch.ones(batch.num_rows, 1))
    return model(batch.input_ids, attention.positions, attention, lora, rows=batch.rows).float()


def optimizer(base, weights, **options):
    return AdapterOptimizer(base.model, weights, **{"total_steps": 12, "peak_learning_rate": 1e-2} | options)


def test_miniminds_own_training_run_is_reproduced(conformance, tmp_path):
    """From its data file to its final adapter: 24 micro-steps of upstream's recipe, within 1e-4 all along."""
    folder = conformance / "minimind-3-train"
    base = load_base(
        str(conformance / "minimind-3-dense" / "full_sft_64.pth"),
        tokenizer=str(conformance / "minimind-3-tokenizer"),
        device="cpu",
        dtype="float32",
    )

    def adapter(file):
        tensors = load_file(folder / file)
        targets = sorted({name.partition(".lora.")[0] for name in tensors})
        pairs = {t: [nn.Parameter(tensors[f"{t}.lora.{label}.weight"]) for label in "AB"] for t in targets}
        return {target: LoraWeight(A, B, scaling=1.0) for target, (A, B) in pairs.items()}

    weights, final = adapter("adapter_init.safetensors"), adapter("adapter_final.safetensors")
    assert (values(weights) - values(final)).abs().max() > 1e-3
    encoder = Encoder(base.tokenizer, ChatTemplate(base.tokenizer), 32768, 128)
    dataset = dataset_of(Path(shutil.copy(folder / "train.jsonl", tmp_path)), encoder, seed=42)
    trainer = optimizer(
        base, weights, total_steps=24, peak_learning_rate=1e-3, accumulation_steps=2, loss_reduction="mean"
    )
    records = []
    for epoch in range(2):
        order = dataset.order(epoch).tolist()
        batches = [pack([dataset.sample(epoch, row) for row in order[i : i + 8]]) for i in range(0, 96, 8)]
        for i in range(0, 12, 2):
            records += trainer.advance(batches[i : i + 2])
    log = json.loads((folder / "log.json").read_text())["log"]
    assert len(records) == len(log) == 24
    for record, reference in zip(records, log, strict=True):
        assert record.supervised_tokens == reference["supervised_tokens"]
        assert record.lr == pytest.approx(reference["lr"], rel=1e-9)
        assert record.loss == pytest.approx(reference["loss"], abs=1e-4)
        assert (record.grad_norm is None) == (reference["grad_norm"] is None)
        assert record.grad_norm is None or record.grad_norm == pytest.approx(reference["grad_norm"], abs=1e-4)
    torch.testing.assert_close(values(weights), values(final), atol=1e-4, rtol=0)


@pytest.mark.parametrize("which", ["base", "moe_base"])
def test_a_packed_batch_equals_its_dialogues_one_by_one(which, request):
    """Catches dialogues that see each other, positions that run on, rows of the wrong dialogue."""
    base = request.getfixturevalue(which)
    samples, weights = random_samples(5), trainable(base)
    assert len({len(sample.input_ids) for sample in samples}) > 1
    packed = pack(samples)
    together = logits_of(base.model, packed, AdapterStack([weights]))
    total = F.cross_entropy(together, packed.targets, reduction="sum")
    total.backward()
    gradient = gradients(weights)
    alone, expected, num_targets = trainable(base), 0.0, 0
    for sample in samples:  # the naive form: every row of the whole dialogue, every logit, then the mask
        length = len(sample.input_ids)
        attention = PackedAttention([length])
        lora = LoraBatch.uniform(alone, length)
        logits = base.model(sample.input_ids.long(), attention.positions, attention, lora)
        labels = torch.where(sample.supervised, sample.input_ids.long(), -100)
        loss = F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
        loss.backward()
        count = int(sample.supervised[1:].sum())
        rows = together[num_targets : num_targets + count]
        torch.testing.assert_close(rows, logits[:-1][sample.supervised[1:]], atol=1e-4, rtol=1e-4)
        num_targets += count
        expected += loss.item()
    assert num_targets == packed.num_supervised
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert gradient.abs().max() > 0.1
    torch.testing.assert_close(gradient, gradients(alone), atol=1e-3, rtol=1e-4)
    without = summed_loss(base.model, packed, None).item()
    assert abs(without - expected) > 0.1  # the adapter matters


def test_rows_after_the_last_supervised_token_are_not_run():
    sample = Sample(torch.tensor([3, 4, 5, 6, 7], dtype=torch.int32), torch.tensor([False, False, True, False, False]))
    batch = pack([sample, sample])
    assert batch.input_ids.tolist() == [3, 4, 3, 4]
    assert batch.rows.tolist() == [1, 3] and batch.targets.tolist() == [5, 5] and batch.lengths == [2, 2]


def test_token_weighted_accumulation_equals_one_big_batch(base):
    """Catches dividing by the number of micro-batches, which weighs a token of a short batch more than one of a long."""
    samples = random_samples(9)
    parts = [samples[:1], samples[1:7], samples[7:]]
    assert len({pack(part).num_supervised for part in parts}) == 3
    trained, losses = {}, {}
    for windows in ([samples], parts):
        count, weights = len(windows), trainable(base)
        trainer = optimizer(base, weights, total_steps=4 * count, accumulation_steps=count)
        records = [trainer.advance([pack(part) for part in windows]) for _ in range(3)]
        trained[count] = values(weights)
        losses[count] = [sum(r.loss * r.supervised_tokens for r in step) for step in records]
    assert (trained[1] - values(trainable(base))).abs().max() > 1e-2
    assert losses[1] == pytest.approx(losses[3], rel=1e-5)
    torch.testing.assert_close(trained[1], trained[3], atol=1e-4, rtol=0)


def test_accumulated_gradient_before_the_optimizer_equals_the_big_batch(base):
    samples = random_samples(9)
    norms = {}
    for name, windows in {"big": [samples], "small": [samples[:1], samples[1:7], samples[7:]]}.items():
        for reduction in ("tokens", "mean"):
            trainer = optimizer(base, trainable(base), accumulation_steps=len(windows), loss_reduction=reduction)
            norms[name, reduction] = trainer.advance([pack(part) for part in windows])[-1].grad_norm
    assert norms["small", "tokens"] == pytest.approx(norms["big", "tokens"], rel=1e-5)
    assert norms["big", "tokens"] == pytest.approx(norms["big", "mean"], rel=1e-5)
    assert norms["small", "mean"] != pytest.approx(norms["big", "mean"], rel=1e-2)


def test_an_abandoned_window_changes_nothing(base, tmp_path):
    weights = trainable(base)
    trainer = optimizer(base, weights)
    batches = [pack(random_samples(2, seed)) for seed in range(3)]
    trainer.advance(batches)
    before = values(weights)
    state = RunState(name="", ended="", recipe={}, seconds=0.0, best={}, run_ids={}, **trainer.state())
    save_states(tmp_path, [state])
    asked = iter([False, True])
    assert trainer.advance(batches, stop=lambda: next(asked)) == []
    assert trainer.step == 3 and values(weights).equal(before)
    again = trainable(base)
    other = optimizer(base, again)
    (state,) = load_states(tmp_path, {"": {}})
    other.load(state.step, state.weights, state.optimizer, state.scaler)
    assert trainer.advance(batches) == other.advance(batches)
    assert values(weights).equal(values(again)) and not values(weights).equal(before)


def test_the_base_is_never_touched_and_only_the_adapter_learns(base):
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    weights = trainable(base, zero=True)
    trainer = optimizer(base, weights)
    batch = pack(random_samples(4))
    first = trainer.advance([batch])[0].loss
    assert first == pytest.approx(summed_loss(base.model, batch, None).item() / batch.num_supervised, rel=1e-5)
    for _ in range(20):
        last = trainer.advance([batch])[0].loss
    assert last < first - 0.5
    assert all(tensor.equal(before[name]) for name, tensor in base.model.state_dict().items())
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_a_loss_that_is_not_a_number_stops_with_step_rate_and_advice(base):
    weights = trainable(base)
    trainer = optimizer(base, weights, peak_learning_rate=1e30)
    batch = pack(random_samples(2))
    trainer.advance([batch, batch])
    before = values(weights)
    with pytest.raises(TrainingFailed) as caught:
        trainer.advance([batch])
    message = str(caught.value)
    assert "became nan at step 3 of 12" in message or "became inf at step 3 of 12" in message
    assert "nothing was published; try --learning-rate 1e+29" in message and "learning rate " in message
    assert values(weights).equal(before) and trainer.step == 2


def test_float16_trains_with_a_scaled_loss(base_dir):
    half = load_base(str(base_dir), device="cpu", dtype="float16")
    weights = trainable(half, zero=True)
    trainer = optimizer(half, weights)
    batch = pack(random_samples(4))
    losses = [trainer.advance([batch])[0].loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.2
    assert trainer.state()["scaler"]["scale"] > 1
    assert all(w.A.dtype == torch.float32 for w in weights.values())


def test_bfloat16_base_trains_a_float32_adapter(base_dir, base):
    brain = load_base(str(base_dir), device="cpu", dtype="bfloat16")
    batch = pack(random_samples(4))
    losses = {}
    for each in (brain, base):
        weights = trainable(each, zero=True)
        trainer = optimizer(each, weights)
        losses[each.dtype] = [trainer.advance([batch])[0].loss for _ in range(12)]
        assert all(w.B.dtype == torch.float32 for w in weights.values())
    assert losses[torch.bfloat16][-1] < losses[torch.bfloat16][0] - 0.2
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.02)


def test_mean_reduction_adds_the_router_loss_of_experts(moe_base, base):
    """Against the formula written out over the gates' inputs, which the hooks see."""
    batch, weights = pack(random_samples(4)), trainable(moe_base)
    inputs = {}
    gates = [layer.mlp.gate for layer in moe_base.model.model.layers]
    hooks = [g.register_forward_hook(lambda module, args, _out: inputs.update({module: args[0]})) for g in gates]
    with RouterLoss(moe_base.model) as router:
        summed_loss(moe_base.model, batch, AdapterStack([weights]))
        (found,) = router.take([batch.num_rows])
    for hook in hooks:
        hook.remove()
    expected = 0.0
    for gate, x in inputs.items():
        weight = weights[gate.target]
        scores = (x @ (gate.weight + weight.delta()).T).softmax(-1)
        chosen = scores.topk(2, dim=-1).indices
        for expert in range(4):
            load = (chosen == expert).float().sum(1).mean()
            expected = expected + 5e-4 * 4 * load * scores[:, expert].mean()
    assert len(inputs) == 3
    torch.testing.assert_close(found, expected)
    assert found.item() > 1e-3
    with RouterLoss(base.model) as router:
        summed_loss(base.model, batch, None)
        assert router.take([batch.num_rows]) == [0.0]
    norms = [
        optimizer(moe_base, trainable(moe_base), loss_reduction=reduction).advance([batch])[0].grad_norm
        for reduction in ("tokens", "mean")
    ]
    assert norms[0] != norms[1]


def different(base):
    """Three adapters that differ in targets, ranks, rates, reductions and how many micro-batches a step takes."""
    attention = {t: w for t, w in trainable(base, 1).items() if ".self_attn." in t}
    no_head = {t: w for t, w in trainable(base, 2).items() if t != "lm_head"}
    options = [
        {"accumulation_steps": 2},
        {"peak_learning_rate": 3e-3, "loss_reduction": "mean"},
        {"total_steps": 40, "grad_clip": 0.1, "accumulation_steps": 3},
    ]
    optimizers = [optimizer(base, w, **o) for w, o in zip((trainable(base), attention, no_head), options, strict=True)]
    windows = [[pack(random_samples(2 + i, seed=10 * slot + i)) for i in range(n)] for slot, n in enumerate((2, 1, 3))]
    return optimizers, windows


@pytest.mark.parametrize(("which", "max_rows"), [("base", None), ("base", 50), ("moe_base", None)])
def test_adapters_that_step_together_step_as_each_does_alone(which, max_rows, request):
    """Catches rows that meet a neighbour's adapter, a loss divided by all tokens, one clipping or rate for all.

    With `mean` experts are balanced within a pass, so only whole batches can agree there.
    """
    base = request.getfixturevalue(which)
    together, windows = different(base)
    alone, _ = different(base)
    start = [values(o.weights) for o in together]
    for o in together:
        o.max_rows = max_rows
    for _ in range(3):
        results = advance_together(together, windows)
        for got, o, window in zip(results, alone, windows, strict=True):
            for record, expected in zip(got, o.advance(window), strict=True):
                assert record.loss == pytest.approx(expected.loss, rel=1e-5)
                assert (record.grad_norm or 0) == pytest.approx(expected.grad_norm or 0, rel=1e-3)
                assert (record.step, record.lr, record.tokens) == (expected.step, expected.lr, expected.tokens)
    for o, expected, before in zip(together, alone, start, strict=True):
        assert (values(o.weights) - before).abs().max() > 5e-3
        torch.testing.assert_close(values(o.weights), values(expected.weights), atol=2e-4, rtol=0)


def test_an_adapter_that_is_no_number_leaves_the_others_as_they_are_alone(base):
    """Also where each has so few rows that serving would put them into one product."""
    samples = [Sample(torch.arange(5, 11, dtype=torch.int32), torch.tensor([False] * 3 + [True] * 3))]
    together, alone = ([optimizer(base, trainable(base, seed)) for seed in (0, 0, 2)] for _ in range(2))
    before = values(together[2].weights)
    together[1].weights["model.layers.0.mlp.down_proj"].B.data.fill_(float("nan"))
    first, failed, third = advance_together(together, [[pack(samples)]] * 3)
    assert isinstance(failed, TrainingFailed) and "the loss became nan at step 1 of 12" in str(failed)
    for i, records in ((0, first), (2, third)):
        (expected,) = alone[i].advance([pack(samples)])
        assert records[0].loss == pytest.approx(expected.loss, rel=1e-5)
        torch.testing.assert_close(values(together[i].weights), values(alone[i].weights), atol=1e-4, rtol=0)
    assert (values(together[2].weights) - before).abs().max() > 1e-3 and together[1].step == 0


def test_a_stop_abandons_the_step_of_all(base):
    optimizers, windows = different(base)
    before = [values(o.weights) for o in optimizers]
    assert advance_together(optimizers, windows, stop=lambda: True) is None
    for o, was in zip(optimizers, before, strict=True):
        assert torch.equal(values(o.weights), was) and o.step == 0
        assert all(w.A.grad is None and w.B.grad is None for w in o.weights.values())
