"""The memory plan beside what a training process really takes, with and without giving freed memory back.

    python benchmarks/memory.py

A random minimind-3 (64M), rank 8 at every linear layer, two steps in a process of its own for each line; `budget` is
what `loraserve train` does with `--memory-budget`. Plans are made before the base's weights are read; peaks are those
of the process since its start, in MiB. The last line of stdout is JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from loraserve.base.load import load_base
from loraserve.bench.contestant import VOCAB
from loraserve.bench.machine import machine
from loraserve.bench.models import make_base, minimind3_config
from loraserve.lora.config import LoraConfig, expand_targets
from loraserve.train.allocator import give_back_large_tensors
from loraserve.train.batch import pack
from loraserve.train.data import Sample
from loraserve.train.initial import initial_weights
from loraserve.train.memory import footprint, keepings
from loraserve.train.step import AdapterOptimizer

R, LENGTH = 8, 256
CASES = [
    (8, "float32", False, None),
    (8, "bfloat16", False, None),
    (24, "float32", True, None),
    (24, "bfloat16", True, None),
    (8, "float32", False, "int8"),
    (8, "bfloat16", False, "int8"),
    (8, "bfloat16", False, "nf4"),
    (24, "float32", True, "nf4"),
]
"""Dialogues of a batch, dtype, checkpointing, how the base is quantised."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(step(**json.loads(args.child))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch) / "base", minimind3_config()).path
        load_base(str(base), weights=False)  # for its fingerprint, which takes the whole file and is remembered
        print(f"{'dialogues':>10} {'dtype':10} {'':20} {'budget':7} {'planned':>8} {'measured':>9} {'off by':>8}")
        for dialogues, dtype, checkpointing, how in CASES:
            for budget in (True, False):
                case = {"base": str(base), "dialogues": dialogues, "dtype": dtype, "checkpointing": checkpointing}
                case["how"] = how
                command = [sys.executable, __file__, "--child", json.dumps({**case, "budget": budget})]
                found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
                off = found["planned"] / found["measured"] - 1
                options = ["checkpointing"] * checkpointing + [how] * bool(how)
                rows.append({**case, "budget": budget, **found, "off": round(off, 3)})
                print(
                    f"{dialogues:10} {dtype:10} {' '.join(options):20} {budget!s:7} "
                    f"{found['planned']:8.0f} {found['measured']:9.0f} {off:8.0%}",
                    flush=True,
                )
    for row in rows:
        del row["base"]
    print(json.dumps({"machine": machine(), "r": R, "length": LENGTH, "cases": rows}))


def step(base: str, dialogues: int, dtype: str, checkpointing: bool, how: str | None, budget: bool) -> dict[str, Any]:
    """Take two steps; return the planned and the measured peak in MiB."""
    torch.manual_seed(0)
    loaded = load_base(base, dtype=dtype, weights=False)
    if budget:
        give_back_large_tensors()
    targets = expand_targets("all-linear", loaded.shapes)
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=tuple(targets))
    weights = initial_weights(targets, loaded.shapes, config, normal=False, seed=0, device=loaded.device)
    ids = torch.randint(VOCAB.start, VOCAB.stop, (dialogues, LENGTH), dtype=torch.int32)
    batch = pack([Sample(row, torch.arange(LENGTH) >= LENGTH // 3) for row in ids])
    needs = footprint(loaded.config, weights, loaded.dtype, loaded.device)
    keeping = next(keepings(loaded, [how]))[0]
    planned = keeping.resident + needs.peak(batch.num_rows, checkpointing)
    loaded.load_weights(how)
    if keeping.packed:
        loaded.model.pack_for_training()
    optimizer = AdapterOptimizer(
        loaded.model, weights, total_steps=2, peak_learning_rate=1e-3, checkpointing=checkpointing
    )
    for _ in range(2):
        optimizer.advance([batch])
    return {"planned": planned / 2**20, "measured": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


if __name__ == "__main__":
    main()
