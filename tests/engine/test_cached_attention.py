"""Attention of mixed steps, by the kernel's rows and by torch, beside the definition."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loraserve.bench.models import minimind3_config
from loraserve.engine import kv_cache
from loraserve.engine.kv_cache import CachedAttention, KVCache
from loraserve.engine.params import SamplingParams
from loraserve.engine.scheduler import Chunk
from loraserve.engine.sequence import Sequence
from loraserve.kernels import cpu

CONFIG = dataclasses.replace(
    minimind3_config(), num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32
)
STEPS = {
    "a decoding row, a short prompt, a long one, a short one": [(9, 1), (3, 20), (0, 150), (0, 7)],
    "short prompts alone, one of them after a shared prefix": [(100, 28), (0, 64)],
    "a prompt whose end is beyond what is short": [(120, 9)],
}
"""(start, count) of each chunk."""


def step(chunks: list[tuple[int, int]], dtype: torch.dtype) -> tuple[CachedAttention, Tensor, Tensor]:
    """Attention of a step over a cache in which all positions before the chunks are there; its output, and the wanted."""
    generator = torch.Generator().manual_seed(1)
    h, kv, d = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
    cache = KVCache(CONFIG, len(chunks), 200, torch.device("cpu"), dtype)
    cache.keys[0].copy_(torch.randn(cache.keys[0].shape, generator=generator))
    cache.values[0].copy_(torch.randn(cache.values[0].shape, generator=generator))
    given = []
    for slot, (start, count) in enumerate(chunks):
        sequence = Sequence([0] * (start + count), SamplingParams(), 1)
        sequence.slot = slot
        given.append(Chunk(sequence, start, count))
    positions = torch.tensor([start + i for start, count in chunks for i in range(count)])
    q, k, v = (torch.randn(len(positions), heads, d, generator=generator).to(dtype) for heads in (h, kv, kv))
    attention = CachedAttention(cache, given, positions)
    out = attention.attend(0, q, k, v)
    wanted = []
    for row, (slot, position) in enumerate((s, p) for s, (a, n) in enumerate(chunks) for p in range(a, a + n)):
        past = slice(position + 1)
        query, keys, values = q[row, :, None], cache.keys[0][slot, :, past], cache.values[0][slot, :, past]
        alone = F.scaled_dot_product_attention(
            query.float()[None], keys.float()[None], values.float()[None], enable_gqa=True
        )
        wanted.append(alone[0, :, 0])
    return attention, out.float(), torch.stack(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", STEPS.values(), ids=STEPS)
def test_every_row_attends_to_its_own_past_however_a_step_is_mixed(monkeypatch, chunks, dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    outputs = []
    for short in (kv_cache.SHORT, 0):
        monkeypatch.setattr(kv_cache, "SHORT", short)
        attention, out, wanted = step(chunks, dtype)
        all_short = short and all(start + count <= short for start, count in chunks)
        assert (attention.cached is not None) == bool(all_short and cpu.available(dtype, CONFIG.head_dim))
        torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance)
        outputs.append(out)
    assert outputs[0].abs().max() > 0.1
