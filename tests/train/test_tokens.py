import errno
import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from loraserve.errors import DataError, StorageError
from loraserve.train import tokens as tokens_module
from loraserve.train.data import Augmentation
from loraserve.train.rows import DataFile
from loraserve.train.tokens import TOKENS, tokenize
from tests.train.conftest import dataset_of
from tests.train.test_data import encoder_of

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "你好, hello!"}]}
BAD = ['{"messages": [', '{"text": "x"}', b'\xff"', json.dumps({"messages": GOOD["messages"][:1]})]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Three good rows, and four bad ones at lines 2, 3, 5 and 6."""
    good = json.dumps(GOOD)
    lines = [good, BAD[0], BAD[1], good, BAD[2], BAD[3], good]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def tokens_of(path: Path, base_dir: Path, on_bad_row: str = "stop", **settings):
    return tokenize(DataFile(path), encoder_of(base_dir, **settings), path.parent / "run", on_bad_row, print)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} if folder.exists() else set()


def test_samples_come_back_from_disk_as_they_were_encoded(base_dir, dialogue_file):
    encoder = encoder_of(base_dir)
    tokens = tokens_of(dialogue_file, base_dir)
    examples = list(tokens_module.examine(DataFile(dialogue_file), encoder, tokens.facts.rejections, print))
    assert len(tokens) == len(examples) == 14
    for row, example in enumerate(examples):
        sample = tokens.sample(row)
        assert sample.input_ids.tolist() == example.encoding.input_ids
        assert sample.supervised.tolist() == example.encoding.supervised
        assert tokens.place(row) == (example.row.line, example.row.offset, len(example.row.raw))
    assert {True, False} <= {flag for example in examples for flag in example.encoding.supervised}


def test_bad_rows_are_all_named_and_leave_nothing_behind(base_dir, mixed):
    with pytest.raises(DataError) as caught:
        tokens_of(mixed, base_dir)
    message = str(caught.value)
    assert message.startswith("mixed.jsonl: 4 rows cannot be used: line 2: broken JSON")
    for expected in ("line 3: has neither", "line 5: not UTF-8 (byte 1)", "line 6: nothing to supervise"):
        assert expected in message
    assert message.endswith("; correct them, or train on the rest with --on-bad-row skip")
    assert files(mixed.parent / "run") == set()


def test_skipped_rows_are_kept_in_full_with_line_and_reason(base_dir, mixed):
    tokens = tokens_of(mixed, base_dir, "skip")
    assert len(tokens) == 3 and tokens.facts.rejections.rows == 4
    assert [tokens.place(row)[0] for row in range(3)] == [1, 4, 7]
    rejected = [json.loads(line) for line in (mixed.parent / "run" / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [each["line"] for each in rejected] == [2, 3, 5, 6]
    assert [each["row"] for each in rejected] == [BAD[0], BAD[1], '\\xff"', BAD[3]]
    assert rejected[1]["reason"].startswith("has neither")
    again = tokens_of(mixed, base_dir, "skip")
    assert again.facts == tokens.facts
    with pytest.raises(
        DataError, match="4 rows cannot be used: line 2"
    ):  # the tokens are there; the answer is the same
        tokens_of(mixed, base_dir, "stop")
    mixed.write_text(json.dumps(GOOD))
    assert len(tokens_of(mixed, base_dir)) == 1
    assert "rejected.jsonl" not in files(mixed.parent / "run")


def test_a_file_without_a_good_row_is_refused_even_when_bad_rows_are_skipped(base_dir, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([BAD[0], BAD[1]]))
    with pytest.raises(DataError, match="no row can be used; 2 rows cannot be used: line 1: broken JSON"):
        tokens_of(path, base_dir, "skip")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused_with_an_example(base_dir, tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r'is empty; write one dialogue per line, like \{"conversations"'):
        tokens_of(path, base_dir)


def test_tokens_are_made_once_and_again_only_for_other_data_or_another_limit(base_dir, dialogue_file, monkeypatch):
    made = []
    write = tokens_module._write
    monkeypatch.setattr(tokens_module, "_write", lambda *args: made.append(1) or write(*args))
    tokens_of(dialogue_file, base_dir)
    tokens_of(dialogue_file, base_dir)
    assert len(made) == 1
    assert len(tokens_of(dialogue_file, base_dir, max_seq_len=30).sample(4).input_ids) == 30
    assert len(made) == 2
    dialogue_file.write_text(dialogue_file.read_text("utf-8") + json.dumps(GOOD) + "\n", "utf-8")
    assert len(tokens_of(dialogue_file, base_dir)) == 15 and len(made) == 3
    for name in ("ids.bin", "rows.bin", "facts.json"):  # what a disk's fault has cut short is made again
        path = dialogue_file.parent / "run" / TOKENS / name
        path.write_bytes(path.read_bytes()[:-1])
        assert len(tokens_of(dialogue_file, base_dir)) == 15
    assert len(made) == 6


def test_a_full_disk_is_an_error_that_names_the_remedy_and_leaves_the_old_tokens(base_dir, dialogue_file):
    """Catches half a file that the next run would take for whole."""
    before = tokens_of(dialogue_file, base_dir, max_seq_len=40)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))  # a file may grow no further, as on a full disk
    try:
        with pytest.raises(StorageError, match=r"cannot keep the tokens of robot\.jsonl in .*--save-dir: ") as caught:
            tokens_of(dialogue_file, base_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.__cause__.errno == errno.EFBIG
    run = dialogue_file.parent / "run"
    assert files(run) == {f"{TOKENS}/{name}" for name in ("ids.bin", "rows.bin", "facts.json", "rejected.jsonl")}
    assert tokens_of(dialogue_file, base_dir, max_seq_len=40).facts == before.facts


def test_a_run_killed_while_writing_leaves_nothing_that_is_taken_for_tokens(base_dir, dialogue_file):
    code = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from loraserve.train import tokens
        from tests.train.test_tokens import tokens_of
        tokens.os.rename = lambda *_: os._exit(9)  # killed just before the folder gets its name
        tokens_of(Path(sys.argv[1]), Path(sys.argv[2]))
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, str(dialogue_file), str(base_dir)]
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    run = dialogue_file.parent / "run"
    assert not (run / TOKENS).exists() and any(path.name.startswith(f".{TOKENS}.") for path in run.iterdir())
    assert len(tokens_of(dialogue_file, base_dir)) == 14
    tokens_module.discard_tokens(run)
    assert list(run.iterdir()) == []


PEAK = """
import resource, sys
from pathlib import Path
from loraserve.train.data import Augmentation
from tests.train.conftest import dataset_of
from tests.train.test_data import encoder_of
path, base_dir = Path(sys.argv[1]), Path(sys.argv[2])
dataset = dataset_of(path, encoder_of(base_dir, context=99999), augmentation=Augmentation(system_prompt=0.1))
total = sum(len(dataset.sample(0, row).input_ids) for row in dataset.order(0).tolist())
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
"""


def test_memory_does_not_grow_with_the_file(base_dir, tmp_path):
    """Twenty times the data: 3 MB of text become 9 MB of tokens, which as tensors take 20 MB; memory grows by less than 7."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    row = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab7 " * 250}]})
    figures = []
    for rows in (150, 3000):
        path = tmp_path / f"{rows}.jsonl"
        path.write_text(f"{row}\n" * rows)
        command = [sys.executable, "-c", PEAK, str(path), str(base_dir)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        figures.append([int(value) for value in result.stdout.splitlines()[-1].split()])
        size = sum(f.stat().st_size for f in (tmp_path / f"{rows}.run").rglob("*"))
    (few_tokens, small), (many_tokens, large) = figures
    assert many_tokens > 19 * few_tokens and size > 8e6
    assert large - small < 7 * 1024, f"{small} KiB and {large} KiB, {size} bytes"


def test_a_long_reading_says_how_far_it_is(base_dir, dialogue_file, monkeypatch):
    monkeypatch.setattr(tokens_module, "SECONDS_BETWEEN_NOTES", 0.0)
    notes: list[str] = []
    tokenize(DataFile(dialogue_file), encoder_of(base_dir), dialogue_file.parent / "run", "stop", notes.append)
    assert notes[6].startswith("read 7 rows, ") and notes[6].endswith("% of robot.jsonl")


def test_random_changes_are_made_from_the_row_in_the_file_and_notice_when_it_changes(base_dir, dialogue_file):
    dataset = dataset_of(dialogue_file, encoder_of(base_dir), augmentation=Augmentation(system_prompt=0.5))
    dataset.sample(0, 3)
    with dialogue_file.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="was changed while it was in use"):
        dataset.sample(0, 3)
