"""Which process of a run this is, as torchrun says it by environment variables; without torch.

RANK, WORLD_SIZE            which one, from 0, and how many there are
LOCAL_RANK                  which one on this machine, whose GPU it takes
MASTER_ADDR, MASTER_PORT    where they meet
"""

import os

from loraserve.errors import InvalidRequest

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank_and_size() -> tuple[int, int]:
    """This process and the number of all; (0, 1) where nobody speaks of several.

    Raises:
        InvalidRequest: there are several, or may be, and variables are missing or no numbers.
    """
    size = os.environ.get("WORLD_SIZE")
    if size == "1" or (size is None and "RANK" not in os.environ):
        return 0, 1
    given, missing = ([n for n in NEEDED if (n in os.environ) == there] for there in (True, False))
    if missing:
        raise InvalidRequest(
            f"the environment has {', '.join(given)} and not {', '.join(missing)}: start several processes with "
            "torchrun, or unset RANK and WORLD_SIZE to train with one"
        )
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InvalidRequest(f"the environment's RANK={rank} and WORLD_SIZE={size} are no process of a run")
    return int(rank), int(size)


def outside_of_runs() -> dict[str, str]:
    """The environment for a process that trains alone, whatever this one is a part of."""
    return {name: value for name, value in os.environ.items() if name not in VARIABLES}
