"""The engine alone as the work grows: with the batch, the adapters, their rank, the context. And the price of HTTP."""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraserve.base.config import ModelConfig
from loraserve.bench.contestant import Case
from loraserve.bench.contestants import CONTESTANTS, Field, Peers
from loraserve.bench.machine import machine
from loraserve.bench.models import make_adapters, make_base, minimind3_config
from loraserve.bench.processes import Process, started

MAX_NUM_SEQS = 64
"""Answers that the engine writes at once; the other requests of a case wait."""
RANKS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Sweep:
    """x, y: the axes' labels.
    lines: {label: (figure, {x: case})}.
    ranks: of families of adapters that do not have the run's.
    """

    x: str
    y: str
    lines: Mapping[str, tuple[str, Mapping[int, Case]]]
    ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def cases(self) -> list[Case]:
        """Every case once."""
        return list(dict.fromkeys(case for _, points in self.lines.values() for case in points.values()))


def _at(xs: Sequence[int], case: Callable[[int], Case]) -> dict[int, Case]:
    return {x: case(x) for x in xs}


_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_CONTEXTS = _at((64, 256, 1024, 4096, 8192), lambda x: Case(f"{x} tokens", 1, 1, prompt=x, new=32))
SWEEPS = {
    "batch": Sweep(
        "clients at once",
        "output tokens/s",
        {
            "base": ("tokens_per_s", _at(_BATCHES, lambda x: Case(f"{x} on the base", x, 0, new=32))),
            "8 adapters": ("tokens_per_s", _at(_BATCHES, lambda x: Case(f"{x} on 8 adapters", x, 8, new=32))),
        },
    ),
    "adapters": Sweep(
        f"distinct adapters of all requests, {MAX_NUM_SEQS} answered at once",
        "output tokens/s",
        {
            "rank {r}": (
                "tokens_per_s",
                _at((1, 8, 64, 256, 1000), lambda x: Case(f"{x} adapters", max(x, 256), x, prompt=8, new=8)),
            )
        },
    ),
    "rank": Sweep(
        "rank of 8 adapters, 16 clients",
        "output tokens/s",
        {"": ("tokens_per_s", _at(RANKS, lambda x: Case(f"rank {x}", 16, 8, new=32, family=f"r{x}-")))},
        {f"r{x}-": x for x in RANKS},
    ),
    "context": Sweep(
        "tokens of the prompt, 1 client, one adapter",
        "tokens/s",
        {
            "reading the prompt": ("prompt_tokens_per_s", _CONTEXTS),
            "writing the answer": ("decode_tokens_per_s", _CONTEXTS),
        },
    ),
}
FIGURES = ("tokens_per_s", "prompt_tokens_per_s", "decode_tokens_per_s", "ttft_ms", "itl_ms", "peak_rss_mb")
HTTP_CASES = {"http-64": Case("64 clients, 8 adapters", 64, 8, new=64)}
"""For `serve.run`: what the server makes of the engine's speed."""


def run(
    *,
    sweeps: Mapping[str, Sweep] = SWEEPS,
    repeats: int = 3,
    dtype: str = "bfloat16",
    r: int = 8,
    model: ModelConfig | None = None,
    logs: Path | None = None,
    note: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Measure the offline engine at every point of every sweep, `repeats` times after a warm-up.

    Returns:
        `machine`, `dtype`, `r`, `repeats`, and per sweep its labels, `r`, and `lines`: {label: {"figure", "points"}}, a
        point being {"x", *FIGURES}, medians.

    Raises:
        LoraserveError: the engine's process failed.
    """
    table = {}
    for key, sweep in sweeps.items():
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            setting = _prepare(Path(scratch), sweep.cases, sweep.ranks, dtype, r, model)
            ours = CONTESTANTS["loraserve"]
            process = stack.enter_context(started(ours, setting, Peers(), logs or Path(scratch)))
            measured = {}
            for case in sweep.cases:
                measured[case] = _measure(process, case, repeats)
                note(f"{key}, {case.name}: {measured[case]['tokens_per_s']:.0f} tokens/s")
        lines = {
            label.format(r=r): {"figure": figure, "points": [{"x": x} | measured[case] for x, case in points.items()]}
            for label, (figure, points) in sweep.lines.items()
        }
        ranks = f"{min(sweep.ranks.values())} to {max(sweep.ranks.values())}" if sweep.ranks else r
        table[key] = {"x": sweep.x, "y": sweep.y, "r": ranks, "lines": lines}
    return {"machine": machine(), "dtype": dtype, "r": r, "repeats": repeats, "sweeps": table}


def _prepare(
    folder: Path, cases: Sequence[Case], ranks: Mapping[str, int], dtype: str, r: int, model: ModelConfig | None
) -> Field:
    """Write the base and the adapters that `cases` ask for."""
    base = make_base(folder / "base", model or minimind3_config())
    for family in dict.fromkeys(case.family for case in cases):
        count = max(case.adapters for case in cases if case.family == family)
        make_adapters(base, folder / "adapters", [f"{family}{i}" for i in range(count)], ranks.get(family, r))
    return Field(
        base.path,
        folder / "adapters",
        num_adapters=max(case.adapters for case in cases),
        r=max([r, *ranks.values()]),
        dtype=dtype,
        max_model_len=max(case.length for case in cases),
        max_num_seqs=min(max(case.clients for case in cases), MAX_NUM_SEQS),
    )


def _measure(process: Process, case: Case, repeats: int) -> dict[str, float]:
    """Medians of FIGURES."""
    rows = []
    for round_number in range(repeats + 1):
        row = process.ask(replace(case, seed=round_number))
        row |= _rates(case, first=row["ttft_ms"] / 1e3, seconds=row["tokens"] / row["tokens_per_s"])
        rows.append(row)
    return {key: round(statistics.median(row[key] for row in rows[1:]), 2) for key in FIGURES}  # the first is a warm-up


def _rates(case: Case, first: float, seconds: float) -> dict[str, float]:
    """Tokens read a second until the `first` ones are written, and written a second from then on.

    An event may hold several tokens: of answers that came in one, the whole time counts as that of writing.
    """
    writing = seconds - first
    return {
        "prompt_tokens_per_s": case.clients * case.prompt / first,
        "decode_tokens_per_s": case.clients * (case.new - 1) / (writing if writing > 1e-6 else seconds),
    }
