import torch
from torch import nn

from loraserve.base.attention import PackedAttention
from loraserve.lora.adapter import LoraWeight
from loraserve.lora.batch import LoraBatch
from loraserve.train.card import write_card
from loraserve.train.dialogue import read_dialogue
from loraserve.train.rows import DataFile, Rejections
from loraserve.train.samples import MAX_NEW_TOKENS, Comparison, compare


def greedy(base, weights, prompt):
    """The naive form: one sequence, every token anew."""
    ids = base.tokenizer.encode(prompt)
    start = len(ids)
    for _ in range(MAX_NEW_TOKENS):
        attention = PackedAttention([len(ids)])
        lora = LoraBatch.uniform(weights, len(ids)) if weights else None
        token = int(base.model(torch.tensor(ids), attention.positions, attention, lora)[-1].argmax())
        if token in base.eos_ids:
            break
        ids.append(token)
    return base.tokenizer.decode(ids[start:]).strip()


def test_answers_side_by_side_are_those_of_each_alone(base, dialogue_file):
    generator = torch.Generator().manual_seed(3)
    weights = {
        target: LoraWeight(
            nn.Parameter(torch.randn(3, inp, generator=generator) * 0.2),
            nn.Parameter(torch.randn(out, 3, generator=generator) * 0.2),
            2.0,
        )
        for target, (out, inp) in base.shapes.items()
    }
    dialogues = [read_dialogue(row) for row in DataFile(dialogue_file).rows()]
    found = compare(base, weights, [dialogues[0], *dialogues], 3)
    assert [each.question for each in found] == ["who are you", "hello", "你是谁"]
    with torch.inference_mode():
        for each, dialogue in zip(found, dialogues, strict=False):
            prompt = base.template.render(dialogue.messages[:1])
            assert each.before == greedy(base, None, prompt)
            assert each.after == greedy(base, weights, prompt)
            assert each.before != each.after
    assert compare(base, weights, [], 3) == []


def test_a_card_survives_tables_and_markup_in_answers():
    metrics = {"dialogues": 3, "num_parameters": 1234, "steps": 5, "loss": 0.5, "val_loss": None}
    recipe = {"data": "a.jsonl", "r": 8, "max_seq_len": None}
    card = write_card("小明", "some/base", recipe, metrics, Rejections(), [Comparison("a|b", "<b>x</b>\ny", "好")])
    assert card.startswith('---\nbase_model: "some/base"\n')
    assert "| a\\|b | &lt;b>x&lt;/b><br>y | 好 |" in card
    assert "max_seq_len" not in card and "validation loss" not in card and "1,234 parameters" in card
