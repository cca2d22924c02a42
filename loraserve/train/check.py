"""`python -m loraserve.train.check FILE...`: whether every row of training files can be used.

For whoever wants to know before a run begins, in a process that is small and ends. Prints `error: ...` as `loraserve
train` would, and returns 1, if a file cannot be used. What takes a base's tokenizer to know is not looked for.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from loraserve.errors import DataError
from loraserve.train.dialogue import EXAMPLE, read_dialogue
from loraserve.train.rows import BadRow, DataFile, Rejections
from loraserve.train.tokens import refusal


def check(path: Path) -> int:
    """Return the number of dialogues in a file. Raises DataError if a row cannot be used, or there is none."""
    data, rejections, accepted = DataFile(path), Rejections(), 0
    for row in data.rows():
        try:
            read_dialogue(row)
            accepted += 1
        except BadRow as why:
            rejections.add(row.line, str(why))
    if not accepted + rejections.rows:
        raise DataError(f"{path} is empty; write one dialogue per line, like {EXAMPLE}", param="data")
    if error := refusal(data.name, rejections, accepted, "stop"):
        raise error
    return accepted


def main(files: Sequence[str]) -> int:
    failed = False
    for file in files:
        try:
            print(f"{file}: {check(Path(file))} dialogues")
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
