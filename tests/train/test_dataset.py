import random
import shutil
from pathlib import Path

from safetensors.torch import load_file

from loraserve.base.tokenizer import Tokenizer
from loraserve.train.data import Augmentation
from loraserve.train.dataset import Dataset
from loraserve.train.rows import DataFile
from loraserve.train.tokens import tokenize
from tests.train.conftest import dataset_of
from tests.train.test_data import encoder_of


def questions(dataset):
    return [dialogue.messages[0]["content"] for dialogue in dataset.dialogues()]


def test_samples_and_epoch_order_are_those_of_miniminds_own_loader(conformance, tmp_path):
    """Catches a label, a token or a row in another place than upstream puts it."""
    folder = conformance / "minimind-3-train"
    encoder = encoder_of(conformance / "minimind-3-tokenizer", max_seq_len=128)
    dataset = dataset_of(Path(shutil.copy(folder / "train.jsonl", tmp_path)), encoder, seed=42)
    batches = load_file(folder / "batches.safetensors")
    for epoch in range(2):
        for place, row in enumerate(dataset.order(epoch).tolist()):
            step, line = divmod(epoch * 96 + place, 8)
            ids, labels = batches[f"input_ids.{step}"][line], batches[f"labels.{step}"][line]
            sample = dataset.sample(epoch, row)
            length = len(sample.input_ids)
            assert ids[:length].equal(sample.input_ids.to(ids.dtype)) and not ids[length:].any()
            assert labels[:length].ne(-100).equal(sample.supervised) and labels[length:].eq(-100).all()


def test_validation_rows_are_held_out_and_the_split_is_the_same_each_time(base_dir, dialogue_file):
    encoder = encoder_of(base_dir)
    first, second = (dataset_of(dialogue_file, encoder, seed=1, val_split=0.2) for _ in range(2))
    everything = dataset_of(dialogue_file, encoder, seed=1)
    assert len(first) == 11 and first.num_val == 3 and len(everything) == 14 and everything.num_val == 0

    def seen(dataset):
        samples = [dataset.sample(0, row) for row in range(len(dataset))]
        held_out = [dataset.val_sample(row) for row in range(dataset.num_val)]
        return [[tuple(sample.input_ids.tolist()) for sample in each] for each in (samples, held_out)]

    assert (
        sorted([*seen(first)[0], *seen(first)[1]]) == sorted(seen(everything)[0]) and len({*seen(everything)[0]}) == 14
    )
    assert seen(first) == seen(second) and questions(first) == questions(second)
    assert len(questions(first)) == 3 and len(questions(everything)) == 14
    assert questions(first) != questions(dataset_of(dialogue_file, encoder, seed=3, val_split=0.2))
    assert dataset_of(dialogue_file, encoder, seed=1, val_split=0.001).num_val == 1
    assert len(dataset_of(dialogue_file, encoder, seed=1, val_split=0.99)) == 1


def test_validation_rows_may_come_from_a_file_of_their_own(base_dir, dialogue_file, write_rows, tmp_path):
    row = {"messages": [{"role": "user", "content": "Only here?"}, {"role": "assistant", "content": "Yes."}]}
    encoder, val_data = encoder_of(base_dir), DataFile(write_rows(tmp_path / "val.jsonl", [row]))
    val_tokens = tokenize(val_data, encoder, tmp_path / "val", "stop", print)
    data = DataFile(dialogue_file)
    tokens = tokenize(data, encoder, tmp_path / "train", "stop", print)
    dataset = Dataset(data, tokens, encoder, seed=1, validation=(val_data, val_tokens))
    assert len(dataset) == 14 and dataset.num_val == 1, "nothing is held out"
    assert questions(dataset) == ["Only here?"]
    assert dataset.val_sample(0).input_ids.equal(val_tokens.sample(0).input_ids)
    assert not any(dataset.sample(0, i).input_ids.equal(val_tokens.sample(0).input_ids) for i in range(14))


def test_each_epoch_has_its_own_order_and_sees_every_row(base_dir, dialogue_file):
    dataset = dataset_of(dialogue_file, encoder_of(base_dir), seed=7)
    first, second = dataset.order(0).tolist(), dataset.order(1).tolist()
    assert first != second
    assert sorted(first) == sorted(second) == list(range(14))
    assert second == dataset_of(dialogue_file, encoder_of(base_dir), seed=7).order(1).tolist()


def test_random_system_prompts_come_at_their_rate_and_only_where_there_is_none(conformance, tmp_path, write_rows):
    plain = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    own = {"messages": [{"role": "system", "content": "Mine."}, *plain["messages"]]}
    file = write_rows(tmp_path / "data.jsonl", [plain] * 200 + [own] * 20)
    encoder = encoder_of(conformance / "minimind-3-tokenizer")
    tokenizer = Tokenizer(conformance / "minimind-3-tokenizer")
    dataset = dataset_of(file, encoder, seed=0, augmentation=Augmentation(system_prompt=0.2, drop_empty_think=0.8))
    texts = [
        [tokenizer.decode(dataset.sample(epoch, row).input_ids.tolist()) for row in range(220)] for epoch in (0, 1)
    ]
    assert texts[0] != texts[1]  # drawn anew in each epoch
    assert 20 <= sum(text.startswith("system\n") for text in texts[0][:200]) <= 60
    assert 20 <= sum("<think>" in text for text in texts[0][:200]) <= 60
    assert all(text.count("system\n") == 1 and "Mine." in text for text in texts[0][200:])
    again = dataset_of(file, encoder, seed=0, augmentation=Augmentation(system_prompt=0.2, drop_empty_think=0.8))
    assert texts[1] == [tokenizer.decode(again.sample(1, row).input_ids.tolist()) for row in range(220)]


def test_an_augmented_sample_that_no_longer_fits_is_taken_as_it_was(base_dir, dialogue_file):
    plain = dataset_of(dialogue_file, encoder_of(base_dir))
    longest = max(len(plain.sample(0, row).input_ids) for row in range(14))
    encoder = encoder_of(base_dir, context=longest)
    always = Augmentation(system_prompt=1.0)
    dataset = dataset_of(dialogue_file, encoder, augmentation=always)
    changed = [not dataset.sample(0, row).input_ids.equal(plain.sample(0, row).input_ids) for row in range(14)]
    assert any(changed)
    assert all(dataset.sample(0, row).supervised[1:].any() for row in range(14))
    first = next(iter(dataset.dialogues()))
    assert encoder_of(base_dir, context=12).encode_augmented(first, always, random.Random(0)) is None
