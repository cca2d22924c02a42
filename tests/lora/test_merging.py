"""Folding adapters into weights and into each other."""

import pytest
import torch

from loraserve.lora.adapter import Adapter
from loraserve.lora.merge import combine, merged_weight

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def pair(shapes, make_adapter, lora) -> tuple[Adapter, Adapter]:
    first = make_adapter(shapes, lora(["q_proj", "v_proj"]), seed=1)
    return first, make_adapter(shapes, lora(["q_proj", "up_proj"], r=7, lora_alpha=3), seed=2, dtype=torch.bfloat16)


def test_merged_weight_is_rounded_once_from_float32(shapes, pair):
    first, second = (adapter.weights[Q] for adapter in pair)
    pristine = torch.randn(shapes[Q], generator=torch.Generator().manual_seed(3)).half()
    before = pristine.clone()
    merged = merged_weight(pristine, [(first, 0.7), (second, -0.3)])
    exact = pristine.double() + 0.7 * first.delta().double() - 0.3 * second.delta().double()
    twice = (pristine + (0.7 * first.delta()).half()) + (-0.3 * second.delta()).half()
    assert torch.equal(pristine, before), "the pristine base was modified"
    assert merged.dtype == torch.float16
    assert (merged - pristine).abs().max() > 0.1
    ulp = torch.finfo(torch.float16).eps * exact.abs().clamp(min=2**-14)
    assert ((merged.double() - exact).abs() <= 0.51 * ulp).all()
    assert not ((twice.double() - exact).abs() <= 0.51 * ulp).all(), "rounding twice would pass this test too"


def test_merging_nothing_gives_a_new_tensor_with_the_same_bits(shapes):
    pristine = torch.randn(shapes[Q]).bfloat16()
    merged = merged_weight(pristine, [])
    assert torch.equal(merged, pristine)
    assert merged.data_ptr() != pristine.data_ptr()
    assert merged_weight(pristine, [], torch.float32).dtype == torch.float32


def test_combined_adapter_has_the_sum_of_the_deltas_on_the_union_of_the_targets(pair):
    combined = combine([(pair[0], 0.7), (pair[1], -0.3)], "blend")
    assert set(combined.weights) == set(pair[0].weights) | set(pair[1].weights)
    assert combined.weights[Q].r == 4 + 7
    for target, weight in combined.weights.items():
        parts = [f * a.weights[target].delta() for a, f in zip(pair, (0.7, -0.3), strict=True) if target in a.weights]
        torch.testing.assert_close(weight.delta(), sum(parts), rtol=1e-6, atol=1e-6)


def test_part_at_scale_zero_adds_neither_rank_nor_targets(pair):
    combined = combine([(pair[0], 1.0), (pair[1], 0.0)])
    assert set(combined.weights) == set(pair[0].weights)
    assert {weight.r for weight in combined.weights.values()} == {4}
    assert combine([(pair[0], 0.0)]).weights == {}
