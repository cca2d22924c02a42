"""The gradient and the norms of DoRA beside PEFT and dense weights, and steps of DoRA adapters, alone and with others."""

from dataclasses import replace as change

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from loraserve.base.load import load_base
from loraserve.errors import TrainingFailed
from loraserve.lora.dora import gain_of
from loraserve.lora.stack import AdapterStack
from loraserve.train import dora as dora_module
from loraserve.train.batch import pack, summed_loss, token_losses
from loraserve.train.dora import DoraNorms
from loraserve.train.initial import start
from loraserve.train.options import TrainOptions
from loraserve.train.step import advance_together
from tests.train.test_step import optimizer, random_samples, trainable

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in (
        "`is_gradient_checkpointing` is deprecated",
        "Model has `tie_word_embeddings=True`",
        "Model with `tie_word_embeddings=True`",
        "Setting `save_embedding_layers` to `True`",
        "Could not find a config file",
    )
]


def with_magnitudes(base, weights, seed=0):
    """The same adapter with magnitudes far from the norms."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for target, weight in weights.items():
        norm = base.weight_of(target).float().norm(dim=1)
        magnitude = norm * (torch.rand(len(norm), generator=generator) + 0.5)
        found[target] = change(weight, magnitude=nn.Parameter(magnitude))
    return found


def named(weights):
    return {f"{t}.{name}": tensor for t, w in weights.items() for name, tensor in w.named_tensors.items()}


def values(weights):
    return torch.cat([tensor.detach().flatten() for tensor in named(weights).values()])


def gradients(weights):
    return {name: tensor.grad.clone() for name, tensor in named(weights).items()}


def in_use(base, weights):
    norms = DoraNorms(weights, base.weight_of)
    norms.measure()
    return AdapterStack([norms.weights()])


def dora_optimizer(base, weights, **options):
    return optimizer(base, weights, weight_of=base.weight_of, **options)


def peft_gradients(base_dir, base, weights, batch):
    """Loss and gradients of PEFT's model with the same adapter, one dialogue at a time."""
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        lora_alpha=3,
        rank_pattern={target.replace(".", r"\."): w.r for target, w in weights.items()},
        alpha_pattern={target.replace(".", r"\."): w.r * w.scaling for target, w in weights.items()},
        target_modules=list(weights),
        use_dora=True,
    )
    model = peft.get_peft_model(model, config)
    pairs = {}
    for target, weight in weights.items():
        module = model.get_submodule(f"base_model.model.{target}")
        assert module.scaling["default"] == pytest.approx(weight.scaling)
        pairs[f"{target}.A"] = module.lora_A["default"].weight, weight.A
        pairs[f"{target}.B"] = module.lora_B["default"].weight, weight.B
        pairs[f"{target}.magnitude"] = module.lora_magnitude_vector["default"].weight, weight.magnitude
    with torch.no_grad():
        for theirs, ours in pairs.values():
            theirs.copy_(ours)
    total, begin = 0.0, 0
    for length in batch.lengths:
        mine = (batch.rows >= begin) & (batch.rows < begin + length)
        logits = model(input_ids=batch.input_ids[None, begin : begin + length]).logits[0]
        total = total + F.cross_entropy(logits[batch.rows[mine] - begin], batch.targets[mine], reduction="sum")
        begin += length
    total.backward()
    return total.item(), {name: theirs.grad for name, (theirs, _) in pairs.items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("head", [False, True], ids=["frozen-head", "head-with-adapter"])
def test_losses_and_gradients_are_peft_s(base, base_dir, head, checkpointing, monkeypatch):
    """With a B that is not zero: a gradient through the norm, or a norm of W alone, would show."""
    monkeypatch.setattr("loraserve.train.loss.CHUNK_ROWS", 7)
    chosen = {t: w for t, w in trainable(base).items() if head or t != "lm_head"}
    weights, batch = with_magnitudes(base, chosen), pack(random_samples(5))
    wanted, expected = peft_gradients(base_dir, base, weights, batch)
    loss = summed_loss(base.model, batch, in_use(base, weights), checkpointing=checkpointing)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert abs(wanted - summed_loss(base.model, batch, AdapterStack([chosen])).item()) > 1
    found = gradients(weights)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-4 * expected[name].abs().max().item())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_are_those_of_the_dense_weights(base_dir, monkeypatch, dtype):
    """In any number of chunks, before and after a change."""
    base = load_base(str(base_dir), device="cpu", dtype=dtype)
    monkeypatch.setattr(dora_module, "CHUNK", 150)
    weights = with_magnitudes(base, trainable(base))
    norms = DoraNorms(weights, base.weight_of)
    seen = []
    for _ in range(2):
        norms.measure()
        with torch.no_grad():
            for target, used in norms.weights().items():
                gain = gain_of(base.weight_of(target), weights[target])
                torch.testing.assert_close(used.gain + 1, gain, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(used.B, gain[:, None] * weights[target].B, rtol=1e-5, atol=1e-6)
            seen.append(torch.cat([w.gain for w in norms.weights().values()]))
            for weight in weights.values():
                weight.A.mul_(3)
    assert (seen[0] - seen[1]).abs().max() > 0.05


def test_a_new_one_is_the_base_to_the_bit(base, dialogue_file):
    options = TrainOptions(data=dialogue_file, name="robot", targets="all", use_dora=True)
    begun = start(options, base, None)
    begun.measure(base.weight_of)
    weights = begun.weights
    batch = pack(random_samples(3))
    with torch.no_grad():
        (plain,), (ours,) = (token_losses(base.model, [(0, batch)], s) for s in (None, in_use(base, weights)))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert all(not w.gain.any() for w in in_use(base, weights).adapters[0].values())


def test_passes_windows_and_checkpointing_give_the_whole_step(base):
    samples = random_samples(9)
    trained, losses = [], []
    for windows, options in (
        ([samples], {}),
        ([samples], {"max_rows": 45, "checkpointing": True}),
        ([samples[:1], samples[1:7], samples[7:]], {"accumulation_steps": 3}),
    ):
        weights = with_magnitudes(base, trainable(base))
        trainer = dora_optimizer(base, weights, **{"total_steps": 4 * len(windows)} | options)
        records = [trainer.advance([pack(part) for part in windows]) for _ in range(3)]
        losses.append([sum(r.loss * r.supervised_tokens for r in step) for step in records])
        trained.append(values(weights))
    assert (trained[0] - values(with_magnitudes(base, trainable(base)))).abs().max() > 1e-2
    for other, its_losses in zip(trained[1:], losses[1:], strict=True):
        assert its_losses == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(other, trained[0], atol=1e-4, rtol=0)


def mixed(base):
    """A DoRA adapter on everything, a LoRA adapter, and a DoRA adapter on the attention, in windows of their own."""
    attention = {t: w for t, w in trainable(base, 1).items() if ".self_attn." in t}
    each = [with_magnitudes(base, trainable(base)), trainable(base, 2), with_magnitudes(base, attention, 3)]
    options = [{"accumulation_steps": 2}, {"peak_learning_rate": 3e-3}, {"total_steps": 40, "grad_clip": 0.1}]
    optimizers = [dora_optimizer(base, w, **o) for w, o in zip(each, options, strict=True)]
    windows = [[pack(random_samples(2 + i, seed=10 * slot + i)) for i in range(n)] for slot, n in enumerate((2, 1, 1))]
    return optimizers, windows


@pytest.mark.parametrize(("which", "max_rows"), [("base", None), ("base", 50), ("moe_base", None)])
def test_next_to_lora_each_steps_as_it_does_alone(which, max_rows, request):
    """Catches gains that meet a neighbour's rows, and rows that meet none."""
    base = request.getfixturevalue(which)
    (together, windows), (alone, _) = mixed(base), mixed(base)
    before = [values(o.weights) for o in together]
    for o in together:
        o.max_rows = max_rows
    for _ in range(3):
        results = advance_together(together, windows)
        for got, o, window in zip(results, alone, windows, strict=True):
            wanted = o.advance(window)
            assert [r.loss for r in got] == pytest.approx([r.loss for r in wanted], rel=1e-4)
    for o, other, first in zip(together, alone, before, strict=True):
        assert (values(o.weights) - first).abs().max() > 5e-3
        torch.testing.assert_close(values(o.weights), values(other.weights), atol=2e-4, rtol=0)


def test_one_that_is_no_number_leaves_the_others_as_they_are_alone(base):
    (together, windows), (alone, _) = mixed(base), mixed(base)
    with torch.no_grad():
        together[0].weights["model.layers.1.mlp.up_proj"].magnitude[5] = torch.inf
    results = advance_together(together, windows)
    assert isinstance(results[0], TrainingFailed)
    for o, other, window in zip(together[1:], alone[1:], windows[1:], strict=True):
        before = values(other.weights)
        other.advance(window)
        assert (values(o.weights) - before).abs().max() > 2e-3
        torch.testing.assert_close(values(o.weights), values(other.weights), atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_on_a_base_of_fewer_bits_it_learns_in_float32(base_dir, base, dtype, monkeypatch):
    """In bfloat16 by the C kernels, if there is a compiler."""
    monkeypatch.setattr("loraserve.kernels.gemm.fast", lambda: True)
    half = load_base(str(base_dir), device="cpu", dtype=dtype)
    half.model.pack_for_training()
    batch, losses = pack(random_samples(4)), {}
    for each in (half, base):
        weights = with_magnitudes(each, trainable(each, zero=True))
        trainer = dora_optimizer(each, weights)
        losses[each.dtype] = [trainer.advance([batch])[0].loss for _ in range(12)]
        assert {tensor.dtype for tensor in named(weights).values()} == {torch.float32}
    assert losses[half.dtype][-1] < losses[half.dtype][0] - 0.2
    assert losses[half.dtype] == pytest.approx(losses[torch.float32], rel=0.02)
