"""The products of packed weights against torch, in every width, and a row's independence of its neighbours."""

import shutil

import pytest
import torch

from loraserve.kernels import gemm

if shutil.which("cc") is None:
    pytest.skip("no C compiler here", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 3, 4, 5, 6, 7, 11, 16, 17, 31, 33]
MANY = [32, 257, 300]
"""Whole tiles, and more rows than stay close at hand."""
INPUTS = [96, 192, 768]
"""Some that are whole tiles in both widths, and some that are not in int8."""


def randn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("out", [16, 64, 80, 130, 9])
def test_products_are_those_of_torch(dtype: torch.dtype, out: int, inputs: int) -> None:
    weight = randn(out, inputs, seed=1, dtype=dtype)
    packed = gemm.PackedWeight(weight)
    for rows in ROWS + MANY:
        x = randn(rows, inputs, seed=rows, dtype=dtype)
        wanted = x.double() @ weight.double().T
        tolerance = 2e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(packed.multiply(x).double(), wanted, rtol=tolerance, atol=inputs / 96 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("out", [64, 130, 9])
def test_int8_products_are_those_of_rounded_numbers(dtype: torch.dtype, out: int, inputs: int) -> None:
    weight = randn(out, inputs, seed=1, dtype=dtype)
    packed = gemm.PackedWeight(weight, int8=True)
    for rows in ROWS + MANY:
        x = randn(rows, inputs, seed=rows, dtype=dtype) * torch.arange(1, rows + 1, dtype=dtype).unsqueeze(1)
        wanted = gemm.multiply_rounded(x, weight)
        # A number half-way between two may be rounded either way, by a fused multiply-add or without: a step of each.
        step = 127 * gemm.rounded(x)[1].unsqueeze(1) * gemm.rounded(weight)[1]
        tolerance = inputs / 48 * step + (1e-5 if dtype == torch.float32 else 1e-2) * wanted.abs()
        assert ((packed.multiply(x).float() - wanted).abs() <= tolerance).all()
        exact = x.double() @ weight.double().T
        error = (wanted - exact).norm() / exact.norm()
        assert 1e-4 < error < 0.02, "either not rounded at all, or too coarsely"


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(dtype: torch.dtype, int8: bool) -> None:
    packed = gemm.PackedWeight(randn(80, 768, seed=1, dtype=dtype), int8)
    x = randn(33, 768, seed=2, dtype=dtype)
    x[3] *= 1000  # a scale shared by the batch would show
    together = packed.multiply(x)
    for rows in ROWS:
        for start in range(0, 33 - rows, 5):
            assert torch.equal(packed.multiply(x[start : start + rows]), together[start : start + rows])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_does_not_hide_a_number_that_is_not_finite(bad: float) -> None:
    packed = gemm.PackedWeight(randn(32, 64, seed=1, dtype=torch.bfloat16), int8=True)
    x = randn(3, 64, seed=2, dtype=torch.bfloat16)
    x[1, 5] = bad
    finite = packed.multiply(x).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, True]


def test_rows_and_weights_of_zeros_are_zero_in_int8() -> None:
    weight = randn(20, 64, seed=1, dtype=torch.float32)
    weight[3] = 0
    x = randn(2, 64, seed=2, dtype=torch.float32)
    x[1] = 0
    y = gemm.PackedWeight(weight, int8=True).multiply(x)
    assert not y[1].any() and not y[:, 3].any() and y[0].abs().max() > 1


def test_int8_weights_take_half_the_memory_of_bfloat16() -> None:
    weight = randn(256, 256, seed=1, dtype=torch.bfloat16)
    assert gemm.PackedWeight(weight).num_bytes == weight.nbytes
    assert gemm.PackedWeight(weight, int8=True).num_bytes == weight.nbytes // 2 + 256 * 8


def test_results_are_rounded_to_bfloat16_as_torch_rounds_them() -> None:
    x = torch.zeros(7, 16, dtype=torch.bfloat16)
    x[:, 0] = x[:, 1] = 1
    weight = randn(40, 16, seed=1, dtype=torch.bfloat16)
    weight[:, 1] *= 2.0**-8  # most sums lie between two numbers, some half-way
    weight[:4, 1] = torch.tensor([float("nan"), float("inf"), float("-inf"), 2.0**-8])
    weight[3, 0] = 1
    wanted = (weight[:, 0].float() + weight[:, 1].float()).bfloat16()
    assert (wanted.float() != weight[:, 0].float()).sum() > 10
    got = gemm.PackedWeight(weight).multiply(x)
    torch.testing.assert_close(got, wanted.expand(7, -1), rtol=0, atol=0, equal_nan=True)
