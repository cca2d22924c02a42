"""What `--deterministic` costs: the engine in process with it beside itself without, A B A B.

    python benchmarks/deterministic.py

A random minimind-3 (64M) and rank-8 adapters, the cases of `loraserve bench serve` of these names, each engine in a
process of its own. Medians of 7 rounds; the cost is the median of each round's, in percent of the tokens/s without. The
last line of stdout is JSON.
"""

import argparse
import json
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from loraserve.bench.contestants import CONTESTANTS, Field, Peers
from loraserve.bench.machine import machine
from loraserve.bench.models import make_adapters, make_base, minimind3_config
from loraserve.bench.processes import started
from loraserve.bench.serve import CASES, LOADED, measure

CASE_NAMES = ("one-1", "base-16", "mixed-16")
R = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "int8"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    cases = {name: CASES[name] for name in CASE_NAMES}
    plain = CONTESTANTS["loraserve"]
    engines = (
        plain,
        replace(
            plain, name="deterministic", command=lambda field, peers: [*plain.command(field, peers), "--deterministic"]
        ),
    )
    table = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        base = make_base(folder / "base", minimind3_config())
        make_adapters(base, folder / "adapters", [f"a{i}" for i in range(LOADED)], R)
        length = max(case.length for case in cases.values())
        clients = max(case.clients for case in cases.values())
        field = Field(base.path, folder / "adapters", LOADED, R, args.dtype, length, clients)
        processes = {e.name: stack.enter_context(started(e, field, Peers(), folder / "logs")) for e in engines}
        print(f"{'case':28} {'tokens/s':>9} {'deterministic':>14} {'cost':>7}")
        for name, case in cases.items():
            table[name] = row = measure(case, engines, processes, args.repeats)
            without, with_it = (row["figures"][engine.name]["tokens_per_s"] for engine in engines)
            row["cost_percent"] = round(100 * (1 - 1 / row["ratios"]["loraserve/deterministic"]["tokens_per_s"]), 1)
            print(f"{case.name:28} {without:9.1f} {with_it:14.1f} {row['cost_percent']:6.1f}%")
    print(json.dumps({"machine": machine(), "dtype": args.dtype, "r": R, "repeats": args.repeats, "cases": table}))


if __name__ == "__main__":
    main()
