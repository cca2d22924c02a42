"""What every engine under test speaks: a case per line of stdin, its figures as a line of JSON on stdout.

A contestant brings one function, `serve(requests) -> answers`, that takes all requests at once and notes when each
piece of each answer arrived; prompts and figures are made here, so they are the same for all. Each contestant is a
process of its own: its memory is its own, and no import of one slows another. Standard library only, for a peer's
interpreter loads this file by its path.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TextIO

VOCAB = range(259, 6400)
"""Ids that prompts are made of, and the only ones that the benchmark's base answers with: two letters each."""
COLD_ADAPTERS = 3
"""Adapters never touched before that one run of a cold case needs."""


@dataclass(frozen=True)
class Case:
    """`clients` requests at once, over `adapters` distinct adapters in turn (0 is the base).

    idle: adapters that are loaded, for each has answered before, and that nobody asks meanwhile.
    kind: `batch` is just that. `cold` asks one client at a time, an adapter in use and one never touched in turn.
        `conversation` asks, and then asks again with what was said and `question` tokens more as the prompt.
    family: adapters are named by it and a number.
    """

    name: str
    clients: int
    adapters: int
    idle: int = 0
    prompt: int = 64
    new: int = 128
    kind: str = "batch"
    question: int = 32
    family: str = "a"
    seed: int = 0

    @property
    def length(self) -> int:
        """Tokens of the longest prompt and its answer."""
        again = self.new + self.question if self.kind == "conversation" else 0
        return self.prompt + self.new + again


@dataclass(frozen=True)
class Request:
    """Token ids, how many to add to them, and the adapter's name; None is the base."""

    prompt: list[int]
    new: int
    adapter: str | None


@dataclass(frozen=True)
class Answer:
    """Token ids, and when (`time.perf_counter`) each piece of them arrived."""

    token_ids: list[int]
    times: list[float]


Serve = Callable[[list[Request]], list[Answer]]


def arguments(description: str) -> tuple[argparse.Namespace, TextIO]:
    """Return what the benchmark asks of a contestant, and where to write: anything else printed goes to stderr."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base", required=True, help="a Hugging Face directory")
    parser.add_argument("--adapters", required=True, help="a directory of PEFT directories")
    parser.add_argument("--num-adapters", type=int, required=True, help="how many of them will be asked for")
    parser.add_argument("--r", type=int, required=True, help="their highest rank")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--deterministic", action="store_true", help="for loraserve: tokens do not depend on the batch")
    parser.add_argument("--server", help="for those over HTTP: how to start it, as JSON")
    args = parser.parse_args()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return args, channel


def compete(serve: Serve, channel: TextIO, *, version: str, pid: int | None = None) -> None:
    """Say that all is loaded, then run cases from stdin until it ends.

    Args:
        pid: the process whose memory counts, children included; by default this one.
    """
    print(json.dumps({"version": version, "pid": pid or os.getpid()}), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(play(Case(**json.loads(line)), serve)), file=channel, flush=True)


def play(case: Case, serve: Serve) -> dict[str, Any]:
    """Run a case and return its figures; times are in milliseconds."""
    rng = random.Random(f"{case.name} {case.seed}")
    if case.idle:
        serve([Request(_tokens(rng, case.prompt), 1, f"{case.family}{case.adapters + i}") for i in range(case.idle)])
    if case.kind == "cold":
        return asdict(case) | _play_cold(case, serve, rng)
    if case.kind == "conversation":
        return asdict(case) | _play_conversation(case, serve, rng)
    names = [f"{case.family}{i % case.adapters}" if case.adapters else None for i in range(case.clients)]
    return asdict(case) | _timed(serve, [Request(_tokens(rng, case.prompt), case.new, name) for name in names])[0]


def _play_cold(case: Case, serve: Serve, rng: random.Random) -> dict[str, Any]:
    """TTFT is that of adapters never touched; `warm_ttft_ms` is that of one in use, `cold_ms` the difference."""

    def ask(adapter: str) -> dict[str, Any]:
        return _timed(serve, [Request(_tokens(rng, case.prompt), case.new, adapter)])[0]

    warm_name = f"{case.family}0"
    ask(warm_name)
    pairs = [
        (ask(warm_name), ask(f"cold{i}")) for i in range(case.seed * COLD_ADAPTERS, (case.seed + 1) * COLD_ADAPTERS)
    ]
    keys = [key for key in pairs[0][1] if key != "digest"]
    figures = {key: statistics.median(cold[key] for _, cold in pairs) for key in keys}
    figures["digest"] = pairs[-1][1]["digest"]
    warm = statistics.median(warm["ttft_ms"] for warm, _ in pairs)
    return figures | {"warm_ttft_ms": warm, "cold_ms": figures["ttft_ms"] - warm}


def _play_conversation(case: Case, serve: Serve, rng: random.Random) -> dict[str, Any]:
    """TTFT is that of the second turn; `first_ttft_ms` is that of the first."""
    history, name = _tokens(rng, case.prompt), f"{case.family}0" if case.adapters else None
    first, answers = _timed(serve, [Request(history, case.new, name)])
    again = history + answers[0].token_ids + _tokens(rng, case.question)
    second, _ = _timed(serve, [Request(again, case.new, name)])
    return second | {"first_ttft_ms": first["ttft_ms"]}


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.choice(VOCAB) for _ in range(count)]


def _timed(serve: Serve, requests: list[Request]) -> tuple[dict[str, Any], list[Answer]]:
    """All requests are sent at the same moment, and every time counts from then, to the last piece of all answers.

    `digest` is of all answers' tokens.
    """
    started = time.perf_counter()
    answers = serve(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert len(answer.token_ids) == request.new, f"{len(answer.token_ids)} tokens instead of {request.new}"
    seconds = max(answer.times[-1] for answer in answers) - started
    firsts = [answer.times[0] - started for answer in answers]
    gaps = [b - a for answer in answers for a, b in pairwise(answer.times)]
    tokens = sum(len(answer.token_ids) for answer in answers)
    said = json.dumps([answer.token_ids for answer in answers]).encode()
    return {
        "digest": hashlib.sha256(said).hexdigest()[:12],
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "ttft_ms": statistics.median(firsts) * 1e3,
        "ttft_p95_ms": _p95(firsts) * 1e3,
        "itl_ms": statistics.median(gaps or [0.0]) * 1e3,
        "itl_p95_ms": _p95(gaps or [0.0]) * 1e3,
    }, answers


def _p95(values: Iterable[float]) -> float:
    """The smallest value that at least 95% are not above."""
    ordered = sorted(values)
    return ordered[-(-95 * len(ordered) // 100) - 1]
