"""Each Triton kernel against plain torch: by Triton's interpreter, or on a GPU where there is one."""

import pytest
import torch
import torch.nn.functional as F

from loraserve.base.model import RMSNorm
from loraserve.base.rope import rotate

pytest.importorskip("triton", reason="no Triton here")

from loraserve.kernels import cuda

# What overflows on purpose makes numpy, which interprets the kernels, warn.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal to float32's rounding, or to about two steps of the half precisions (bfloat16 has 8 bits, float16 11)."""
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    assert got.dtype == dtype
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cast_first", [True, False])
@pytest.mark.parametrize("with_y", [True, False])
def test_add_rms_norm(dtype: torch.dtype, cast_first: bool, with_y: bool) -> None:
    x, y = randn(5, 70), randn(5, 70, seed=1, dtype=dtype) if with_y else None
    weight = (1 + 0.3 * randn(70, seed=2)).to(dtype)
    total = x + y if y is not None else x.clone()
    normed = F.rms_norm(total, (70,), None, 1e-5)
    wanted = weight * normed.to(dtype) if cast_first else (normed * weight.float()).to(dtype)
    rows = [cuda.add_rms_norm(x[i : i + 1].clone(), y[i : i + 1].contiguous() if y is not None else None,
                              weight.float(), 1e-5, cast_first, dtype) for i in range(5)]  # fmt: skip
    got = cuda.add_rms_norm(x, y, weight.float(), 1e-5, cast_first, dtype)
    close(got, wanted, dtype)
    torch.testing.assert_close(x, total)  # the residual stream has gone on
    assert torch.equal(got, torch.cat(rows)), "a row depends on its neighbours"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("d", [32, 80, 96])
def test_norm_and_rotate(dtype: torch.dtype, normed: bool, d: int) -> None:
    h, kv, n = 3, 1, 4
    qkv = randn(n, (h + 2 * kv) * d, dtype=dtype)
    positions = torch.tensor([0, 3, 9, 1], device=DEVICE)
    angles = torch.outer(torch.arange(10).float(), 0.7 ** torch.arange(d // 2)).repeat(1, 2)
    table = torch.stack([angles.cos(), angles.sin()], dim=1).to(DEVICE)
    norms = [RMSNorm(d, 1e-6, True).to(DEVICE), RMSNorm(d, 1e-6, True).to(DEVICE)]
    for i, norm in enumerate(norms):
        norm.weight.data = 1 + 0.3 * randn(d, seed=i)
    q, k, v = (x.unflatten(-1, (-1, d)) for x in qkv.clone().split((h * d, kv * d, kv * d), dim=-1))
    if normed:
        q, k = norms[0](q), norms[1](k)
    cos, sin = (table[positions][:, i, None] for i in range(2))
    wanted = torch.cat([x.flatten(1) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v)], dim=1)
    weights = (norms[0].weight.detach(), norms[1].weight.detach()) if normed else None
    cuda.norm_and_rotate(qkv, (h, kv, d), weights, 1e-6, False, table, positions)
    close(qkv, wanted, dtype)
    assert torch.equal(qkv[:, (h + kv) * d :], v.flatten(1)), "values must stay as they are"


def test_a_norm_that_casts_first_rounds_twice() -> None:
    """Norms before and after the cast differ in some bits: both orders must be the plain norm's, to the bit."""
    d, table = 64, torch.tensor([[[1.0] * 64, [0.0] * 64]], device=DEVICE)
    outs = {}
    for in_float32 in (True, False):
        norm = RMSNorm(d, 1e-6, in_float32).to(DEVICE, torch.float16)  # bfloat16 the interpreter does not round
        norm.weight.data = (1 + 0.3 * randn(d, seed=3)).half()
        qkv = randn(40, 3 * d, dtype=torch.float16)
        wanted = norm(qkv[:, :d])
        weight = norm.weight.detach().float()
        cuda.norm_and_rotate(qkv, (1, 1, d), (weight, weight), 1e-6, not in_float32, table, torch.zeros(40, dtype=torch.int64, device=DEVICE))  # fmt: skip
        outs[in_float32] = qkv[:, :d]
        assert (outs[in_float32] != wanted).float().mean() < 0.002
    assert (outs[True] != outs[False]).float().mean() > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "h", "kv"), [(16, 4, 4), (64, 8, 2), (80, 6, 2), (96, 8, 4), (128, 4, 1)])
def test_store_and_attend(dtype: torch.dtype, d: int, h: int, kv: int) -> None:
    slots, longest = 4, 90
    keys, values = randn(slots, kv, longest, d, dtype=dtype), randn(slots, kv, longest, d, seed=1, dtype=dtype)
    before = keys.clone()
    where, positions = [2, 0, 3, 3], [0, 65, 88, 89]  # the last row only stores
    q, k, v = (x.unflatten(-1, (-1, d)) for x in randn(4, (h + 2 * kv) * d, seed=2, dtype=dtype).split(
        (h * d, kv * d, kv * d), dim=-1))  # fmt: skip
    values[0, :, 66:] = torch.nan  # nobody may look beyond its position
    out = torch.full((4, h, d), 7.0, dtype=dtype, device=DEVICE)
    cuda.store_and_attend(q, k, v, keys, values, *tensors(where, positions), 3, longest, out)
    for i in range(4):
        assert torch.equal(keys[where[i], :, positions[i]], k[i])
        assert torch.equal(values[where[i], :, positions[i]], v[i])
    assert torch.equal(keys[1], before[1])
    for i in range(3):
        past = slice(positions[i] + 1)
        wanted = F.scaled_dot_product_attention(
            q[i, :, None].float()[None], keys[where[i], :, past].float()[None],
            values[where[i], :, past].float()[None], enable_gqa=True,
        )  # fmt: skip
        close(out[i], wanted[0, :, 0], dtype)
    assert (out[3] == 7).all()


def tensors(*lists: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(values, device=DEVICE) for values in lists]


def test_a_context_of_several_splits_attends_as_a_whole_and_alike_in_any_batch() -> None:
    kv, h, d, longest = 1, 2, 16, 700
    keys, values = randn(3, kv, longest, d) * 3, randn(3, kv, longest, d, seed=1)
    q = randn(3, h, d, seed=2)
    positions = [699, 300, 5]
    k, v = (torch.stack([cache[i, :, p] for i, p in enumerate(positions)]) for cache in (keys, values))
    outs = []
    for rows in ([0, 1, 2], [1], [2]):
        out = torch.empty(len(rows), h, d, device=DEVICE)
        reach = max(positions[i] for i in rows) + 1
        cuda.store_and_attend(q[rows], k[rows], v[rows], keys, values, *tensors(rows, [positions[i] for i in rows]),
                              len(rows), reach, out)  # fmt: skip
        outs.append(out)
    for i, position in enumerate(positions):
        past = slice(position + 1)
        wanted = F.scaled_dot_product_attention(q[i, :, None][None], keys[i, :, past][None], values[i, :, past][None],
                                                enable_gqa=True)  # fmt: skip
        close(outs[0][i], wanted[0, :, 0], torch.float32)
    assert torch.equal(outs[0][1:], torch.cat(outs[1:])), "another row's context changed a row's bits"


def test_a_row_without_a_slot_stores_nothing_and_gets_zeros() -> None:
    keys, values = randn(2, 1, 8, 16), randn(2, 1, 8, 16, seed=1)
    before = keys.clone(), values.clone()
    q = k = v = torch.full((2, 1, 16), 3.0, device=DEVICE)
    out = torch.full((2, 1, 16), torch.nan, device=DEVICE)
    cuda.store_and_attend(q, k, v, keys, values, *tensors([-1, 1], [0, 4]), 2, 8, out)
    assert (out[0] == 0).all()
    assert out[1].isfinite().all()
    assert torch.equal(keys[0], before[0][0]) and torch.equal(values[0], before[1][0])
    keys[1, 0, 4], values[1, 0, 4] = before[0][1, 0, 4], before[1][1, 0, 4]
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_not_hidden_and_stays_in_its_row(bad: float) -> None:
    for name in ("keys", "values"):
        cache = {"keys": torch.zeros(2, 1, 8, 16), "values": torch.ones(2, 1, 8, 16)}
        cache[name][1, 0, 1] = bad
        cache = {key: value.to(DEVICE) for key, value in cache.items()}
        q, k, v = (torch.ones(2, 1, 16, device=DEVICE) for _ in range(3))
        out = torch.zeros(2, 1, 16, device=DEVICE)
        cuda.store_and_attend(q, k, v, cache["keys"], cache["values"], *tensors([0, 1], [3, 3]), 2, 8, out)
        assert (out[0] == 1).all()
        if (name, bad) == ("keys", float("-inf")):  # a score of -inf is no weight at all, as in the plain path
            torch.testing.assert_close(out[1], torch.ones_like(out[1]))
        else:
            assert not out[1].isfinite().any()
    gate_up = torch.tensor([[bad, 1.0]], device=DEVICE)
    plain = F.silu(gate_up[:, :1]) * gate_up[:, 1:]
    torch.testing.assert_close(cuda.silu_and_multiply(gate_up), plain, equal_nan=True)
    x = torch.full((1, 4), bad, device=DEVICE)
    weight = torch.ones(4, device=DEVICE)
    assert not cuda.add_rms_norm(x, None, weight, 1e-6, False, torch.bfloat16).isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_multiply(dtype: torch.dtype) -> None:
    gate = torch.cat([randn(3, 1200) * 5, torch.tensor([[-200.0, -88.5, 88.5, 200.0, 0.0, -0.0]] * 3).to(DEVICE)], 1)
    up = randn(3, 1206, seed=1)
    gate_up = torch.cat([gate, up], dim=1).to(dtype)
    gate, up = gate_up.float().chunk(2, dim=1)
    close(cuda.silu_and_multiply(gate_up), F.silu(gate) * up, dtype)


def test_no_rows_are_no_work() -> None:
    nothing = torch.empty(0, 32, device=DEVICE)
    assert cuda.silu_and_multiply(nothing).shape == (0, 16)
    assert cuda.add_rms_norm(nothing, None, torch.ones(32, device=DEVICE), 1e-6, True, torch.float32).shape == (0, 32)
