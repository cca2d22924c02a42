"""Each C kernel against torch, and the whole model over kernels against its plain pass."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from loraserve.base.attention import PackedAttention
from loraserve.base.config import ModelConfig
from loraserve.base.model import Model, RMSNorm
from loraserve.base.rope import rotate
from loraserve.kernels import cpu
from loraserve.lora.adapter import LoraWeight
from loraserve.lora.batch import LoraBatch, apply_one_by_one
from loraserve.lora.stack import AdapterStack

if shutil.which("cc") is None:
    pytest.skip("no C compiler here", allow_module_level=True)


def test_the_kernels_are_there() -> None:
    assert cpu.available(torch.float32), "a compiler, and yet no kernels: the rest of this file would test nothing"


DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal to float32's rounding, or to about one step of bfloat16."""
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_float32", [True, False])
@pytest.mark.parametrize("with_y", [True, False])
def test_add_rms_norm(dtype: torch.dtype, in_float32: bool, with_y: bool) -> None:
    x, y = randn(5, 70), randn(5, 70, seed=1, dtype=dtype) if with_y else None
    norm = RMSNorm(70, 1e-5, in_float32).to(dtype)
    norm.weight.data = (1 + 0.3 * randn(70, seed=2)).to(dtype)
    total = x + y if y is not None else x.clone()
    wanted = F.rms_norm(total, (70,), None, 1e-5)
    wanted = (wanted * norm.weight.float()).to(dtype) if in_float32 else norm.weight * wanted.to(dtype)
    rows = [cpu.add_rms_norm(x[i : i + 1].clone(), y[i : i + 1].contiguous() if y is not None else None,
                             norm.weight.float(), 1e-5, not in_float32, dtype) for i in range(5)]  # fmt: skip
    got = cpu.add_rms_norm(x, y, norm.weight.float(), 1e-5, not in_float32, dtype)
    close(got, wanted, dtype)
    torch.testing.assert_close(x, total)  # the residual stream has gone on
    assert torch.equal(got, torch.cat(rows)), "a row depends on its neighbours"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
def test_norm_and_rotate(dtype: torch.dtype, normed: bool) -> None:
    h, kv, d, n = 4, 2, 32, 6
    qkv = randn(n, (h + 2 * kv) * d, dtype=dtype)
    positions = torch.tensor([0, 3, 9, 1, 1, 7])
    angles = torch.outer(torch.arange(10).float(), 0.7 ** torch.arange(d // 2)).repeat(1, 2)
    table = torch.stack([angles.cos(), angles.sin()], dim=1)
    norms = [RMSNorm(d, 1e-6, True), RMSNorm(d, 1e-6, True)]
    for i, norm in enumerate(norms):
        norm.weight.data = 1 + 0.3 * randn(d, seed=i)
    q, k, v = (x.unflatten(-1, (-1, d)) for x in qkv.clone().split((h * d, kv * d, kv * d), dim=-1))
    if normed:
        q, k = norms[0](q), norms[1](k)
    cos, sin = (table[positions][:, i, None] for i in range(2))
    wanted = torch.cat([x.flatten(1) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v)], dim=1)
    weights = (norms[0].weight.detach(), norms[1].weight.detach()) if normed else None
    cpu.norm_and_rotate(qkv, (h, kv, d), weights, 1e-6, False, table, positions)
    close(qkv, wanted, dtype)
    assert torch.equal(qkv[:, (h + kv) * d :], v.flatten(1)), "values must stay as they are"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 64, 80, 96, 128, 160, 256])
def test_store_and_attend(dtype: torch.dtype, d: int) -> None:
    h, kv, slots, longest = 6, 2, 4, 40
    keys, values = randn(slots, kv, longest, d, dtype=dtype), randn(slots, kv, longest, d, seed=1, dtype=dtype)
    where, positions = torch.tensor([2, 0, 3, 3]), torch.tensor([0, 25, 38, 39])  # the last row only stores
    q, k, v = (x.unflatten(-1, (-1, d)) for x in randn(4, (h + 2 * kv) * d, seed=2, dtype=dtype).split(
        (h * d, kv * d, kv * d), dim=-1))  # fmt: skip
    values[0, :, 26:] = torch.nan  # nobody may look beyond its position
    out = torch.full((4, h, d), 7.0, dtype=dtype)
    cpu.store_and_attend(q, k, v, keys, values, where, positions, 3, longest, out)
    for i in range(4):
        assert torch.equal(keys[where[i], :, positions[i]], k[i])
        assert torch.equal(values[where[i], :, positions[i]], v[i])
    for i in range(3):
        past = slice(int(positions[i]) + 1)
        wanted = F.scaled_dot_product_attention(
            q[i, :, None].float()[None], keys[where[i], :, past].float()[None],
            values[where[i], :, past].float()[None], enable_gqa=True,
        )  # fmt: skip
        close(out[i], wanted[0, :, 0], dtype)
    assert (out[3] == 7).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden_and_stays_in_its_row(bad: float) -> None:
    keys, values = torch.zeros(2, 1, 8, 16), torch.ones(2, 1, 8, 16)
    q, k, v = (torch.ones(2, 1, 16) for _ in range(3))
    keys[1, 0, 1] = bad
    out = torch.zeros(2, 1, 16)
    cpu.store_and_attend(q, k, v, keys, values, torch.tensor([0, 1]), torch.tensor([3, 3]), 2, 8, out)
    assert (out[0] == 1).all()
    assert not out[1].isfinite().any()
    assert not cpu.silu_and_multiply(torch.full((1, 2), bad)).isfinite().any()
    assert (
        not cpu.add_rms_norm(torch.full((1, 4), bad), None, torch.ones(4), 1e-6, False, torch.bfloat16).isfinite().any()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_multiply(dtype: torch.dtype) -> None:
    gate = torch.cat([randn(3, 600) * 5, torch.tensor([[-200.0, -88.5, 88.5, 200.0, 0.0, -0.0]] * 3)], dim=1)
    up = randn(3, 606, seed=1)
    gate_up = torch.cat([gate, up], dim=1).to(dtype)
    gate, up = gate_up.float().chunk(2, dim=1)
    close(cpu.silu_and_multiply(gate_up), F.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deltas_of_a_few_rows(dtype: torch.dtype) -> None:
    """Ranks and targets that differ, two rows of one adapter, a blend, a row of the base, a wide layer."""
    widths, inputs = (300, 20, 513), 48
    targets = ("q", "k", "v")

    def adapter(seed: int, ranks: dict[str, int]) -> dict[str, LoraWeight]:
        return {
            t: LoraWeight(randn(r, inputs, seed=seed), randn(widths[targets.index(t)], r, seed=seed + 1), 0.1 * seed)
            for t, r in ranks.items()
        }

    adapters = [adapter(1, {"q": 3, "v": 8}), adapter(3, {"q": 1, "k": 5, "v": 2}), adapter(5, {"k": 4})]
    segments = [(2, [(0, 1.0)]), (1, []), (1, [(1, 0.5), (2, -1.5)]), (1, [(2, 1.0)]), (1, [(0, 2.0)])]
    batch = LoraBatch.from_segments(AdapterStack(adapters), segments, "cpu")
    assert batch is not None
    x, y = randn(6, inputs, seed=8, dtype=dtype), randn(6, sum(widths), seed=9, dtype=dtype)
    y[2, 0] = -0.0
    wanted = [apply_one_by_one(batch, t, x.float(), part.float())
              for t, part in zip(targets, y.split(widths, dim=1), strict=True)]  # fmt: skip
    assert all((w - part).abs().max() > 0.5 for w, part in zip(wanted, y.split(widths, dim=1), strict=True))
    before = y[2].clone()
    with torch.inference_mode():
        got = batch.add(targets, widths, x, y)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.float(), torch.cat(wanted, dim=1), rtol=tolerance, atol=tolerance)
    assert torch.equal(got[2].view(torch.uint8), before.view(torch.uint8)), "the base's row was written"


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("norms", [{"qk_norm": True, "norm_in_float32": True}, {"qk_norm": False}])
def test_the_model_over_kernels_computes_what_the_plain_pass_computes(
    experts: int, norms: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(
        vocab_size=61, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=80, num_experts=experts, num_experts_per_tok=2 if experts else 0,
        moe_intermediate_size=24 if experts else 0, **norms,
    )  # fmt: skip
    model = Model(config).requires_grad_(False)
    for i, parameter in enumerate(model.parameters()):
        parameter.copy_(randn(*parameter.shape, seed=i) * 0.1 + (parameter.ndim == 1))
    adapters = [
        {
            t: LoraWeight(randn(r, i, seed=r), 0.3 * randn(o, r, seed=o), 0.5)
            for t, (o, i) in config.linear_shapes().items()
        }
        for r in (2, 5)
    ]
    lengths = [7, 20, 3]
    segments = [(7, [(0, 1.0)]), (20, [(1, 0.7)]), (3, [])]
    ids = torch.randint(0, 61, (30,), generator=torch.Generator().manual_seed(3))

    def logits(lora: bool) -> torch.Tensor:
        attention = PackedAttention(lengths)
        batch = LoraBatch.from_segments(AdapterStack(adapters), segments, "cpu") if lora else None
        with torch.inference_mode():
            return model(ids, attention.positions, attention, batch)

    with monkeypatch.context() as without:
        without.setattr(cpu, "available", lambda *_: False)
        plain = [logits(False), logits(True)]
    assert (plain[1] - plain[0])[:27].abs().max() > 0.1
    # An expert that adapters send other rows to multiplies another number of them, and torch may then round otherwise.
    torch.testing.assert_close(plain[1][27:], plain[0][27:], rtol=0, atol=1e-5 if experts else 0)
    model.pack()
    assert model.model.fused
    torch.testing.assert_close([logits(False), logits(True)], plain, rtol=1e-4, atol=1e-4)
    if experts or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return  # a router's choice between close scores may turn on a rounding
    half = Model(config).requires_grad_(False).bfloat16()
    half.load_state_dict(model.state_dict())
    half.pack()
    model = half
    rough = [logits(False), logits(True)]
    for got, wanted in zip(rough, plain, strict=True):
        assert (got.float() - wanted).norm() < 0.04 * wanted.norm()
