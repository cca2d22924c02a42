"""What is in a training file, counted row by row: `loraserve train --dry-run`.

Memory holds 24 bytes per row (a length and two hashes), so that quantiles and duplicates are exact.
"""

import hashlib
import json
from array import array
from collections import Counter
from typing import Any

import numpy as np

from loraserve.train.data import Encoder
from loraserve.train.dataset import num_held_out
from loraserve.train.dialogue import Dialogue, Message
from loraserve.train.options import TrainOptions
from loraserve.train.rows import DataFile, Rejections
from loraserve.train.tokens import Note, examine

NUM_BINS = 10


class Survey:
    """Counts over the rows of a file."""

    def __init__(self) -> None:
        self.rejections = Rejections()
        self.formats: Counter[str] = Counter()
        self.turns: Counter[int] = Counter()
        """Rows by how often the assistant speaks."""
        self.left_out: Counter[str] = Counter()
        self.supervised = self.truncated = self.tokens_cut = 0
        self._lengths, self._whole, self._prompts = array("q"), array("Q"), array("Q")

    def read(self, data: DataFile, encoder: Encoder, note: Note, *, pairs: bool = False) -> "Survey":
        """Count every row of a file, both dialogues of a pair together; see `examine` for what it raises."""
        for result in examine(data, encoder, self.rejections, note, pairs=pairs):
            if isinstance(result, tuple):
                continue
            dialogue, encodings = result.dialogue, result.encodings
            self.formats[dialogue.format] += 1
            answers = [i for i, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
            self.turns[len(answers)] += 1
            self.left_out.update({field for encoding in encodings for field in encoding.left_out})
            self.supervised += sum(sum(encoding.supervised[1:]) for encoding in encodings)
            self.truncated += any(encoding.num_cut for encoding in encodings)
            self.tokens_cut += sum(encoding.num_cut for encoding in encodings)
            self._lengths.append(sum(len(encoding.input_ids) for encoding in encodings))
            rejected = [{"rejected": result.rejected.input_ids}] if result.rejected else []
            self._whole.append(_hash(dialogue, [*dialogue.messages, *rejected]))
            self._prompts.append(_hash(dialogue, dialogue.messages[: answers[-1]]))
        return self

    @property
    def accepted(self) -> int:
        return len(self._lengths)

    def longest(self, count: int) -> list[int]:
        """Tokens of the longest `count` rows, in order."""
        return sorted(self._lengths)[-count:]

    def facts(self) -> dict[str, Any]:
        """All counts, as JSON has them."""
        lengths = np.array(self._lengths, np.int64)
        return {
            "rows": self.accepted + self.rejections.rows,
            "accepted": self.accepted,
            "rejected": self.rejections.rows,
            "reasons": [
                {"reason": why, "rows": reason.rows, "first_lines": reason.lines}
                for why, reason in self.rejections.reasons.items()
            ],
            "rejected_otherwise": self.rejections.others,
            "formats": dict(self.formats.most_common()),
            "answers_per_row": {str(turns): rows for turns, rows in sorted(self.turns.items())},
            "tokens": int(lengths.sum()),
            "supervised_tokens": self.supervised,
            "truncated": self.truncated,
            "tokens_cut": self.tokens_cut,
            "lengths": _quantiles(lengths),
            "histogram": _histogram(lengths),
            "not_in_template": dict(self.left_out),
            **self._repetitions(),
        }

    def _repetitions(self) -> dict[str, int]:
        """`duplicates`: rows that repeat an earlier one. `ambiguous_*`: the same prompt with different answers."""
        whole, first = np.unique(np.array(self._whole, np.uint64), return_index=True)
        prompts, answers = np.unique(np.array(self._prompts, np.uint64)[first], return_counts=True)
        ambiguous = prompts[answers > 1]
        return {
            "duplicates": self.accepted - len(whole),
            "ambiguous_prompts": len(ambiguous),
            "ambiguous_rows": int(np.isin(np.array(self._prompts, np.uint64), ambiguous).sum()),
        }


def planned_steps(options: TrainOptions, rows: int) -> dict[str, int]:
    """How a run goes through `rows` accepted rows."""
    held_out = num_held_out(rows, options.val_split)
    per_epoch = options.steps_per_epoch(rows - held_out)
    updates = -(-per_epoch // options.accumulation_steps)
    return {
        "train_rows": rows - held_out,
        "val_rows": held_out,
        "batch_size": options.batch_size,
        "accumulation_steps": options.accumulation_steps,
        "epochs": options.epochs,
        "steps_per_epoch": per_epoch,
        "steps": per_epoch * options.epochs,
        "updates": updates * options.epochs,
    }


def _hash(dialogue: Dialogue, messages: list[Message]) -> int:
    text = json.dumps([messages, dialogue.tools], sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    ranks = {"shortest": 0.0, "median": 0.5, "p95": 0.95, "longest": 1.0}
    return {name: int(np.quantile(lengths, rank, method="higher")) for name, rank in ranks.items()}


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Rows by length, in at most ten bins as wide as 1, 2 or 5 times a power of ten."""
    if not len(lengths):
        return []
    widths = (digit * 10**power for power in range(18) for digit in (1, 2, 5))
    width = next(width for width in widths if lengths.max() // width - lengths.min() // width < NUM_BINS)
    lowest = int(lengths.min() // width)
    counts = np.bincount(lengths // width - lowest)
    return [
        {"from": (lowest + i) * width, "to": (lowest + i + 1) * width - 1, "rows": int(rows)}
        for i, rows in enumerate(counts)
    ]
