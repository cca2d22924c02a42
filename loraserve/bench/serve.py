"""The engine beside its peers: A B A B in one run; medians, and medians of the ratios of each round.

The machine's speed drifts, so a ratio is taken of what stood next to each other, not of two medians.

Contestants are started anew for each number of adapters that they have at hand, so that a peer whose base is slower
with adapters enabled shows its best where none are, and memory is that of what the cases need.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from loraserve.base.config import ModelConfig
from loraserve.bench.contestant import COLD_ADAPTERS, Case
from loraserve.bench.contestants import CONTESTANTS, Contestant, Field, Peers, select
from loraserve.bench.machine import machine
from loraserve.bench.models import make_adapters, make_base, minimind3_config
from loraserve.bench.processes import Process, started
from loraserve.errors import InvalidRequest, did_you_mean

CASES = {
    "base-1": Case("1 client, base", 1, 0),
    "base-16": Case("16 clients, base", 16, 0),
    "long-prompt": Case("long prompt", 1, 0, prompt=1536, new=32),
    "base-16-lora": Case("16 clients, base, 8 adapters loaded", 16, 0, idle=8),
    "one-1": Case("1 client, one adapter", 1, 1),
    "one-16": Case("16 clients, one adapter", 16, 1),
    "mixed-16": Case("16 clients, 8 adapters", 16, 8),
    "cold": Case("cold adapter", 1, 1, new=8, kind="cold"),
    "multi-turn": Case("multi-turn", 1, 1, prompt=512, new=64, kind="conversation"),
    "mixed-256": Case("256 clients, 256 adapters", 256, 256, new=16),
}
"""By what `--cases` calls them; those with the same adapters at hand stand together."""
LOADED = 8
"""Adapters that a contestant has at hand in the cases with adapters, at least."""
RATIOS = ("tokens_per_s", "ttft_ms")
FIGURES = ("tokens", "tokens_per_s", "ttft_ms", "ttft_p95_ms", "itl_ms", "itl_p95_ms", "peak_rss_mb")
OWN_FIGURES = {"cold": ("warm_ttft_ms", "cold_ms"), "conversation": ("first_ttft_ms",)}
"""Of a kind of case, beside those of all."""


def run(
    *,
    cases: Mapping[str, Case] = CASES,
    contestants: Sequence[str] = tuple(CONTESTANTS),
    peers: Peers = Peers(),  # noqa: B008
    repeats: int = 7,
    dtype: str = "bfloat16",
    r: int = 8,
    model: ModelConfig | None = None,
    logs: Path | None = None,
    note: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Measure every case `repeats` times on each contestant that is installed, in turn, after a warm-up.

    Args:
        contestants: names in CONTESTANTS; loraserve always takes part, its server where another does.
        model: shapes of the random base, by default minimind-3's.
        logs: where contestants' output is kept; by default nowhere.
        note: is told of who is skipped and of every case that is done.

    Returns:
        `machine`, `dtype`, `r`, `repeats`; `contestants`: {name: version}; `skipped`: {name: why}; and `cases`: per
        case its fields, `figures` {contestant: medians of FIGURES, and `digest`, equal where answers are}, `ratios` of
        tokens/s and TTFT, loraserve's to each peer's and its server's to its engine's, the median over the rounds,
        `spreads`, the lowest and the highest of them, and `skipped` {contestant: why}.

    Raises:
        LoraserveError: a contestant failed; the message names it.
    """
    present, skipped = select(contestants, peers, dtype)
    for name, reason in skipped.items():
        note(f"{name} is skipped: {reason}")
    versions: dict[str, str] = {}
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = make_base(folder / "base", model or minimind3_config())
        most = max(map(_at_hand, cases.values()), default=0)
        names = [f"a{i}" for i in range(most)]
        if any(case.kind == "cold" for case in cases.values()):
            names += [f"cold{i}" for i in range((repeats + 1) * COLD_ADAPTERS)]
        make_adapters(base, folder / "adapters", names, r)
        for num_adapters, group in groupby(cases.items(), key=lambda item: _at_hand(item[1])):
            chosen = dict(group)
            length = max(case.length for case in chosen.values())
            clients = max(case.clients for case in chosen.values())
            field = Field(folder / "base", folder / "adapters", num_adapters, r, dtype, length, clients)
            with ExitStack() as stack:
                processes = {
                    c.name: stack.enter_context(started(c, field, peers, logs or folder / "logs")) for c in present
                }
                versions |= {name: process.version for name, process in processes.items()}
                for key, case in chosen.items():
                    table[key] = measure(case, present, processes, repeats)
                    note(f"{case.name}: {_line(table[key])}")
    return {
        "machine": machine(),
        "dtype": dtype,
        "r": r,
        "repeats": repeats,
        "contestants": versions,
        "skipped": skipped,
        "cases": table,
    }


def pick(names: Sequence[str], known: Mapping[str, Any], option: str) -> list[str]:
    """Return those of `known` that are named, in its order; `all` names all.

    Raises InvalidRequest for a name it does not have.
    """
    if list(names) == ["all"]:
        return list(known)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
            raise InvalidRequest(f"{option} has no {name!r}; {hint}", param=option)
    return [name for name in known if name in names]


def _at_hand(case: Case) -> int:
    """How many adapters a contestant has when it plays `case`."""
    used = case.adapters + case.idle
    return max(used, LOADED) if used else 0


def measure(
    case: Case, present: Sequence[Contestant], processes: Mapping[str, Process], repeats: int
) -> dict[str, Any]:
    """Play `case` on each contestant in turn, `repeats` times after a warm-up; return its entry of `cases` in `run`."""
    refused = {c.name: reason for c in present if (reason := c.refuses(case))}
    able = [c for c in present if c.name not in refused]
    samples: dict[str, list[dict[str, Any]]] = {c.name: [] for c in able}
    for round_number in range(repeats + 1):
        for contestant in able:
            figures = processes[contestant.name].ask(replace(case, seed=round_number))
            if round_number:  # the first is a warm-up
                samples[contestant.name].append(figures)
    keys = (*FIGURES, *OWN_FIGURES.get(case.kind, ()))
    figures = {
        name: {key: round(statistics.median(row[key] for row in rows), 2) for key in keys}
        | {"digest": rows[-1]["digest"]}
        for name, rows in samples.items()
    }
    pairs = [(c.ours, c.name) for c in able if c.name != c.ours]
    if "loraserve-http" in samples:
        pairs.append(("loraserve-http", "loraserve"))
    rounds = {f"{a}/{b}": _ratios(samples[a], samples[b]) for a, b in pairs}
    ratios = {pair: {key: round(statistics.median(of[key]), 3) for key in RATIOS} for pair, of in rounds.items()}
    spreads = {
        pair: {key: [round(min(of[key]), 3), round(max(of[key]), 3)] for key in RATIOS} for pair, of in rounds.items()
    }
    return {**asdict(case), "figures": figures, "ratios": ratios, "spreads": spreads, "skipped": refused}


def _ratios(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Each round's ratio of each of RATIOS."""
    return {key: [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)] for key in RATIOS}


def _line(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {figures['tokens_per_s']:.0f} tokens/s" for name, figures in row["figures"].items())
