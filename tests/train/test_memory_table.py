"""The table of docs/training.md: what 1.06B and 270M parameters take in 4 GB and in 1 GB."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from loraserve.base.quantize import quantized_shapes
from loraserve.bench.models import minimind3_config
from loraserve.lora.adapter import LoraWeight
from loraserve.train.memory import footprint, size, weight_bytes

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
DIALOGUES, LENGTH = 64, 340


def column(hidden, budget, how):
    """The figures of a base of 20 layers on a GPU, rank 8 at all linear layers, in bfloat16."""
    width = math.ceil(hidden * math.pi / 64) * 64
    small = minimind3_config()
    config = dataclasses.replace(
        small, hidden_size=hidden, num_hidden_layers=20, head_dim=hidden // 8, intermediate_size=width
    )
    weights = {
        target: LoraWeight(torch.empty(8, inputs, device="meta"), torch.empty(out, 8, device="meta"), 1.0)
        for target, (out, inputs) in config.linear_shapes().items()
        if target != "lm_head"
    }
    needs = footprint(config, weights, torch.bfloat16, torch.device("cuda"))
    adapter = 4 * sum(w.A.numel() + w.B.numel() for w in weights.values())
    base = weight_bytes(config, torch.bfloat16, how)
    resident = base + adapter + (2 * max(map(math.prod, quantized_shapes(config).values())) if how else 0)
    room = budget - resident
    return {
        "base": size(base),
        "adapter, its gradients and AdamW's moments": size(adapter + needs.adapter),
        "left for passes": size(room - needs.adapter),
        "a token, blocks kept (blocks run twice)": f"{size(needs.row(False))} ({size(needs.row(True))})",
        "tokens in a pass": f"{needs.rows_within(room, False):,} ({needs.rows_within(room, True):,})",
        "the batch in one pass would take": size(resident + needs.peak(DIALOGUES * LENGTH, False)),
        "the least, one dialogue in a pass": f"{size(resident + needs.peak(LENGTH, False))} "
        f"({size(resident + needs.peak(LENGTH, True))})",
    }


@pytest.mark.parametrize(("hidden", "budget"), [(2048, 4 << 30), (1024, 1 << 30)])
def test_the_table_has_what_the_plan_computes(hidden, budget):
    lines = DOCS.read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| hidden {hidden},"))
    columns = [column(hidden, budget, how) for how in (None, "int8", "nf4")]
    want = [f"| {name} | {' | '.join(each[name] for each in columns)} |" for name in columns[0]]
    assert columns[0]["base"] != columns[1]["base"] != columns[2]["base"]
    assert lines[start + 2 : start + 2 + len(want)] == want
