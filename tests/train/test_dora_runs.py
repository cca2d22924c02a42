"""Whole runs of `--dora`: published, served, merged, gone on with, resumed, and several at once. Beside PEFT: test_methods."""

import io
import json
import signal

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from loraserve.base.attention import PackedAttention
from loraserve.base.load import load_base
from loraserve.base.quantize import QUANTIZATIONS
from loraserve.engine.merge import merge
from loraserve.engine.service import Service
from loraserve.errors import AdapterRefused, InvalidRequest, TrainingInterrupted
from loraserve.lora.adapter import Adapter
from loraserve.lora.batch import LoraBatch
from loraserve.lora.dora import prepared
from loraserve.lora.peft import read_adapter
from loraserve.lora.spec import parse_spec
from loraserve.lora.stack import AdapterStack
from loraserve.registry import Registry
from loraserve.train.batch import pack, token_losses
from loraserve.train.dora import measured
from loraserve.train.initial import start
from loraserve.train.options import TrainOptions
from loraserve.train.trainer import train, train_all
from tests.train.conftest import PAIRS
from tests.train.test_dora import in_use, named
from tests.train.test_many import assert_alike
from tests.train.test_step import random_samples
from tests.train.test_trainer import SignalAt, replace

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


@pytest.fixture
def registry(base, tmp_path):
    return Registry(tmp_path / "adapters", base.shapes, base.fingerprint)


@pytest.fixture
def options(dialogue_file):
    return TrainOptions(
        data=dialogue_file,
        name="robot",
        targets="all",
        r=3,
        rank_pattern={"q_proj": 2},
        use_dora=True,
        epochs=3,
        batch_size=4,
        learning_rate=1e-2,
        log_interval=1,
        save_interval=3,
        val_split=0.15,
        publish="always",
    )


def test_what_was_trained_is_what_is_served_merged_and_read_by_peft(base, base_dir, registry, options, tmp_path):
    """The weights of the last step, through the pass that trained them: no skew between training and serving."""
    record = train(base, registry, options, io.StringIO()).record
    adapter = registry.load("robot")
    assert record.config.use_dora and record.manifest.recipe["use_dora"]
    assert record.manifest.metrics["num_parameters"] == sum(w.num_parameters for w in adapter.weights.values())
    norms = {t: base.weight_of(t).norm(dim=1) for t in adapter.weights}
    assert all((w.magnitude - norms[t]).abs().max() > 5e-3 and w.B.any() for t, w in adapter.weights.items())
    ids = [1, 40, 77, 130, 9, 250, 33]
    attention = PackedAttention([len(ids)])
    own = load_base(str(base_dir), device="cpu", dtype="float32")
    service = Service(own, registry, max_model_len=64)
    service.start()
    try:
        served, plain = service.logits(ids, parse_spec("robot")), service.logits(ids)
    finally:
        service.stop()
    stack = in_use(base, {t: w.map(nn.Parameter) for t, w in adapter.weights.items()})
    trained = base.model(torch.tensor(ids), attention.positions, attention, LoraBatch(stack, torch.ones(len(ids), 1)))
    assert trained.requires_grad and (served - plain).abs().max() > 0.1
    torch.testing.assert_close(served, trained.detach(), rtol=1e-4, atol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    loaded = peft.PeftModel.from_pretrained(theirs, str(record.path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=torch.tensor([ids])).logits[0], served, rtol=1e-4, atol=1e-4)
    done = merge(base, registry, parse_spec("robot"), tmp_path / "merged")
    assert done.parity.max_logit_difference < 2e-2 * done.parity.max_logit


def test_going_on_with_one_of_peft_s_keeps_its_magnitudes(base, base_dir, registry, options, tmp_path):
    """Without a step nothing changes; with steps its own magnitudes move on, from where they were."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    config = peft.LoraConfig(
        r=3, lora_alpha=2, target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_magnitude" in name:
                tensor.mul_(torch.rand_like(tensor) + 0.5)
    model.save_pretrained(tmp_path / "theirs")
    saved, _ = read_adapter(tmp_path / "theirs", "theirs", base.shapes)
    more = replace(
        options, targets=None, r=None, rank_pattern={}, use_dora=False, init_from=str(tmp_path / "theirs"), epochs=1
    )
    begun = start(more, base, registry)
    assert named(begun.weights).keys() == named(saved.weights).keys() and begun.config.use_dora
    assert all(tensor.equal(named(saved.weights)[name]) for name, tensor in named(begun.weights).items())
    ready = AdapterStack([prepared(Adapter(saved.weights), base.weight_of).weights])
    log = io.StringIO()
    record = train(base, registry, more, log).record
    assert record.manifest.recipe["use_dora"] and record.config.use_dora
    batch = pack(random_samples(3))
    with torch.no_grad():
        reference = AdapterStack([measured(begun.copy(), base.weight_of)])
        (before,), (kept,) = (token_losses(base.model, [(0, batch)], s) for s in (ready, reference))
    torch.testing.assert_close(kept, before, rtol=1e-4, atol=1e-4)
    moved = named(registry.load("robot").weights)
    for name, tensor in named(saved.weights).items():
        assert 1e-3 < (moved[name] - tensor).abs().max() < 0.1, name


@pytest.mark.parametrize("how", ["none", *QUANTIZATIONS])
def test_preferences_start_from_the_adapter_as_it_was(base, base_dir, registry, options, tmp_path, write_rows, how):
    """On a base in fewer bits, too, whose weights come last: magnitudes and reference are by what it computes with."""

    def messages(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": messages(q, a), "rejected": messages(q, a[::-1])} for q, a in PAIRS]
    likes = replace(
        options, data=write_rows(tmp_path / "likes.jsonl", rows), objective="dpo", name="likes", batch_size=7
    )
    likes = replace(likes, quantize=how)
    train(base, registry, options, io.StringIO())
    on = replace(likes, targets=None, r=None, rank_pattern={}, use_dora=False, init_from="robot", name="on")
    for each in (likes, on):
        waiting = load_base(str(base_dir), device="cpu", dtype="float32", weights=False)
        record = train(waiting, registry, each, io.StringIO()).record
        steps = [json.loads(line) for line in (record.path / "metrics.jsonl").read_text().splitlines()]
        margins = [step["reward_margin"] for step in steps if "reward_margin" in step]
        assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 0.05
        assert record.config.use_dora


@pytest.mark.parametrize("step", [3, 7])
def test_a_stopped_run_resumes_to_the_same_bits(base, registry, options, tmp_path, step):
    whole = Registry(tmp_path / "whole", base.shapes, base.fingerprint)
    train(base, whole, options, io.StringIO())
    with pytest.raises(TrainingInterrupted):
        train(base, registry, options, SignalAt(f"step {step}/9", signal.SIGINT))
    with pytest.raises(InvalidRequest, match="use_dora was True and is False"):
        train(base, registry, replace(options, resume=True, use_dora=False), io.StringIO())
    train(base, registry, replace(options, resume=True), io.StringIO())
    assert registry.load("robot").digest == whole.load("robot").digest
    tensors = load_file(registry.get("robot").path / "adapter_model.safetensors")
    assert sum("lora_magnitude_vector" in name for name in tensors) == len(base.shapes)


@pytest.mark.parametrize("budget", [None, "tight"])
def test_a_set_of_both_kinds_comes_out_as_alone(base, registry, options, tmp_path, budget, monkeypatch):
    each = [
        options,
        replace(options, name="plain", use_dora=False, epochs=2, r=4),
        replace(options, name="attention", targets="attention", rank_pattern={}, epochs=4, learning_rate=3e-3),
    ]
    alone = Registry(tmp_path / "alone", base.shapes, base.fingerprint)
    for one in each:
        train(base, alone, one, io.StringIO())
    log = io.StringIO()
    if budget:
        monkeypatch.setattr("loraserve.train.memory.bytes_in_use", lambda base: 0)
        each = [replace(one, memory_budget=8_000_000) for one in each]
    train_all(base, registry, each, log)
    assert ("passes of up to" in log.getvalue()) == bool(budget)
    for one in each:
        assert_alike(registry, alone, one.name)
        assert registry.load(one.name).is_dora == one.use_dora


def test_where_an_output_has_no_weights_it_is_refused_by_name(base_dir, registry, options):
    hollow = load_base(str(base_dir), device="cpu", dtype="float32")
    with torch.no_grad():
        hollow.model.get_submodule("model.layers.1.mlp.up_proj").weight[3] = 0
    with pytest.raises(
        InvalidRequest, match=r"model\.layers\.1\.mlp\.up_proj: DoRA divides .* without --dora"
    ) as caught:
        train(hollow, registry, options, io.StringIO())
    assert caught.value.param == "use_dora"
    with pytest.raises(InvalidRequest, match="--dora and --init-from do not go together"):
        TrainOptions(data=options.data, name="x", use_dora=True, init_from="y").check()
    train(hollow, registry, replace(options, targets="attention"), io.StringIO())
    with pytest.raises(AdapterRefused, match="no magnitudes"):
        registry.export("robot", options.data.parent / "robot.pth", "minimind")
