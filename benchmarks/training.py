"""A training epoch beside PEFT's and MiniMind's: the same dialogues, tokens and losses, each in a process of its own.

    git clone https://github.com/jingyaogong/minimind
    python benchmarks/training.py --minimind minimind

A random minimind-3 (64M), batches of 16. `short`: dialogues of 20 to 120 tokens; `full`: rows of 256. The last two
thirds of a dialogue are its answer. loraserve and PEFT train rank 8 at every linear layer, PEFT with rows padded to
the batch's longest. MiniMind is its own model and LoRA (rank 16 at q and o, float32) in the loop of its
train_lora.py, which pads every row to 340 tokens; without a checkout it is left out. Contestants take turns, A B A B;
an epoch is timed after one batch to warm up. Figures are medians, ratios medians of each round's: real tokens a
second, and the process's peak of resident memory. All start from the same base and B = 0, so their first losses must
be equal. The last line of stdout is JSON.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from loraserve.bench.contestant import VOCAB
from loraserve.bench.machine import machine
from loraserve.bench.models import make_base, minimind3_config

BATCH, R, RATE = 16, 8, 3e-4
PADDED = 340
"""MiniMind's max_seq_len."""
Batch = list[list[int]]
Step = Callable[[Batch], float]
"""Trains on a batch of token ids; returns its loss."""


def dialogues(kind: str, count: int) -> list[list[int]]:
    draw = random.Random(5)
    lengths = [draw.randint(20, 120) if kind == "short" else 256 for _ in range(count)]
    return [[draw.randrange(VOCAB.start, VOCAB.stop) for _ in range(length)] for length in lengths]


def prompt_of(row: list[int]) -> int:
    return len(row) // 3


def loraserve(base: Path, dtype: str, total: int, _minimind: Path | None) -> Step:
    from loraserve.base.load import load_base
    from loraserve.lora.config import LoraConfig, expand_targets
    from loraserve.train.batch import pack
    from loraserve.train.data import Sample
    from loraserve.train.initial import initial_weights
    from loraserve.train.memory import ENOUGH_ROWS
    from loraserve.train.step import AdapterOptimizer

    loaded = load_base(str(base), dtype=dtype)
    loaded.model.pack_for_training()
    targets = expand_targets("all-linear", loaded.shapes)
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=tuple(targets))
    weights = initial_weights(targets, loaded.shapes, config, normal=False, seed=0, device=loaded.device)
    optimizer = AdapterOptimizer(
        loaded.model, weights, total_steps=total, peak_learning_rate=RATE, max_rows=ENOUGH_ROWS
    )

    def step(batch: Batch) -> float:
        samples = [
            Sample(torch.tensor(row, dtype=torch.int32), torch.arange(len(row)) >= prompt_of(row)) for row in batch
        ]
        return optimizer.advance([pack(samples)])[0].loss

    return step


def peft(base: Path, dtype: str, _total: int, _minimind: Path | None) -> Step:
    import peft as library
    import transformers

    transformers.logging.set_verbosity_error()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="sdpa"
    )
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = library.get_peft_model(model, library.LoraConfig(r=R, lora_alpha=2 * R, target_modules=linear)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)

    def step(batch: Batch) -> float:
        ids, labels, mask = padded(batch, max(map(len, batch)))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def minimind(base: Path, _dtype: str, _total: int, checkout: Path | None) -> Step:
    sys.path.insert(0, str(checkout))
    from model.model_lora import apply_lora  # type: ignore[import-not-found]
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM  # type: ignore[import-not-found]
    from safetensors.torch import load_file

    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=768, num_hidden_layers=8, vocab_size=VOCAB.stop))
    model.load_state_dict(load_file(base / "model.safetensors"), strict=False)
    apply_lora(model)
    parameters = [p for name, p in model.named_parameters() if "lora" in name]
    for name, p in model.named_parameters():
        p.requires_grad = "lora" in name
    optimizer = torch.optim.AdamW(parameters, lr=RATE)

    def step(batch: Batch) -> float:
        ids, labels, _ = padded(batch, PADDED)
        result = model(ids, labels=labels)
        loss = result.loss + result.aux_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def padded(batch: Batch, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and mask (B, length)."""
    ids = torch.tensor([row + [0] * (length - len(row)) for row in batch])
    answers = [[-100] * prompt_of(row) + row[prompt_of(row) :] for row in batch]
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in answers])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch])
    return ids, labels, mask


CONTESTANTS = {"loraserve": loraserve, "peft": peft, "minimind": minimind}


def epoch(name: str, kind: str, count: int, base: Path, dtype: str, checkout: Path | None) -> dict[str, float]:
    """Train one epoch and return its figures."""
    torch.manual_seed(0)
    rows = dialogues(kind, count)
    batches = [rows[i : i + BATCH] for i in range(0, count, BATCH)]
    step = CONTESTANTS[name](base, dtype, len(batches) + 1, checkout)
    first = step(batches[0])
    start = time.perf_counter()
    for batch in batches:
        last = step(batch)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"tokens_per_s": sum(map(len, rows)) / seconds, "peak_mib": peak, "first_loss": first, "last_loss": last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimind", type=Path, help="a checkout of MiniMind")
    parser.add_argument("--kinds", default="short,full")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of loraserve and PEFT")
    parser.add_argument("--dialogues", type=int, default=192, help="an epoch; full rows are a quarter as many")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epoch", nargs=3, metavar=("CONTESTANT", "KIND", "BASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.epoch:
        name, kind, path = args.epoch
        print(json.dumps(epoch(name, kind, args.dialogues, Path(path), args.dtype, args.minimind)))
        return
    names = [name for name in CONTESTANTS if name != "minimind" or args.minimind]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch) / "base", minimind3_config()).path
        for kind in args.kinds.split(","):
            count = args.dialogues if kind == "short" else args.dialogues // 4
            rounds = []
            for _ in range(args.repeats):
                rounds.append({name: _run(name, kind, base, count, args) for name in names})
                print(kind, {name: round(figures["tokens_per_s"]) for name, figures in rounds[-1].items()}, flush=True)
            firsts = {name: rounds[0][name]["first_loss"] for name in names}
            assert max(firsts.values()) - min(firsts.values()) < 0.02, f"not the same loss: {firsts}"
            result[kind] = _summary(names, rounds)
    _show(names, result)
    print(json.dumps({"machine": machine(), "dtype": args.dtype, "repeats": args.repeats, "kinds": result}))


def _run(name: str, kind: str, base: Path, count: int, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--epoch", name, kind, str(base), "--dialogues", str(count)]
    command += ["--dtype", args.dtype, *(["--minimind", str(args.minimind)] if args.minimind else [])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _summary(names: list[str], rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    figures = {
        name: {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]} for name in names
    }
    ratios = {
        f"loraserve/{name}": {
            key: statistics.median(one["loraserve"][key] / one[name][key] for one in rounds)
            for key in ("tokens_per_s", "peak_mib")
        }
        for name in names
        if name != "loraserve"
    }
    return {"figures": figures, "ratios": ratios}


def _show(names: list[str], result: dict[str, Any]) -> None:
    print(f"\n{'':8}{'':12}{'tokens/s':>10}{'faster by':>11}{'peak MiB':>10}{'of it':>8}{'loss':>16}")
    for kind, row in result.items():
        for name in names:
            own, ratio = row["figures"][name], row["ratios"].get(f"loraserve/{name}")
            faster, smaller = (f"{ratio['tokens_per_s']:.2f}x", f"{ratio['peak_mib']:.0%}") if ratio else ("", "")
            print(
                f"{kind:8}{name:12}{own['tokens_per_s']:10.0f}{faster:>11}{own['peak_mib']:10.0f}"
                f"{smaller:>8}{own['first_loss']:9.4f} {own['last_loss']:7.4f}"
            )


if __name__ == "__main__":
    main()
