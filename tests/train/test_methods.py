"""Ranks and alphas by pattern, rsLoRA, LoRA+ and going on with an adapter: whole runs beside PEFT training the same.

PEFT's model, scaling and optimizer are the reference; only A before the first step and the tokens are ours.
"""

import io
import json
import math
import signal

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraserve.base.attention import PackedAttention
from loraserve.errors import AdapterNotFound, AdapterRefused, InvalidRequest, NotBetter, TrainingInterrupted
from loraserve.lora.adapter import Adapter
from loraserve.lora.batch import LoraBatch
from loraserve.lora.dora import prepared
from loraserve.registry import Registry
from loraserve.train.data import Encoder
from loraserve.train.initial import start
from loraserve.train.options import TrainOptions
from loraserve.train.trainer import train
from tests.train.conftest import PAIRS, dataset_of
from tests.train.test_trainer import SignalAt, replace

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in ("`is_gradient_checkpointing` is deprecated", "Could not find a config file")
]
EPOCHS, PEAK = 4, 1e-2
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# options of a run, PEFT's words for the same, LoRA+'s ratio
CASES = {
    "plain": ({}, {"r": 8, "lora_alpha": 16}, 1.0),
    "rslora": ({"use_rslora": True}, {"r": 8, "lora_alpha": 16, "use_rslora": True}, 1.0),
    "rslora at rank 3": (
        {"r": 3, "lora_alpha": 4.5, "use_rslora": True},
        {"r": 3, "lora_alpha": 4.5, "use_rslora": True},
        1.0,
    ),
    "patterns": (
        {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 3, r"mlp\..*": 5},
            "alpha_pattern": {"o_proj": 1.5, r"layers\.[02]\..*": 9},
        },
        {
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "q_proj": 3, r"mlp\..*": 5},
            "alpha_pattern": {"o_proj": 1.5, r"layers\.[02]\..*": 9},
        },
        1.0,
    ),
    "attention, patterns and rslora": (
        {"targets": "attention", "use_rslora": True, "rank_pattern": {"[qk]_proj": 2}},
        {
            "r": 8,
            "lora_alpha": 16,
            "use_rslora": True,
            "rank_pattern": {"[qk]_proj": 2},
            "target_modules": ALL[:4],
        },
        1.0,
    ),
    "LoRA+": ({"lora_plus_ratio": 4.0}, {"r": 8, "lora_alpha": 16}, 4.0),
    "DoRA": ({"use_dora": True}, {"r": 8, "lora_alpha": 16, "use_dora": True}, 1.0),
    "DoRA, patterns, rslora and LoRA+": (
        {
            "targets": ["q_proj", "o_proj", "up_proj", "down_proj"],
            "r": 3,
            "lora_alpha": 5,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"down_proj": 3},
            "use_rslora": True,
            "lora_plus_ratio": 3.0,
            "use_dora": True,
        },
        {
            "r": 3,
            "lora_alpha": 5,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"down_proj": 3},
            "use_rslora": True,
            "use_dora": True,
            "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"],
        },
        3.0,
    ),
}


@pytest.fixture
def registry(base, tmp_path):
    return Registry(tmp_path / "adapters", base.shapes, base.fingerprint)


@pytest.fixture
def options(dialogue_file):
    """All fourteen dialogues in each step, so that the order of an epoch says nothing."""
    return TrainOptions(data=dialogue_file, name="robot", epochs=EPOCHS, batch_size=14, learning_rate=PEAK)


@pytest.fixture
def theirs(base_dir):
    return AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()


def samples_of(base, options):
    dataset = dataset_of(options.data, Encoder(base.tokenizer, base.template, 256, None))
    return [dataset.sample(0, row) for row in range(len(dataset))]


def peft_run(model, samples, ratio):
    """Train a PEFT model as `loraserve train` would; returns its loss at each step."""
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=PEAK, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.01
    )
    peaks, losses = [group["lr"] for group in optimizer.param_groups], []
    for step in range(1, EPOCHS + 1):
        total, count = 0.0, 0
        for sample in samples:
            ids = sample.input_ids.long()
            labels = torch.where(sample.supervised, ids, -100)
            logits = model(input_ids=ids[None]).logits[0]
            total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            count += int((labels[1:] != -100).sum())
        (total / count).backward()
        losses.append(total.item() / count)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (0.1 + 0.45 * (1 + math.cos(math.pi * step / EPOCHS)))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def losses_of(record):
    rows = [json.loads(line) for line in (record.path / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def logits_of(base, weights, ids):
    attention = PackedAttention([len(ids)])
    lora = LoraBatch.uniform(prepared(Adapter(weights), base.weight_of).weights, len(ids)) if weights else None
    return base.model(ids, attention.positions, attention, lora)


def assert_same_run(base, registry, options, model, samples, ratio, base_dir):
    """A run of ours gives the losses and weights of PEFT's, and PEFT gives its logits for what was published."""
    record = train(base, registry, options, io.StringIO()).record
    expected = peft_run(model, samples, ratio)
    assert expected[-1] < expected[0] - 0.1
    assert losses_of(record) == pytest.approx(expected, abs=2e-4)
    trained = {k: v.detach() for k, v in peft.get_peft_model_state_dict(model).items()}
    published = load_file(record.path / "adapter_model.safetensors")
    assert published.keys() == trained.keys()
    for key, tensor in published.items():
        torch.testing.assert_close(tensor, trained[key], atol=2e-4, rtol=0)
    plain = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    loaded = peft.PeftModel.from_pretrained(plain, str(record.path)).eval()
    ids = samples[0].input_ids.long()
    with torch.no_grad():
        ours = logits_of(base, registry.load(options.name).weights, ids)
        assert (ours - logits_of(base, None, ids)).abs().max() > 0.1
        torch.testing.assert_close(loaded(input_ids=ids[None]).logits[0], ours, atol=1e-4, rtol=1e-4)
    return record


@pytest.mark.parametrize(("ours", "peft_s", "ratio"), CASES.values(), ids=CASES)
def test_a_run_is_the_one_that_peft_would_have_made(base, base_dir, registry, options, theirs, ours, peft_s, ratio):
    options = replace(options, **ours)
    model = peft.get_peft_model(
        theirs, peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ALL, "lora_dropout": 0.0} | peft_s)
    )
    begun = start(options, base, registry)
    begun.measure(base.weight_of)
    with torch.no_grad():
        for target, weight in begun.weights.items():
            module = model.get_submodule(f"base_model.model.{target}")
            module.lora_A["default"].weight.copy_(weight.A)
            assert module.scaling["default"] == pytest.approx(weight.scaling)
            if weight.magnitude is not None:
                torch.testing.assert_close(module.lora_magnitude_vector["default"].weight, weight.magnitude)
    record = assert_same_run(base, registry, options, model, samples_of(base, options), ratio, base_dir)
    saved = json.loads((record.path / "adapter_config.json").read_text())
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
        assert saved[field] == getattr(model.peft_config["default"], field)
    assert record.manifest.recipe["use_rslora"] == options.use_rslora
    card = (record.path / "README.md").read_text("utf-8")
    assert f"| lora_plus_ratio | {ratio} |" in card and f"| use_rslora | {str(options.use_rslora).lower()} |" in card
    assert ("| rank_pattern |" in card) == bool(options.rank_pattern)


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_going_on_with_an_adapter_of_peft_s_is_going_on_with_it_in_peft(
    base, base_dir, registry, options, theirs, tmp_path, use_dora
):
    """From a directory, with a B that is not zero, ranks of its own and rsLoRA; the second time from the registry."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=2,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        use_rslora=True,
        use_dora=use_dora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, magnitude in model.named_parameters():
            if "lora_magnitude" in name:
                magnitude.mul_(torch.rand_like(magnitude) + 0.5)
    model.save_pretrained(tmp_path / "theirs")
    before = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in before.values())
    options, samples = replace(options, init_from=str(tmp_path / "theirs")), samples_of(base, options)
    record = assert_same_run(base, registry, options, model, samples, 1.0, base_dir)
    assert record.manifest.parents[0].startswith("theirs@sha256:")
    assert record.manifest.recipe["init_from"] == record.manifest.parents[0]
    assert record.manifest.recipe["rank_pattern"] == ["down_proj=2"] and record.manifest.recipe["use_rslora"]
    assert str(tmp_path) not in (record.path / "loraserve.json").read_text()
    assert (record.config.r, record.config.rank_pattern, record.config.use_rslora) == (3, {"down_proj": 2}, True)
    options = replace(options, init_from="robot", name="robot")
    again = assert_same_run(base, registry, options, model, samples, 1.0, base_dir)
    assert again.version == 2 and losses_of(again)[0] < losses_of(record)[-1]


@pytest.fixture
def parent(base, registry, options):
    """An adapter in the registry, made with every method."""
    ours = {"use_rslora": True, "r": 3, "rank_pattern": {"mlp.*": 2}, "lora_plus_ratio": 2.0}
    train(base, registry, replace(options, name="parent", epochs=2, **ours), io.StringIO())
    return ours


@pytest.mark.parametrize("way", ["new", "continued"])
def test_a_stopped_run_resumes_to_the_same_bits(base, registry, options, parent, tmp_path, way):
    ours = parent if way == "new" else {"init_from": str(registry.get("parent").path), "lora_plus_ratio": 3.0}
    options = replace(options, batch_size=4, accumulation_steps=2, val_split=0.15, log_interval=1, **ours)
    whole = Registry(tmp_path / "whole", base.shapes, base.fingerprint)
    train(base, whole, options, io.StringIO())
    with pytest.raises(TrainingInterrupted):
        train(base, registry, options, SignalAt("step 5/12", signal.SIGINT))
    train(base, registry, replace(options, resume=True), io.StringIO())
    assert registry.load("robot").digest == whole.load("robot").digest
    assert (
        registry.get("robot").manifest.metrics["val_loss_base"] == whole.get("robot").manifest.metrics["val_loss_base"]
    )


def test_a_checkpoint_of_another_method_is_not_resumed(base, registry, options, parent):
    options = replace(options, batch_size=4, log_interval=1, **parent)
    with pytest.raises(TrainingInterrupted):
        train(base, registry, options, SignalAt("step 5/16", signal.SIGINT))
    for changes, text in (
        ({"use_rslora": False}, "use_rslora was True and is False"),
        ({"lora_plus_ratio": 1.0}, r"lora_plus_ratio was 2\.0 and is 1\.0"),
        ({"rank_pattern": {"mlp.*": 1}}, r"rank_pattern was \['mlp\.\*=2'\] and is \['mlp\.\*=1'\]"),
        ({"alpha_pattern": {"q_proj": 1}}, r"alpha_pattern was None and is \['q_proj=1'\]"),
        (
            {"use_rslora": False, "r": None, "rank_pattern": {}, "init_from": "parent"},
            "init_from was None and is 'parent@sha256:",
        ),
    ):
        with pytest.raises(InvalidRequest, match=text):
            train(base, registry, replace(options, resume=True, **changes), io.StringIO())
    train(base, registry, replace(options, resume=True), io.StringIO())


def test_a_parent_that_has_changed_is_not_gone_on_with(base, registry, options, parent):
    options = replace(options, batch_size=4, log_interval=1, init_from="parent")
    with pytest.raises(TrainingInterrupted):
        train(base, registry, options, SignalAt("step 5/16", signal.SIGINT))
    train(base, registry, replace(options, name="parent", seed=1), io.StringIO())
    with pytest.raises(InvalidRequest, match=r"init_from was 'parent@sha256:.*' and is 'parent@sha256:"):
        train(base, registry, replace(options, resume=True), io.StringIO())


def test_an_adapter_that_got_worse_is_not_published_even_if_it_beats_the_base(
    base, registry, options, tmp_path, write_rows
):
    """Learning one half of the dialogues makes it forget some of what it knew of the other."""
    halves = [
        write_rows(tmp_path / f"{i}.jsonl", [{"instruction": q, "output": a} for q, a in rows])
        for i, rows in enumerate((PAIRS[:3], PAIRS[3:]))
    ]
    good = replace(options, name="good", data=halves[0], val_data=halves[0], epochs=30)
    train(base, registry, good, io.StringIO())
    spoilt = replace(options, data=halves[1], val_data=halves[0], init_from="good", epochs=2)
    log = io.StringIO()
    with pytest.raises(NotBetter, match=r"the base's loss is .*, that of 'good' is .*, and the adapter's"):
        train(base, registry, spoilt, log)
    assert "validation of 'good': loss " in log.getvalue()
    record = train(base, registry, replace(spoilt, publish="always"), io.StringIO()).record
    metrics = record.manifest.metrics
    assert metrics["val_loss_initial"] < metrics["val_loss"] < metrics["val_loss_base"]
    assert metrics["val_loss_initial"] == registry.get("good").manifest.metrics["val_loss"]


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"rank_pattern": {"q_prj": 4}}, InvalidRequest, "rank_pattern: 'q_prj' matches no layer"),
        ({"alpha_pattern": {"(": 4}}, InvalidRequest, r"alpha_pattern: '\(' is not a regex"),
        (
            {"targets": "attention", "rank_pattern": {"up_proj": 4}},
            InvalidRequest,
            "'up_proj' matches no layer that is",
        ),
        ({"rank_pattern": {"q_proj": 0}}, InvalidRequest, "rank_pattern of 'q_proj' must be at least 1"),
        ({"alpha_pattern": {"q_proj": math.inf}}, InvalidRequest, "alpha_pattern of 'q_proj' must be above 0"),
        ({"lora_plus_ratio": 0.0}, InvalidRequest, "lora_plus_ratio must be above 0"),
        ({"init_from": "pirate"}, AdapterNotFound, "no adapter named 'pirate'; --init-from takes"),
        (
            {"init_from": "x", "r": 4, "use_rslora": True},
            InvalidRequest,
            "--rank, --rslora and --init-from do not go together",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_training(base, registry, options, settings, error, text):
    with pytest.raises(error, match=text) as caught:
        train(base, registry, replace(options, **settings), io.StringIO())
    assert caught.value.param is not None
    assert registry.names() == []


def test_an_adapter_of_another_base_is_not_gone_on_with(base, moe_base, registry, options, parent):
    path = registry.get("parent").path
    manifest = json.loads((path / "loraserve.json").read_text())
    other = registry.root / "other"
    other.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / name).write_bytes((path / name).read_bytes())
    (other / "loraserve.json").write_text(json.dumps(manifest | {"base_fingerprint": "sha256:0", "base_name": "big"}))
    for source in ("other", str(other)):
        with pytest.raises(AdapterRefused, match=r"trained on another base \(big\); go on with it on that --base"):
            train(base, registry, replace(options, init_from=source), io.StringIO())
    elsewhere = Registry(registry.root, moe_base.shapes, moe_base.fingerprint)
    with pytest.raises(AdapterRefused, match="no linear layer"):
        train(moe_base, elsewhere, replace(options, init_from="parent"), io.StringIO())
