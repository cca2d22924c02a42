"""Sequences laid end to end see only themselves."""

from pathlib import Path

import pytest
import torch

from loraserve.base.attention import PackedAttention
from tests.base.reference import IDS, our_logits, our_model


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 7, 3], [9, 1, 1, 6]])
def test_packed_sequences_are_as_each_alone(lengths: list[int], tiny_base_dir: Path) -> None:
    model = our_model(tiny_base_dir)
    sequences = [[(token * (i + 1)) % 500 for token in IDS[:length]] for i, length in enumerate(lengths)]
    alone = [our_logits(model, ids) for ids in sequences]
    attention = PackedAttention(lengths)
    assert attention.positions.tolist() == [t for length in lengths for t in range(length)]
    packed = model(torch.tensor([token for ids in sequences for token in ids]), attention.positions, attention)
    for got, wanted in zip(packed.split(lengths), alone, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_later_tokens_change_nothing_before_them(tiny_base_dir: Path) -> None:
    model = our_model(tiny_base_dir)
    one, other = our_logits(model, [5, 6, 7, 8]), our_logits(model, [5, 6, 9, 9])
    assert torch.equal(one[:2], other[:2])
    assert (one[2:] - other[2:]).abs().max() > 0.1


def test_only_the_rows_asked_for_have_logits(tiny_base_dir: Path) -> None:
    model = our_model(tiny_base_dir)
    attention = PackedAttention([3, 2])
    ids = torch.tensor([5, 6, 7, 8, 9])
    every = model(ids, attention.positions, attention)
    rows = torch.tensor([4, 2])
    torch.testing.assert_close(model(ids, attention.positions, attention, rows=rows), every[rows])


def test_gradients_reach_every_token_of_their_own_sequence_and_no_other(tiny_base_dir: Path) -> None:
    attention = PackedAttention([3, 2])
    q, k, v = (torch.randn(5, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    attention.attend(0, q, k, v)[2].sum().backward()  # the last row of the first sequence
    assert v.grad is not None
    assert v.grad.abs().sum(dim=(1, 2)).gt(0).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("tiles", "length", "expected"),
    [(True, 200, torch.bfloat16), (True, 20, torch.float32), (False, 200, torch.float32)],
)
def test_bfloat16_is_attended_to_in_the_width_that_is_faster_and_with_the_same_gradients(
    tiles: bool, length: int, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[torch.dtype] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        widths.append(q.dtype)
        return attend(q, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles})
    lengths = [length, 7]
    leaves = [
        torch.randn(sum(lengths), heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 3)
    ]
    leaves[2] = leaves[2][:, :2]

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = (leaf.to(dtype).requires_grad_() for leaf in leaves)
        out = PackedAttention(lengths).attend(0, q, k, v)
        assert out.dtype == dtype
        (out.float() * torch.arange(16)).sum().backward()
        return [out.detach().float(), *(x.grad.float() for x in (q, k, v) if x.grad is not None)]

    rough = gradients(torch.bfloat16)
    assert set(widths) == {expected}
    for got, wanted in zip(rough, gradients(torch.float32), strict=True):
        assert 1e-5 < (got - wanted).norm() / wanted.norm() < 0.02
