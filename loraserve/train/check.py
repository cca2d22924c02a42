"""`python -m loraserve.train.check FILE...`: whether every row of training files can be used.

For whoever wants to know before a run begins, in a process that is small and ends. Prints `error: ...` as `loraserve
train` would, and returns 1, if a file cannot be used. What takes a base's tokenizer to know is not looked for.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from loraserve.errors import DataError
from loraserve.train.rows import read_file


def main(files: Sequence[str]) -> int:
    failed = False
    for file in files:
        try:
            print(f"{file}: {len(read_file(Path(file)).dialogues)} dialogues")
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
