"""The batched delta against its definition, one adapter and one row at a time."""

import pytest
import torch

from loraserve.lora.adapter import Adapter, LoraWeight
from loraserve.lora.batch import LoraBatch, apply_one_by_one
from loraserve.lora.merge import combine
from loraserve.lora.stack import AdapterStack

Q, V, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture
def adapters(shapes, make_adapter, lora) -> list[Adapter]:
    """Three adapters: other ranks, other scalings, and targets that overlap only in part."""
    return [
        make_adapter(shapes, lora(["q_proj", "v_proj"], r=4, lora_alpha=8), seed=1),
        make_adapter(shapes, lora(["q_proj", "up_proj"], r=7, lora_alpha=3.5, rank_pattern={"up_proj": 2}), seed=2),
        make_adapter(shapes, lora(["v_proj", "lm_head"], r=1, lora_alpha=1, use_rslora=True), seed=3),
    ]


@pytest.fixture
def mixed(adapters) -> LoraBatch:
    """Rows of base, A, B, a blend of all three, C, base at scale 0, and A again."""
    stack = AdapterStack([a.weights for a in adapters])
    segments = [(2, []), (3, [(0, 1.0)]), (1, [(1, 0.5)]), (4, [(0, 0.3), (1, -1.2), (2, 2.0)]), (2, [(2, 1.0)])]
    batch = LoraBatch.from_segments(stack, [*segments, (2, [(1, 0.0)]), (1, [(0, 1.0)])], "cpu")
    assert batch is not None
    return batch


UNTOUCHED = [0, 1, 12, 13]


def inputs(shapes, target: str, rows: int = 15) -> tuple[torch.Tensor, torch.Tensor]:
    out, width = shapes[target]
    generator = torch.Generator().manual_seed(9)
    return torch.randn(rows, width, generator=generator), torch.randn(rows, out, generator=generator)


@pytest.mark.parametrize("target", [Q, V, UP, "lm_head"])
def test_mixed_batch_equals_each_row_and_adapter_alone(shapes, mixed, target):
    x, y = inputs(shapes, target)
    expected = apply_one_by_one(mixed, target, x, y)
    changed = (expected - y).abs().amax(dim=1) > 1e-3
    assert changed.any(), "the adapters of this test do nothing"
    assert not changed[UNTOUCHED].any()
    torch.testing.assert_close(mixed.apply(target, x, y), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [Q, V, UP, "lm_head", "model.layers.0.self_attn.o_proj"])
def test_rows_without_an_adapter_keep_the_bits_of_the_base(shapes, mixed, target):
    x, y = inputs(shapes, target)
    y[UNTOUCHED[0], 0] = -0.0  # adding 0.0 would turn it into +0.0
    before = y.clone()
    after = mixed.apply(target, x, y)
    assert torch.equal(y, before), "the frozen layer's output was modified"
    assert torch.equal(after[UNTOUCHED].view(torch.int32), before[UNTOUCHED].view(torch.int32))


def test_rows_without_an_adapter_are_not_even_read(shapes, mixed):
    """A NaN in the input of a base row must not reach other rows, nor be multiplied by anything."""
    x, y = inputs(shapes, Q)
    x[0] = float("nan")
    assert mixed.apply(Q, x, y).isfinite().all()


def test_batch_without_adapters_is_none_and_runs_no_code(adapters):
    stack = AdapterStack([adapters[0].weights])
    assert LoraBatch.from_segments(stack, [(3, []), (2, [(0, 0.0)])], "cpu") is None


def test_blend_in_a_batch_is_the_sum_of_the_deltas(shapes, adapters):
    factors = [0.7, -0.4, 1.5]
    stack = AdapterStack([a.weights for a in adapters])
    batch = LoraBatch.from_segments(stack, [(15, list(enumerate(factors)))], "cpu")
    for target in (Q, V, UP, "lm_head"):
        x, y = inputs(shapes, target)
        delta = sum(
            f * a.weights[target].delta() for f, a in zip(factors, adapters, strict=True) if target in a.weights
        )
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(batch.apply(target, x, y), y + x @ delta.T, rtol=1e-4, atol=1e-4)


def test_blend_in_a_batch_equals_the_combined_adapter(shapes, adapters):
    factors = [0.7, -0.4, 1.5]
    blended = LoraBatch.from_segments(
        AdapterStack([a.weights for a in adapters]), [(15, list(enumerate(factors)))], "cpu"
    )
    combined = LoraBatch.uniform(combine(list(zip(adapters, factors, strict=True))).weights, 15)
    for target in (Q, V, UP, "lm_head"):
        x, y = inputs(shapes, target)
        torch.testing.assert_close(combined.apply(target, x, y), blended.apply(target, x, y), rtol=1e-5, atol=1e-5)


def test_selected_rows_give_what_they_give_in_the_whole_batch(shapes, mixed):
    x, y = inputs(shapes, Q)
    rows = torch.tensor([11, 3, 0, 7, 7, 14])
    whole = mixed.apply(Q, x, y)[rows]
    part = mixed.select(rows).apply(Q, x[rows], y[rows])
    torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(part[2], y[0])


def test_selecting_only_base_rows_changes_nothing(shapes, mixed):
    x, y = inputs(shapes, Q)
    rows = torch.tensor(UNTOUCHED)
    assert torch.equal(mixed.select(rows).apply(Q, x[rows], y[rows]), y[rows])


def test_gradient_reaches_a_and_b_and_equals_that_of_the_merged_weight(shapes):
    generator = torch.Generator().manual_seed(4)
    out, width = shapes[Q]
    A = torch.randn(3, width, generator=generator, requires_grad=True)
    B = torch.randn(out, 3, generator=generator, requires_grad=True)
    x, y = inputs(shapes, Q)
    batch = LoraBatch.uniform({Q: LoraWeight(A, B, 0.25)}, 15)
    batch.apply(Q, x, y).square().sum().backward()
    got = A.grad.clone(), B.grad.clone()
    A.grad = B.grad = None
    (y + x @ (0.25 * B @ A).T).square().sum().backward()
    assert got[0].abs().max() > 0
    torch.testing.assert_close(got, (A.grad, B.grad), rtol=1e-4, atol=1e-3)


def test_two_adapters_train_in_one_batch_without_touching_each_other(shapes):
    """Rows of one adapter must give the other no gradient."""
    generator = torch.Generator().manual_seed(5)
    out, width = shapes[Q]
    pairs = []
    for r in (2, 5):
        A = torch.randn(r, width, generator=generator, requires_grad=True)
        pairs.append(LoraWeight(A, torch.randn(out, r, generator=generator, requires_grad=True), 1.0))
    stack = AdapterStack([{Q: pair} for pair in pairs])
    batch = LoraBatch.from_segments(stack, [(6, [(0, 1.0)]), (5, []), (4, [(1, 1.0)])], "cpu")
    x, y = inputs(shapes, Q)
    batch.apply(Q, x, y)[:6].square().sum().backward()
    assert pairs[0].A.grad.abs().max() > 0
    assert not pairs[1].A.grad.any()
    assert not pairs[1].B.grad.any()


def test_adapters_in_training_give_the_naive_delta_and_its_gradients(shapes, monkeypatch):
    """Rows of each in several stretches, some at a weight of their own, some of neither; and validation without gradients."""
    generator = torch.Generator().manual_seed(7)
    out, width = shapes[Q]
    stack = AdapterStack(
        [
            {
                Q: LoraWeight(
                    torch.randn(r, width, generator=generator, requires_grad=True),
                    torch.randn(out, r, generator=generator, requires_grad=True),
                    0.5,
                )
            }
            for r in (2, 5)
        ]
    )
    segments = [(3, [(1, 1.0)]), (4, [(0, 1.0)]), (2, []), (5, [(1, 0.25)]), (1, [(0, 1.0)])]
    batch = LoraBatch.from_segments(stack, segments, "cpu")
    x, y = inputs(shapes, Q)
    x.requires_grad_()
    parameters = [x, *(tensor for adapter in stack.adapters for tensor in adapter[Q].tensors)]
    found, wanted = batch.apply(Q, x, y), apply_one_by_one(batch, Q, x, y)
    assert (wanted - y).abs().max() > 1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    factors = torch.randn(found.shape, generator=generator)
    got = torch.autograd.grad((found * factors).sum(), parameters)
    torch.testing.assert_close(got, torch.autograd.grad((wanted * factors).sum(), parameters), rtol=1e-4, atol=1e-3)
    assert all(gradient.abs().max() > 0 for gradient in got)
    with torch.no_grad():
        torch.testing.assert_close(batch.apply(Q, x, y), wanted, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr("loraserve.lora.batch.dispatch.of", lambda *_: None)  # where there are no kernels
        torch.testing.assert_close(batch.apply(Q, x, y), wanted, rtol=1e-4, atol=1e-4)


def test_weight_and_scaling_multiply_in_float32_when_the_adapter_is_bfloat16(shapes):
    """Rounding weight·alpha/r to bfloat16 first would change the delta of many rows."""
    out, width = shapes[Q]
    A, B = torch.zeros(1, width, dtype=torch.bfloat16), torch.ones(out, 1, dtype=torch.bfloat16)
    A[0, 0] = 1.0
    weight, scaling = 0.7, 1 / 3
    batch = LoraBatch.from_segments(AdapterStack([{Q: LoraWeight(A, B, scaling)}]), [(64, [(0, weight)])], "cpu")
    x = torch.zeros(64, width, dtype=torch.bfloat16)
    x[:, 0] = torch.randn(64, generator=torch.Generator().manual_seed(6)).bfloat16()
    expected = (x[:, 0].float() * (weight * scaling)).bfloat16()
    assert not torch.equal(expected, x[:, 0] * torch.tensor(weight * scaling).bfloat16())
    assert torch.equal(batch.apply(Q, x, torch.zeros(64, out))[:, 0], expected.float())


def test_overflow_of_one_adapter_stays_out_of_the_other_rows() -> None:
    import torch

    from loraserve.lora.adapter import LoraWeight
    from loraserve.lora.batch import LoraBatch
    from loraserve.lora.stack import AdapterStack

    wild = {"q": LoraWeight(torch.full((2, 4), 3e38), torch.ones(4, 2), 2.0)}
    calm = {"q": LoraWeight(torch.ones(2, 4), torch.ones(4, 2), 2.0)}
    lora = LoraBatch.from_segments(AdapterStack([wild, calm]), [(1, [(0, 1.0)]), (1, [(1, 1.0)])], "cpu")
    assert lora is not None
    with torch.inference_mode():
        y = lora.apply("q", torch.ones(2, 4), torch.zeros(2, 4))
    assert not torch.isfinite(y[0]).all()
    assert torch.equal(y[1], torch.full((4,), 16.0))
