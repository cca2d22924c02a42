"""The token ids of a training file on disk, so that a run needs neither its text nor its tokens in memory.

    <run's folder>/tokens/
        ids.bin      int32, all rows end to end; a supervised token t is stored as ~t, which is below 0
        rows.bin     per row 5 int64: line, offset and length in the data file, first token, number of tokens;
                     of preference pairs two, the chosen dialogue's and the rejected one's
        facts.json   what they were made from, and what was found on the way
    <run's folder>/rejected.jsonl    rows that were left out, in full

Made in one pass that checks every row. The folder appears whole or not at all, and is used again only for the same
data, tokenizer, template and limit. Rows are read with `pread` as they are needed; the system keeps what is read often.
"""

import json
import os
import shutil
import struct
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from loraserve.errors import DataError
from loraserve.lora.files import storage_errors, sync_directory
from loraserve.train.data import Encoder, Encoding, Sample
from loraserve.train.dialogue import EXAMPLE, Dialogue, read_dialogue
from loraserve.train.pairs import PAIR_EXAMPLE, encode_pair, read_pair
from loraserve.train.rows import BadRow, DataFile, Reason, Rejections, Row

VERSION = 2
TOKENS, REJECTED = "tokens", "rejected.jsonl"
IDS, ROWS, FACTS = "ids.bin", "rows.bin", "facts.json"
ON_BAD_ROW = ("stop", "skip")
SECONDS_BETWEEN_NOTES = 10.0
_PLACE = struct.Struct("<5q")

Note = Callable[[str], None]


@dataclass(frozen=True)
class Example:
    """A row that can be trained on."""

    row: Row
    dialogue: Dialogue
    encoding: Encoding
    rejected: Encoding | None = None
    """Of a preference pair; the dialogue is then the chosen one."""

    @property
    def encodings(self) -> list[Encoding]:
        return [self.encoding] if self.rejected is None else [self.encoding, self.rejected]


def examine(
    data: DataFile, encoder: Encoder, rejections: Rejections, note: Note, *, pairs: bool = False
) -> Iterator[Example | tuple[Row, str]]:
    """Read and encode every row of a file once.

    Args:
        rejections: gets every row that cannot be used.
        note: gets a line every ten seconds.
        pairs: whether rows are preference pairs and not dialogues.

    Yields:
        an Example, or a row and why it cannot be used.

    Raises:
        DataError: the file is empty.
    """
    count, due = 0, time.monotonic() + SECONDS_BETWEEN_NOTES
    for count, row in enumerate(data.rows(), start=1):
        try:
            result: Example | tuple[Row, str] = _pair(row, encoder) if pairs else _dialogue(row, encoder)
        except BadRow as error:
            rejections.add(row.line, str(error))
            result = row, str(error)
        yield result
        if time.monotonic() > due:
            due = time.monotonic() + SECONDS_BETWEEN_NOTES
            note(f"read {count:,} rows, {100 * row.offset // data.num_bytes}% of {data.name}")
    if not count:
        what, example = ("pair", PAIR_EXAMPLE) if pairs else ("dialogue", EXAMPLE)
        raise DataError(f"{data.path} is empty; write one {what} per line, like {example}", param="data")


def _dialogue(row: Row, encoder: Encoder) -> Example:
    dialogue = read_dialogue(row)
    return Example(row, dialogue, encoder.encode(dialogue))


def _pair(row: Row, encoder: Encoder) -> Example:
    pair = read_pair(row)
    return Example(row, pair.chosen, *encode_pair(encoder, pair))


def refusal(name: str, rejections: Rejections, accepted: int, on_bad_row: str) -> DataError | None:
    """The error that ends a run on these data, or None."""
    count = f"{rejections.rows:,} {'row' if rejections.rows == 1 else 'rows'}"
    if not accepted:
        return DataError(f"{name}: no row can be used; {count} cannot be used: {rejections}", param="data")
    if rejections.rows and on_bad_row == "stop":
        advice = "correct them, or train on the rest with --on-bad-row skip"
        return DataError(f"{name}: {count} cannot be used: {rejections}; {advice}", param="data")
    return None


@dataclass(frozen=True)
class Facts:
    """What a pass over a file found."""

    key: str
    rows: int
    """That can be trained on."""
    tokens: int
    truncated: int
    """Rows cut at --max-seq-len."""
    left_out: dict[str, int]
    """Rows by the field of theirs that the template does not show."""
    rejections: Rejections
    samples_per_row: int
    """1, and 2 of preference pairs."""


class TokenFile:
    """The rows of a training file as samples."""

    def __init__(self, folder: Path, facts: Facts) -> None:
        self.facts = facts
        self._ids, self._rows = (os.open(folder / name, os.O_RDONLY) for name in (IDS, ROWS))
        for descriptor in (self._ids, self._rows):
            weakref.finalize(self, os.close, descriptor)

    def __len__(self) -> int:
        return self.facts.rows

    def sample(self, row: int) -> Sample:
        """Read the sample of a row, counted from 0 among those that can be trained on; of a pair the chosen one."""
        return self.samples(row)[0]

    def samples(self, row: int) -> list[Sample]:
        """Read all samples of a row: of a pair the chosen and the rejected one."""
        per_row = self.facts.samples_per_row
        return [self._sample(per_row * row + which) for which in range(per_row)]

    def _sample(self, index: int) -> Sample:
        *_, first, count = self._place(index)
        codes = torch.frombuffer(bytearray(os.pread(self._ids, 4 * count, 4 * first)), dtype=torch.int32)  # (T,)
        supervised = codes < 0
        return Sample(torch.where(supervised, ~codes, codes), supervised)

    def lengths(self) -> np.ndarray:
        """The number of tokens of each row, of a pair in both, (N,) int64."""
        per_row = self.facts.samples_per_row
        places = os.pread(self._rows, _PLACE.size * per_row * len(self), 0)
        return np.frombuffer(places, np.int64).reshape(len(self), per_row, -1)[:, :, -1].sum(axis=1)

    def place(self, row: int) -> tuple[int, int, int]:
        """Line, offset and length of a row in the data file."""
        return self._place(self.facts.samples_per_row * row)[:3]

    def _place(self, index: int) -> tuple[int, int, int, int, int]:
        return _PLACE.unpack(os.pread(self._rows, _PLACE.size, _PLACE.size * index))


def tokenize(
    data: DataFile, encoder: Encoder, folder: Path, on_bad_row: str, note: Note, *, pairs: bool = False
) -> TokenFile:
    """Return the tokens of a file from the run's folder, made now if they are not there.

    Args:
        on_bad_row: `stop`, or `skip` to leave bad rows out and write them to `rejected.jsonl`.
        pairs: whether rows are preference pairs and not dialogues.

    Raises:
        DataError: the file is empty; there are bad rows and they are not skipped, or no others.
        StorageError: the tokens could not be written; the folder is as it was.
    """
    key = f"{VERSION} {data.sha256} {encoder.digest}{' pairs' if pairs else ''}"
    facts = _read_facts(folder / TOKENS, key)
    if facts is None:
        with storage_errors(f"keep the tokens of {data.name} in {folder}, give another place with --save-dir"):
            folder.mkdir(parents=True, exist_ok=True)
            with _scratch(folder) as scratch:
                facts = _write(scratch, key, data, encoder, on_bad_row, note, pairs)
                rejected, target = folder / REJECTED, folder / TOKENS
                rejected.unlink(missing_ok=True)
                if facts.rejections.rows:
                    os.replace(scratch / REJECTED, rejected)
                shutil.rmtree(target, ignore_errors=True)
                os.rename(scratch, target)
            sync_directory(folder)
    elif error := refusal(data.name, facts.rejections, facts.rows, on_bad_row):
        raise error
    return TokenFile(folder / TOKENS, facts)


def discard_tokens(folder: Path) -> None:
    """Remove the tokens in a run's folder and what a killed run left of them; rejected rows stay."""
    for path in (folder / TOKENS, *folder.glob(f".{TOKENS}.*")):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    scratch = folder / f".{TOKENS}.{uuid.uuid4().hex[:8]}"
    try:
        scratch.mkdir()
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(folder: Path, key: str, data: DataFile, encoder: Encoder, on_bad_row: str, note: Note, pairs: bool) -> Facts:
    rejections, left_out = Rejections(), Counter[str]()
    rows = tokens = truncated = 0
    with (folder / IDS).open("wb") as ids, (folder / ROWS).open("wb") as places, (folder / REJECTED).open("wb") as bad:
        for result in examine(data, encoder, rejections, note, pairs=pairs):
            if isinstance(result, tuple):
                row, why = result
                entry = {
                    "line": row.line,
                    "reason": why,
                    "row": row.raw.decode("utf-8-sig", "backslashreplace").strip(),
                }
                bad.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
                continue
            row = result.row
            for encoding in result.encodings:
                codes = np.array(encoding.input_ids, np.int32) ^ -np.array(
                    encoding.supervised, np.int32
                )  # x ^ -1 is ~x
                ids.write(codes.tobytes())
                places.write(_PLACE.pack(row.line, row.offset, len(row.raw), tokens, len(codes)))
                tokens += len(codes)
            rows += 1
            truncated += any(encoding.num_cut for encoding in result.encodings)
            left_out.update({field for encoding in result.encodings for field in encoding.left_out})
        if error := refusal(data.name, rejections, rows, on_bad_row):
            raise error
        for file in (ids, places, bad):
            _sync(file)
    facts = Facts(key, rows, tokens, truncated, dict(left_out), rejections, 2 if pairs else 1)
    with (folder / FACTS).open("wb") as file:
        file.write(json.dumps(asdict(facts)).encode())
        _sync(file)
    sync_directory(folder)
    return facts


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read_facts(folder: Path, key: str) -> Facts | None:
    """The facts of tokens made from what `key` names; None if there are none, or not all of them."""
    try:
        values: dict[str, Any] = json.loads((folder / FACTS).read_bytes())
        if values["key"] != key:
            return None
        bad = values.pop("rejections")
        reasons = {why: Reason(**reason) for why, reason in bad["reasons"].items()}
        facts = Facts(**values, rejections=Rejections(bad["rows"], reasons, bad["others"]))
        whole = (folder / IDS).stat().st_size == 4 * facts.tokens
        places = _PLACE.size * facts.samples_per_row * facts.rows
        return facts if whole and (folder / ROWS).stat().st_size == places else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
