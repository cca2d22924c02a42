"""What every engine under test does: read a case per line of stdin, run it, print its figures as a line of JSON.

Each contestant is a process of its own, so that memory is its own and no import of one slows the other.
"""

import argparse
import json
import random
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Case:
    """`clients` requests at once, over `adapters` distinct adapters in turn (0 is the base)."""

    clients: int
    adapters: int
    prompt: int = 64
    new: int = 128
    seed: int = 0

    def prompts(self, vocab: int = 6400) -> list[list[int]]:
        rng = random.Random(self.seed)
        return [[rng.randrange(100, vocab) for _ in range(self.prompt)] for _ in range(self.clients)]


@dataclass(frozen=True)
class Timing:
    """Wall time of a case and, per request, the time to its first token, in seconds."""

    seconds: float
    first_token: list[float]


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", required=True)
    parser.add_argument("--dtype", required=True)
    return parser.parse_args()


def compete(run: Callable[[Case], Timing]) -> None:
    """Serve cases from stdin until it ends."""
    for line in sys.stdin:
        case = Case(**json.loads(line))
        timing = run(case)
        figures = asdict(case) | {
            "tokens_per_s": case.clients * case.new / timing.seconds,
            "ttft_ms": statistics.median(timing.first_token) * 1e3,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        print(json.dumps(figures), flush=True)
