"""The kernels of training against torch's autograd in float64: values and gradients, in both widths."""

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loraserve.base import rope
from loraserve.base.attention import PackedAttention
from loraserve.base.config import ModelConfig
from loraserve.base.model import Model
from loraserve.base.rope import Rope
from loraserve.kernels import train

if shutil.which("cc") is None:
    pytest.skip("no C compiler here", allow_module_level=True)

CONFIG = ModelConfig(
    vocab_size=61, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=80, qk_norm=True, norm_in_float32=True,
)  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def leaf(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def check(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and gradients of the inputs, ours in their dtype beside theirs in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, wanted = ours(*inputs), theirs(*exact)
    assert got.dtype == inputs[0].dtype and wanted.abs().max() > 0.5
    tolerance = 1e-5 if got.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    gradient = torch.randn(got.shape, generator=torch.Generator().manual_seed(99)).to(got.dtype)
    found = torch.autograd.grad(got, inputs, gradient)
    for ours_, theirs_ in zip(found, torch.autograd.grad(wanted, exact, gradient.double()), strict=True):
        assert theirs_.abs().max() > 0.5
        torch.testing.assert_close(ours_.double(), theirs_, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 48), (3, 4, 20), (2, 7)])
def test_norms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.linspace(0.5, 1.5, shape[-1])
    x = leaf(*shape, seed=1, dtype=dtype)
    for cast_first in (False, True):
        check(
            lambda x, cast=cast_first: train.rms_norm(x, weight, 1e-5, cast),
            lambda x: F.rms_norm(x, shape[-1:], weight.double(), 1e-5),
            x,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 48), (1, 7)])
def test_gates(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate, up = leaf(*shape, seed=1, dtype=dtype), leaf(*shape, seed=2, dtype=dtype)
    with torch.no_grad():
        gate[0, :3] = torch.tensor([-100.0, 100.0, -30.0])
    check(train.silu_and_multiply, lambda gate, up: F.silu(gate) * up, gate, up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations(dtype: torch.dtype) -> None:
    cos, sin = Rope(CONFIG)(torch.tensor([0, 3, 1, 17]), 18)
    x = leaf(4, 3, CONFIG.head_dim, seed=1, dtype=dtype)
    exact = cos.double(), sin.double()
    check(lambda x: train.rotate(x, cos, sin), lambda x: rope.rotate(x, *exact), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_shows_in_values_and_gradients(bad: float) -> None:
    gate, up = leaf(2, 32, seed=1, dtype=torch.bfloat16), leaf(2, 32, seed=2, dtype=torch.bfloat16)
    with torch.no_grad():
        gate[1, 5] = bad
    out = train.silu_and_multiply(gate, up)
    assert not out[1, 5].isfinite() and out.isfinite().sum() == out.numel() - 1
    assert not torch.autograd.grad(out, gate, torch.ones_like(out))[0][1, 5].isfinite()
    normed = train.rms_norm(gate, torch.ones(32), 1e-6, False)
    assert normed.isfinite().all(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_trains_with_them_as_without(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(CONFIG).requires_grad_(False).to(dtype)
    for i, parameter in enumerate(model.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    embedded = leaf(9, 48, seed=5, dtype=dtype)
    monkeypatch.setattr(model.model.embed_tokens, "forward", lambda ids: embedded)
    calls = []
    call = train.cpu.call
    monkeypatch.setattr(
        train.cpu, "call", lambda name, *args, **kwargs: (calls.append(name), call(name, *args, **kwargs))
    )

    def gradient() -> tuple[Tensor, Tensor]:
        attention = PackedAttention([4, 5])
        logits = model(torch.zeros(9, dtype=torch.int64), attention.positions, attention)
        (found,) = torch.autograd.grad(logits.float().logsumexp(1).sum(), embedded)
        return logits.detach().float(), found.float()

    with_kernels = gradient()
    assert set(calls) == {"norm", "norm_backward", "gate", "gate_backward", "rotate"}
    monkeypatch.setattr(train, "available", lambda x: False)
    for got, wanted in zip(with_kernels, gradient(), strict=True):
        assert (got - wanted).norm() < (1e-5 if dtype == torch.float32 else 3e-2) * wanted.norm()
