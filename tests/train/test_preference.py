"""DPO: pairs are read, or refused with a reason; whole runs beside PEFT, with the loss written out from the paper."""

import copy
import io
import json
import math
import signal

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraserve.cli.main import main
from loraserve.errors import DataError, InvalidRequest, TrainingInterrupted
from loraserve.lora.stack import AdapterStack
from loraserve.registry import Registry
from loraserve.train.batch import dialogue_losses, pack, summed_loss, token_losses
from loraserve.train.data import Encoder
from loraserve.train.dialogue import read_dialogue
from loraserve.train.initial import start
from loraserve.train.options import TrainOptions
from loraserve.train.pairs import encode_pair, read_pair
from loraserve.train.preference import Preference, preference_loss
from loraserve.train.rows import BadRow, Row
from loraserve.train.trainer import train
from tests.train.conftest import PAIRS
from tests.train.test_step import gradients, random_samples, trainable
from tests.train.test_trainer import SignalAt, replace

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in ("`is_gradient_checkpointing` is deprecated", "Could not find a config file")
]
EPOCHS, PEAK, BETA = 4, 5e-3, 0.3
TARGETS = ["q_proj", "v_proj", "down_proj"]


def message(role, content):
    return {"role": role, "content": content}


def pair(question, chosen, rejected):
    return {
        side: [message("user", question), message("assistant", answer)]
        for side, answer in (("chosen", chosen), ("rejected", rejected))
    }


def row(value):
    return Row(1, 0, value if isinstance(value, bytes) else json.dumps(value).encode())


@pytest.fixture
def registry(base, tmp_path):
    return Registry(tmp_path / "adapters", base.shapes, base.fingerprint)


@pytest.fixture
def pairs():
    """Seven short pairs; one has an earlier turn, which is the same on both sides."""
    answers = [answer for _, answer in PAIRS]
    rows = [pair(q, a, b) for (q, a), b in zip(PAIRS, answers[1:] + answers[:1], strict=True)]
    for side in rows[0].values():
        side[:0] = [message("user", "hm"), message("assistant", "Yes?")]
    return rows


@pytest.fixture
def options(tmp_path, write_rows, pairs):
    return TrainOptions(
        data=write_rows(tmp_path / "likes.jsonl", pairs),
        name="likes",
        objective="dpo",
        dpo_beta=BETA,
        epochs=EPOCHS,
        batch_size=7,
        learning_rate=PEAK,
        targets=TARGETS,
        r=4,
    )


def answer_tokens(base, messages):
    """Token ids of a dialogue, and where its last answer begins: found by rendering the prompt alone."""
    ids = base.tokenizer.encode(base.template.render(messages, add_generation_prompt=False))
    prompt = base.tokenizer.encode(base.template.render(messages[:-1], add_generation_prompt=True))
    assert ids[: len(prompt)] == prompt
    return torch.tensor(ids), len(prompt)


def log_probability(model, ids, first):
    logits = model(input_ids=ids[None]).logits[0]
    return logits[first - 1 : -1].log_softmax(-1).gather(1, ids[first:, None]).sum()


def dpo_with_peft(model, reference, base, pairs):
    """The paper's loss, pair by pair, on transformers' model; the figures of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    figures = []
    for step in range(1, EPOCHS + 1):
        losses, margins = [], []
        for each in pairs:
            chosen, rejected = (answer_tokens(base, each[side]) for side in ("chosen", "rejected"))
            with torch.no_grad():
                expected = reference(*chosen) - reference(*rejected)
            margin = BETA * (log_probability(model, *chosen) - log_probability(model, *rejected) - expected)
            losses.append(-torch.log(1 / (1 + torch.exp(-margin))))
            margins.append(margin.item())
        loss = sum(losses) / len(losses)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        accuracy = sum(margin > 0 for margin in margins) / len(margins)
        figures.append((loss.item(), sum(margins) / len(margins), accuracy, norm.item()))
        optimizer.param_groups[0]["lr"] = PEAK * (0.1 + 0.45 * (1 + math.cos(math.pi * step / EPOCHS)))
        optimizer.step()
        optimizer.zero_grad()
    return figures


def records_of(record):
    rows = [json.loads(line) for line in (record.path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("begin", ["from the base", "from an adapter"])
def test_a_run_is_the_one_that_the_paper_s_loss_gives_with_peft(
    base, base_dir, registry, options, pairs, tmp_path, begin
):
    """The reference is what the run starts from, so each begins with a margin of 0."""
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    plain = copy.deepcopy(theirs)
    fresh = begin == "from the base"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=fresh)
    model = peft.get_peft_model(theirs, config).eval()
    if fresh:
        with torch.no_grad():
            for target, weight in start(options, base, registry).weights.items():
                model.get_submodule(f"base_model.model.{target}").lora_A["default"].weight.copy_(weight.A)
        frozen = plain
    else:
        model.save_pretrained(tmp_path / "parent")
        options = replace(options, init_from=str(tmp_path / "parent"), targets=None, r=None)
        frozen = copy.deepcopy(model)
    result = train(base, registry, options, io.StringIO())
    expected = dpo_with_peft(model, lambda ids, first: log_probability(frozen, ids, first), base, pairs)
    found = [(r["loss"], r["reward_margin"], r["accuracy"], r["grad_norm"]) for r in records_of(result.record)]
    assert expected[0][0] == pytest.approx(math.log(2), abs=1e-4) and expected[-1][0] < 0.6
    for ours, paper_s in zip(found, expected, strict=True):
        assert ours[:2] + ours[3:] == pytest.approx(paper_s[:2] + paper_s[3:], abs=2e-3, rel=1e-3)
    assert [ours[2] for ours in found[1:]] == [paper_s[2] for paper_s in expected[1:]]
    trained, published = (
        peft.get_peft_model_state_dict(model),
        load_file(result.record.path / "adapter_model.safetensors"),
    )
    assert trained.keys() == published.keys()
    for key, tensor in published.items():
        torch.testing.assert_close(tensor, trained[key].detach(), atol=1e-3, rtol=0)
    loaded = peft.PeftModel.from_pretrained(plain, str(result.record.path)).eval()
    ids, first = answer_tokens(base, pairs[1]["chosen"])
    with torch.no_grad():
        batch = pack([sample_of(base, pairs[1])[0]])
        ours = -losses_of(base, batch, AdapterStack([registry.load("likes").weights]))
        torch.testing.assert_close(ours[0], log_probability(loaded, ids, first), atol=1e-3, rtol=1e-4)


def losses_of(base, batch, stack):
    return dialogue_losses(batch, token_losses(base.model, [(0, batch)], stack)[0])


def sample_of(base, value):
    from loraserve.train.data import Sample

    encodings = encode_pair(Encoder(base.tokenizer, base.template, 256, None), read_pair(row(value)))
    return [Sample(torch.tensor(e.input_ids, dtype=torch.int32), torch.tensor(e.supervised)) for e in encodings]


@pytest.mark.parametrize("head", [False, True], ids=["frozen-head", "head-with-adapter"])
def test_split_passes_keep_pairs_together_and_give_the_whole_gradient(base, head):
    def adapter(seed=0):
        return {target: w for target, w in trainable(base, seed).items() if head or target != "lm_head"}

    batch = pack(random_samples(10), 2)
    assert batch.num_pairs == 5
    reference = AdapterStack([{t: type(w)(w.A.detach(), w.B.detach(), w.scaling) for t, w in adapter(7).items()}])
    preference, found = Preference(0.05, reference), []
    for max_rows, checkpointing in ((None, False), (60, True)):
        weights, loss, margins = adapter(), 0.0, []
        parts = batch.split(max_rows)
        assert all(len(part.lengths) % 2 == 0 for part in parts) and (len(parts) > 2) == (max_rows is not None)
        for part in parts:
            ratios = preference.reference_ratios(base.model, part)
            stack = AdapterStack([weights])
            losses = token_losses(base.model, [(0, part)], stack, checkpointing=checkpointing)[0]
            each = preference.margins(part, losses, ratios)
            part_loss = preference_loss(each)
            part_loss.backward()
            loss, margins = loss + part_loss.item(), [*margins, *each.tolist()]
        found.append((loss, margins, gradients(weights)))
    assert len(margins) == 5 and max(map(abs, margins)) > 0.1
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-3)
    assert found[0][2].abs().max() > 0.01
    torch.testing.assert_close(found[0][2], found[1][2], atol=1e-3, rtol=1e-3)
    losses = losses_of(base, batch, None)
    for i in range(10):
        alone = pack(random_samples(10)[i : i + 1])
        assert losses[i].item() == pytest.approx(summed_loss(base.model, alone, None).item(), rel=1e-4)


@pytest.mark.parametrize("parent", [False, True], ids=["base", "adapter"])
def test_a_stopped_run_resumes_to_the_same_bits(base, registry, options, tmp_path, parent):
    """With an adapter as its reference, which must be the one before the first step and not the resumed one."""
    options = replace(options, batch_size=2, accumulation_steps=2, val_split=0.3, log_interval=1, epochs=4)
    if parent:
        train(base, registry, replace(options, name="parent", val_split=0.0, epochs=1), io.StringIO())
        options = replace(options, init_from=str(registry.get("parent").path), targets=None, r=None)
    whole, log = Registry(tmp_path / "whole", base.shapes, base.fingerprint), io.StringIO()
    train(base, whole, replace(options, publish="always"), log)
    assert "5 preference pairs and 2 for validation" in log.getvalue()
    assert "validation after step 0/12: loss 0.6931, accuracy 0%" in log.getvalue() or parent
    with pytest.raises(TrainingInterrupted):
        train(base, registry, replace(options, publish="always"), SignalAt("step 5/12", signal.SIGINT))
    train(base, registry, replace(options, publish="always", resume=True), io.StringIO())
    assert registry.load("likes").digest == whole.load("likes").digest
    ours, theirs = (records_of(each.get("likes")) for each in (registry, whole))
    assert [r["reward_margin"] for r in ours] == [r["reward_margin"] for r in theirs] and len(ours) == 12


def test_another_objective_or_beta_is_another_recipe(base, registry, options):
    options = replace(options, batch_size=2, log_interval=1)
    with pytest.raises(TrainingInterrupted):
        train(base, registry, options, SignalAt("step 5/16", signal.SIGINT))
    with pytest.raises(InvalidRequest, match=r"dpo_beta was 0\.3 and is 0\.1"):
        train(base, registry, replace(options, resume=True, dpo_beta=None), io.StringIO())
    record = train(base, registry, replace(options, resume=True), io.StringIO()).record
    manifest = record.manifest
    assert manifest.recipe["objective"] == "dpo" and manifest.recipe["dpo_beta"] == BETA
    assert manifest.metrics["accuracy"] > 0.5 and manifest.metrics["reward_margin"] > 0
    card = (record.path / "README.md").read_text("utf-8")
    assert "on 7 preference pairs of `likes.jsonl`" in card and "| reward margin of the last epoch |" in card


def test_a_mixture_of_experts_learns_from_pairs(moe_base, options, tmp_path):
    registry = Registry(tmp_path / "moe", moe_base.shapes, moe_base.fingerprint)
    options = replace(options, loss_reduction="mean", memory_budget=2**40)
    rows = records_of(train(moe_base, registry, options, io.StringIO()).record)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and rows[-1]["loss"] < 0.6


GOOD = pair("hi", "Hello!", "Go away.")
BAD = {
    "not a JSON object": b"[1]",
    "has no 'rejected'": {"chosen": GOOD["chosen"]},
    "has no 'chosen' and no 'rejected'": {"messages": GOOD["chosen"]},
    "'chosen': 'chosen' is not a list of messages": GOOD | {"chosen": "Hello!"},
    "'rejected': unknown role 'wizard'": GOOD | {"rejected": [message("wizard", "x")]},
    "'rejected': an assistant message is empty": pair("hi", "Hello!", " "),
    "'chosen' does not end with an assistant message": GOOD | {"chosen": [*GOOD["chosen"], message("user", "so?")]},
    "answer different prompts": GOOD | {"rejected": pair("hey", "", "Go away.")["rejected"]},
    "'chosen' and 'rejected' are the same: there": pair("hi", "Hello!", "Hello!"),
}


OPENAI = {
    "input": {"messages": [message("user", "hi")], "tools": []},
    "preferred_output": [message("assistant", "Hello!")],
    "non_preferred_output": [message("assistant", "Go away.")],
}
BAD |= {
    "has no 'non_preferred_output', a list of messages": {k: v for k, v in OPENAI.items() if k[0] != "n"},
    "'input' has no 'messages', a list": OPENAI | {"input": {}},
}


def test_openai_s_preference_rows_say_the_same():
    assert read_pair(row(OPENAI)) == read_pair(row(GOOD))
    with pytest.raises(BadRow, match="which only train --objective dpo"):
        read_dialogue(row(OPENAI))


@pytest.mark.parametrize(("reason", "value"), BAD.items(), ids=BAD)
def test_a_row_that_is_no_pair_is_refused_with_its_reason(reason, value):
    assert read_pair(row(GOOD)).rejected.messages[-1]["content"] == "Go away."
    with pytest.raises(BadRow) as caught:
        read_pair(row(value))
    assert reason in str(caught.value)


def test_only_the_last_answer_is_learned_and_cut_pairs_must_differ(base):
    turns = [message("user", "hm"), message("assistant", "Yes?")]
    value = read_pair(row({side: turns + messages for side, messages in GOOD.items()}))
    for limit in (None, 200):
        encodings = encode_pair(Encoder(base.tokenizer, base.template, 256, limit), value)
        texts = [
            base.tokenizer.decode([i for i, now in zip(e.input_ids, e.supervised, strict=True) if now])
            for e in encodings
        ]
        assert [text.replace("<|im_end|>", "").strip() for text in texts] == ["Hello!", "Go away."]
    prompt = answer_tokens(base, value.chosen.messages)[1]
    with pytest.raises(BadRow, match=f"are the same within {prompt} tokens; raise --max-seq-len"):
        encode_pair(Encoder(base.tokenizer, base.template, 256, prompt), value)
    with pytest.raises(BadRow, match="'chosen': longer than the base's context of 20 tokens"):
        encode_pair(Encoder(base.tokenizer, base.template, 20, None), value)


def test_bad_pairs_end_a_run_or_are_skipped_and_files_of_the_other_kind_say_what_they_are(
    base, registry, options, dialogue_file
):
    with options.data.open("a") as file:
        file.write(json.dumps(pair("hi", "Hello!", "Hello!")) + "\n")
    with pytest.raises(DataError, match="line 8: 'chosen' and 'rejected' are the same"):
        train(base, registry, options, io.StringIO())
    with pytest.raises(DataError, match="a preference pair, which only train --objective dpo"):
        train(base, registry, replace(options, objective="sft", dpo_beta=None), io.StringIO())
    with pytest.raises(DataError, match="has no 'chosen' and no 'rejected', as a preference pair has"):
        train(base, registry, replace(options, data=dialogue_file), io.StringIO())
    record = train(base, registry, replace(options, on_bad_row="skip"), io.StringIO()).record
    assert record.manifest.metrics["dialogues"] == 7 and record.manifest.metrics["rejected_rows"] == 1


def test_the_command_trains_and_surveys_pairs(base_dir, options, tmp_path):
    arguments = ["train", "--base", base_dir, "--data", options.data, "--adapters-dir", tmp_path / "adapters"]
    arguments = [str(a) for a in arguments] + [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--objective",
        "dpo",
        "--epochs",
        "1",
    ]
    result = CliRunner().invoke(main, [*arguments, "--dry-run", "--json"])
    assert result.exit_code == 0, result.stderr
    survey = json.loads(result.stdout)["survey"]
    assert survey["formats"] == {"preference": 7} and survey["duplicates"] == 0 and survey["accepted"] == 7
    result = CliRunner().invoke(main, [*arguments, "--dpo-beta", "0.2", "--log-interval", "1"])
    assert result.exit_code == 0, result.stderr
    assert "loss 0.6931  margin" in result.stderr and "7 preference pairs" in result.stderr
    result = CliRunner().invoke(main, [*arguments, "--objective", "sft", "--dpo-beta", "0.2"])
    assert result.exit_code == 2 and "dpo_beta goes with --objective dpo only" in result.stderr
    result = CliRunner().invoke(main, [*arguments, "--drop-empty-think", "0.2"])
    assert result.exit_code == 2 and "do not go with --objective dpo" in result.stderr
