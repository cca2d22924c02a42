import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loraserve.base.chat import ChatTemplate
from loraserve.base.tokenizer import Tokenizer
from loraserve.errors import DataError
from loraserve.train.data import Augmentation, Dataset, Encoder, supervised_mask
from loraserve.train.rows import read_file

TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
CALL = [{"name": "clock", "arguments": {"zone": "北京"}}]
LONG_DIALOGUE = [
    {"role": "system", "content": "Be <|brief|>."},
    {"role": "user", "content": "assistant\nwhat time is it? 几点了"},
    {"role": "assistant", "content": "", "tool_calls": CALL},
    {"role": "tool", "content": "12:00"},
    {"role": "assistant", "content": "中午十二点。\n\nNoon 🌈", "reasoning_content": "look at the clock"},
    {"role": "user", "content": "谢谢"},
    {"role": "assistant", "content": "不客气"},
    {"role": "user", "content": "(no answer follows)"},
]


def encoder_of(folder: Path, context: int = 4096, max_seq_len: int | None = None) -> Encoder:
    tokenizer = Tokenizer(folder)
    return Encoder(tokenizer, ChatTemplate(tokenizer), context, max_seq_len)


@pytest.mark.parametrize("generation", ["minimind-3-tokenizer", "minimind2-tokenizer"])
def test_loss_mask_covers_exactly_the_answers_token_by_token(conformance, tmp_path, generation, write_rows):
    """Catches a mask shifted by one, a think block or an end marker left out, and a user who writes 'assistant'."""
    tokenizer = Tokenizer(conformance / generation)
    template = ChatTemplate(tokenizer)
    file = read_file(write_rows(tmp_path / "data.jsonl", [{"messages": LONG_DIALOGUE, "tools": TOOLS}]))
    [sample], _ = encoder_of(conformance / generation).encode_file(file)
    # The naive form: cut the text at the markers, encode the pieces, and know for each piece whether it is an answer.
    text = template.render(LONG_DIALOGUE, tools=TOOLS, add_generation_prompt=False)
    head, *turns = text.split("<|im_start|>assistant\n")
    pieces = [(head, False)]
    for turn in turns:
        answer, end, rest = turn.partition("<|im_end|>\n")
        pieces += [("<|im_start|>assistant\n", False), (answer + end, True), (rest, False)]
    expected = [(token, is_answer) for piece, is_answer in pieces for token in tokenizer.encode(piece)]
    assert list(zip(sample.input_ids.tolist(), sample.supervised.tolist(), strict=True)) == expected
    answers = [piece for piece, is_answer in pieces if is_answer]
    assert len(answers) == 3 and answers[-1].endswith("不客气<|im_end|>\n")
    assert ("<think>" in answers[-1]) == (generation == "minimind-3-tokenizer")


def test_samples_and_epoch_order_are_those_of_miniminds_own_loader(conformance):
    """Catches a label, a token or a row in another place than upstream puts it."""
    folder = conformance / "minimind-3-train"
    encoder = encoder_of(conformance / "minimind-3-tokenizer", max_seq_len=128)
    dataset = Dataset(read_file(folder / "train.jsonl"), encoder, seed=42)
    batches = load_file(folder / "batches.safetensors")
    for epoch in range(2):
        for place, row in enumerate(dataset.order(epoch)):
            step, line = divmod(epoch * 96 + place, 8)
            ids, labels = batches[f"input_ids.{step}"][line], batches[f"labels.{step}"][line]
            sample = dataset.sample(epoch, row)
            length = len(sample.input_ids)
            assert ids[:length].equal(sample.input_ids.to(ids.dtype)) and not ids[length:].any()
            assert labels[:length].ne(-100).equal(sample.supervised) and labels[length:].eq(-100).all()


def test_mask_rule_on_bare_ids():
    start, end = [1, 5], [2, 6]
    assert supervised_mask([1, 5, 9, 2, 6, 1, 4, 9, 2, 6], start, end) == [False] * 2 + [True] * 3 + [False] * 5
    assert supervised_mask([1, 5, 9, 9], start, end) == [False, False, True, True]  # cut inside the answer
    assert supervised_mask([1, 5, 2, 6, 1, 5], start, end) == [False, False, True, True, False, False]
    assert supervised_mask([1, 5, 1, 5, 2, 6], start, end) == [False] * 2 + [True] * 4
    assert supervised_mask([], start, end) == []


def test_a_dialogue_longer_than_the_context_is_refused_and_cut_only_when_asked(base_dir, tmp_path, write_rows):
    short = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello " * 3}]}
    long = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello " * 300}]}
    late = {"messages": [{"role": "user", "content": "hi " * 300}, {"role": "assistant", "content": "hello"}]}
    file = read_file(write_rows(tmp_path / "data.jsonl", [short, long, late]))
    with pytest.raises(
        DataError, match=r"2 rows .* lines 2, 3: longer than the base's context of 64 tokens; the longest"
    ):
        encoder_of(base_dir, context=64).encode_file(file)
    with pytest.raises(DataError, match="line 3: nothing to supervise within the first 40 tokens; raise --max-seq-len"):
        encoder_of(base_dir, context=64, max_seq_len=40).encode_file(file)
    samples, num_cut = encoder_of(base_dir, context=64, max_seq_len=40).encode_file(
        read_file(write_rows(tmp_path / "two.jsonl", [short, long]))
    )
    assert num_cut == 1 and len(samples[1].input_ids) == 40 and samples[1].supervised[-1]


def test_a_template_that_does_not_mark_answers_is_named_as_the_reason(base_dir, tmp_path, write_rows):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((base_dir / "tokenizer.json").read_bytes())
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    with pytest.raises(DataError, match="line 1: nothing to supervise: the base's chat template puts no"):
        encoder_of(folder).encode_file(read_file(write_rows(tmp_path / "data.jsonl", [row])))


def test_validation_rows_are_held_out_and_the_split_is_the_same_each_time(base_dir, dialogue_file):
    file, encoder = read_file(dialogue_file), encoder_of(base_dir)
    first, second = (Dataset(file, encoder, seed=1, val_split=0.2) for _ in range(2))
    lines = [dialogue.line for dialogue in first.train_dialogues], [dialogue.line for dialogue in first.val_dialogues]
    assert len(first) == 11 and len(first.val) == 3
    assert sorted(lines[0] + lines[1]) == list(range(1, 15))
    assert lines[1] == [dialogue.line for dialogue in second.val_dialogues]
    assert lines[1] != [d.line for d in Dataset(file, encoder, seed=3, val_split=0.2).val_dialogues]
    assert len(Dataset(file, encoder, seed=1, val_split=0.001).val) == 1
    assert len(Dataset(file, encoder, seed=1, val_split=0.99)) == 1
    assert len(Dataset(file, encoder, seed=1).val) == 0


def test_validation_rows_may_come_from_a_file_of_their_own(base_dir, dialogue_file, write_rows, tmp_path):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    val_data = read_file(write_rows(tmp_path / "val.jsonl", [row]))
    dataset = Dataset(read_file(dialogue_file), encoder_of(base_dir), seed=1, val_data=val_data)
    assert len(dataset) == 14, "nothing is held out"
    assert dataset.val_dialogues == val_data.dialogues
    assert dataset.val[0].input_ids.tolist() == encoder_of(base_dir).encode_file(val_data)[0][0].input_ids.tolist()


def test_each_epoch_has_its_own_order_and_sees_every_row(base_dir, dialogue_file):
    dataset = Dataset(read_file(dialogue_file), encoder_of(base_dir), seed=7)
    assert dataset.order(0) != dataset.order(1)
    assert sorted(dataset.order(0)) == sorted(dataset.order(1)) == list(range(14))
    assert dataset.order(1) == Dataset(read_file(dialogue_file), encoder_of(base_dir), seed=7).order(1)


def test_random_system_prompts_come_at_their_rate_and_only_where_there_is_none(conformance, tmp_path, write_rows):
    plain = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    own = {"messages": [{"role": "system", "content": "Mine."}, *plain["messages"]]}
    file = read_file(write_rows(tmp_path / "data.jsonl", [plain] * 200 + [own] * 20))
    encoder = encoder_of(conformance / "minimind-3-tokenizer")
    tokenizer = Tokenizer(conformance / "minimind-3-tokenizer")
    dataset = Dataset(file, encoder, seed=0, augmentation=Augmentation(system_prompt=0.2, drop_empty_think=0.8))
    texts = [
        [tokenizer.decode(dataset.sample(epoch, row).input_ids.tolist()) for row in range(220)] for epoch in (0, 1)
    ]
    assert texts[0] != texts[1]  # drawn anew in each epoch
    assert 20 <= sum(text.startswith("system\n") for text in texts[0][:200]) <= 60
    assert 20 <= sum("<think>" in text for text in texts[0][:200]) <= 60
    assert all(text.count("system\n") == 1 and "Mine." in text for text in texts[0][200:])
    again = Dataset(file, encoder, seed=0, augmentation=Augmentation(system_prompt=0.2, drop_empty_think=0.8))
    assert texts[1] == [tokenizer.decode(again.sample(1, row).input_ids.tolist()) for row in range(220)]


def test_an_augmented_sample_that_no_longer_fits_is_taken_as_it_was(base_dir, dialogue_file):
    file = read_file(dialogue_file)
    longest = max(len(sample.input_ids) for sample in encoder_of(base_dir).encode_file(file)[0])
    encoder = encoder_of(base_dir, context=longest)
    always = Augmentation(system_prompt=1.0)
    dataset = Dataset(file, encoder, seed=0, augmentation=always)
    plain = Dataset(file, encoder, seed=0)
    changed = [not dataset.sample(0, row).input_ids.equal(plain.sample(0, row).input_ids) for row in range(14)]
    assert any(changed)
    assert all(dataset.sample(0, row).supervised[1:].any() for row in range(14))
    rng = random.Random(0)
    assert encoder_of(base_dir, context=12).encode_augmented(file.dialogues[0], always, rng) is None
