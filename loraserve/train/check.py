"""`python -m loraserve.train.check [--pairs] FILE...`: whether every row of training files can be used.

For whoever wants to know before a run begins, in a process that is small and ends. Prints `error: ...` as `loraserve
train` would, and returns 1, if a file cannot be used. What takes a base's tokenizer to know is not looked for.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from loraserve.errors import DataError
from loraserve.train.dialogue import EXAMPLE, read_dialogue
from loraserve.train.pairs import PAIR_EXAMPLE, read_pair
from loraserve.train.rows import BadRow, DataFile, Rejections, Row

PAIRS = "--pairs"


def main(arguments: Sequence[str]) -> int:
    pairs, failed = PAIRS in arguments, False
    for file in (argument for argument in arguments if argument != PAIRS):
        try:
            print(f"{file}: {check(Path(file), pairs)} {'preference pairs' if pairs else 'dialogues'}")
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    return int(failed)


def check(path: Path, pairs: bool = False) -> int:
    """Count the dialogues of a file, or the preference pairs.

    Raises DataError if there are none, or a row is none; it names every such row.
    """
    data, rejections, count = DataFile(path), Rejections(), 0
    read: Callable[[Row], object] = read_pair if pairs else read_dialogue
    for row in data.rows():
        count += 1
        try:
            read(row)
        except BadRow as error:
            rejections.add(row.line, str(error))
    if not count:
        raise DataError(f"{data.name} is empty; write one per line, like {PAIR_EXAMPLE if pairs else EXAMPLE}")
    if rejections.rows:
        rows = f"{rejections.rows:,} {'row' if rejections.rows == 1 else 'rows'}"
        raise DataError(f"{data.name}: {rows} cannot be used: {rejections}")
    return count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
