"""Several small adapters trained at once beside one after the other: the same steps, dialogues and losses.

    python benchmarks/many_at_once.py               # steps alone
    python benchmarks/many_at_once.py --commands    # `loraserve train` once for all, and once for each

A random minimind-3 (64M); each adapter is of rank 8 at every linear layer and takes 4 dialogues of 20 to 120 tokens a
step, the last two thirds of which are the answer. `together` steps all in shared passes (`advance_together`), `apart`
each by itself; they take turns, A B A B, after one step of both to warm up, and their first losses must be equal.
Figures are medians of real tokens a second over all adapters, the ratio the median of each round's. With `--commands`
they are seconds from the first command's launch to the last one's end: each takes `--steps` steps in one epoch, and as
always reads the base, looks at perplexity and answers before and after, and publishes. The last line of stdout is JSON.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from loraserve.base.load import Base, load_base
from loraserve.bench.contestant import VOCAB
from loraserve.bench.machine import machine
from loraserve.bench.models import make_base, minimind3_config
from loraserve.errors import TrainingFailed
from loraserve.lora.config import LoraConfig, expand_targets
from loraserve.train.batch import PackedBatch, pack
from loraserve.train.data import Sample
from loraserve.train.initial import initial_weights
from loraserve.train.step import AdapterOptimizer, advance_together

R, RATE = 8, 3e-4
Steps = list[list[PackedBatch]]
"""Of each step the batch of each adapter."""


def optimizers(base: Base, count: int, total: int) -> list[AdapterOptimizer]:
    targets = expand_targets("all-linear", base.shapes)
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=tuple(targets))
    found = []
    for seed in range(count):
        weights = initial_weights(targets, base.shapes, config, normal=False, seed=seed, device=base.device)
        found.append(AdapterOptimizer(base.model, weights, total_steps=total, peak_learning_rate=RATE))
    return found


def batches(count: int, size: int, steps: int) -> Steps:
    draw = random.Random(5)

    def dialogue() -> Sample:
        length = draw.randint(20, 120)
        ids = torch.tensor([draw.randrange(VOCAB.start, VOCAB.stop) for _ in range(length)], dtype=torch.int32)
        return Sample(ids, torch.arange(length) >= length // 3)

    return [[pack([dialogue() for _ in range(size)]) for _ in range(count)] for _ in range(steps)]


def together(adapters: list[AdapterOptimizer], steps: Steps) -> list[float]:
    """Take the steps; the last one's losses."""
    losses = []
    for step in steps:
        results = advance_together(adapters, [[batch] for batch in step])
        assert results is not None
        losses = [result[0].loss for result in results if not isinstance(result, TrainingFailed)]
    return losses


def apart(adapters: list[AdapterOptimizer], steps: Steps) -> list[float]:
    return [
        [adapter.advance([batch])[0].loss for batch in own][-1]
        for adapter, own in zip(adapters, zip(*steps, strict=True), strict=True)
    ]


def commands(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of `loraserve train` for all adapters, and of one after the other, and the ratio of each round."""
    draw = random.Random(5)
    for number in range(args.adapters):
        rows = []
        for _ in range(args.batch_size * args.steps):
            words = ["".join(chr(97 + draw.randrange(26)) for _ in range(2)) for _ in range(draw.randint(12, 112))]
            ask, answer = " ".join(words[: len(words) // 3]), " ".join(words[len(words) // 3 :])
            rows.append({"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]})
        (folder / f"a{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [f"a{number}" for number in range(args.adapters)]
    ways = {"together": [names], "apart": [[name] for name in names]}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    for turn in range(args.rounds):
        for way, runs in list(ways.items())[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            for run in runs:
                given = [word for name in run for word in ("--data", str(folder / f"{name}.jsonl"), "--name", name)]
                where = ["--base", str(folder / "base"), "--adapters-dir", str(folder / f"{way}-{turn}")]
                size = ["--batch-size", str(args.batch_size), "--epochs", "1", "--dtype", args.dtype]
                command = [sys.executable, "-m", "loraserve", "train", *given, *where, *size]
                subprocess.run(command, check=True, env=environment, capture_output=True)
            seconds[way].append(time.perf_counter() - start)
        print(f"round {turn + 1}: " + ", ".join(f"{way} {each[-1]:.1f} s" for way, each in seconds.items()))
    ratios = [b / a for a, b in zip(seconds["together"], seconds["apart"], strict=True)]
    return {"seconds": {way: round(statistics.median(each), 1) for way, each in seconds.items()}} | _ratio(ratios)


def _ratio(ratios: list[float]) -> dict[str, Any]:
    spread = [round(min(ratios), 3), round(max(ratios), 3)]
    return {"ratio": round(statistics.median(ratios), 3), "ratio_spread": spread}


def main() -> None:
    parser = argparse.ArgumentParser(description="Training several adapters at once beside one after the other.")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="in each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--commands", action="store_true", help="whole runs, not steps alone")
    args = parser.parse_args()
    if args.commands:
        with tempfile.TemporaryDirectory() as folder:
            make_base(Path(folder) / "base", minimind3_config())
            figures = commands(Path(folder), args)
        print(json.dumps({"benchmark": "many_at_once", **vars(args), **figures, "machine": machine()}))
        return
    torch.set_num_threads(args.threads)
    steps = batches(args.adapters, args.batch_size, args.steps)
    tokens = sum(batch.num_rows for step in steps for batch in step)
    ways = {"together": together, "apart": apart}
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder) / "base", minimind3_config())
        base = load_base(str(Path(folder) / "base"), dtype=args.dtype)
        base.model.pack_for_training()
        total = args.steps * args.rounds + 1
        adapters = {way: optimizers(base, args.adapters, total) for way in ways}
        first = {way: take(adapters[way], steps[:1]) for way, take in ways.items()}
        for ours, theirs in zip(first["together"], first["apart"], strict=True):
            assert abs(ours - theirs) < 1e-2, "the two do not train alike"
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(args.rounds):
            for way, take in ways.items():
                start = time.perf_counter()
                take(adapters[way], steps)
                rates[way].append(tokens / (time.perf_counter() - start))
            print(f"round {number + 1}: " + ", ".join(f"{way} {rates[way][-1]:,.0f} tokens/s" for way in ways))
    ratios = [a / b for a, b in zip(rates["together"], rates["apart"], strict=True)]
    result = {
        "benchmark": "many_at_once",
        **vars(args),
        "tokens_per_step": round(tokens / args.steps),
        "tokens_per_second": {way: round(statistics.median(each), 1) for way, each in rates.items()},
        **_ratio(ratios),
        "machine": machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
