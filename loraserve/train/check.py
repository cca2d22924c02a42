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


def main(files: Sequence[str]) -> int:
    failed = False
    for file in files:
        try:
            print(f"{file}: {check(Path(file))} dialogues")
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    return int(failed)


def check(path: Path) -> int:
    """Count the dialogues of a file. Raises DataError if there are none, or a row is none; it names every such row."""
    data, rejections, count = DataFile(path), Rejections(), 0
    for row in data.rows():
        count += 1
        try:
            read_dialogue(row)
        except BadRow as error:
            rejections.add(row.line, str(error))
    if not count:
        raise DataError(f"{data.name} is empty; write one dialogue per line, like {EXAMPLE}")
    if rejections.rows:
        rows = f"{rejections.rows:,} {'row' if rejections.rows == 1 else 'rows'}"
        raise DataError(f"{data.name}: {rows} cannot be used: {rejections}")
    return count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
