"""The Triton deltas against one row and one adapter at a time."""

import pytest
import torch

pytest.importorskip("triton", reason="no Triton here")

from loraserve.kernels import cuda, dispatch
from loraserve.lora.adapter import LoraWeight
from loraserve.lora.batch import LoraBatch, apply_one_by_one
from loraserve.lora.stack import AdapterStack

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS, INPUTS, TARGETS = (300, 20, 144), 200, ("q", "k", "v")
RANKS = [{"q": 3, "v": 64}, {"q": 1, "k": 17, "v": 2}, {"k": 16}, {"q": 33, "k": 8, "v": 8}, {"v": 5}]
SEGMENTS = [
    (2, [(0, 1.0)]),
    (1, []),
    (1, [(1, 0.5), (2, -1.5), (3, 0.25)]),  # a blend of adapters with different ranks and targets
    (1, [(2, 1.0)]),
    (1, [(0, 2.0)]),
    (1, [(3, 1.0)]),
]
"""Nobody asks for the last adapter."""


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "of", lambda device, dtype, head_dim=16: cuda)


@pytest.fixture
def batch() -> LoraBatch:
    adapters = [
        {
            t: LoraWeight(0.2 * randn(r, INPUTS, seed=i), randn(WIDTHS[TARGETS.index(t)], r, seed=i + 9), 0.1 + 0.1 * i)
            for t, r in ranks.items()
        }
        for i, ranks in enumerate(RANKS)
    ]
    batch = LoraBatch.from_segments(AdapterStack(adapters), SEGMENTS, DEVICE)
    assert batch is not None
    return batch


def add(batch: LoraBatch, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return batch.add(TARGETS, WIDTHS, x, y.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deltas_of_a_few_rows(batch: LoraBatch, dtype: torch.dtype) -> None:
    x, y = randn(7, INPUTS, seed=30).to(dtype), randn(7, sum(WIDTHS), seed=31).to(dtype)
    y[2, 0] = y[4, 3] = -0.0  # row 4's adapter has no q
    parts = y.split(WIDTHS, dim=1)
    wanted = [apply_one_by_one(batch, t, x.float(), part.float()) for t, part in zip(TARGETS, parts, strict=True)]
    assert all((w - part).abs().max() > 0.5 for w, part in zip(wanted, parts, strict=True))
    got = add(batch, x, y)
    # float32 to its rounding; A and B in bfloat16 have 8 bits; beside float16 they stay float32, and y rounds to 11
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(got.float(), torch.cat(wanted, dim=1), rtol=tolerance, atol=tolerance)
    for row, cols in ((2, slice(None)), (4, slice(300)), (4, slice(320, None))):
        assert torch.equal(got[row, cols].view(torch.uint8), y[row, cols].view(torch.uint8)), "nothing to add, written"
    assert torch.equal(add(batch, x, y), got), "the same sums in another order"


def test_a_row_of_deltas_is_the_same_alone(batch: LoraBatch) -> None:
    x, y = randn(7, INPUTS, seed=30), randn(7, sum(WIDTHS), seed=31)
    together = add(batch, x, y)
    for row in (0, 3, 5):
        alone = batch.select(torch.tensor([row]))
        assert torch.equal(add(alone, x[row : row + 1], y[row : row + 1])[0], together[row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_row_and_its_adapter(batch: LoraBatch, bad: float) -> None:
    x, y = randn(7, INPUTS, seed=30), randn(7, sum(WIDTHS), seed=31)
    clean = add(batch, x, y)
    x[0, 5] = bad
    got = add(batch, x, y)
    assert torch.equal(got[1:], clean[1:])
    assert not got[0, :300].isfinite().any()
    assert torch.equal(got[0, 300:320], y[0, 300:320]), "the row's adapter has no k"
    x[0, 5] = 0.0
    batch.stack.adapters[2]["k"].A[0, 0] = bad  # of rows 3 and 4
    batch.stack._deltas.clear()
    got = add(batch, x, y)
    assert (~got.isfinite()).any(dim=1).tolist() == [False, False, False, True, True, False, False]


def test_adapters_with_many_rows_and_with_few_share_a_step() -> None:
    """Many rows of one adapter are a matrix product, the others a kernel's."""
    adapters = [{"q": LoraWeight(randn(4, 24, seed=i), randn(40, 4, seed=i + 5), 0.5)} for i in range(3)]
    segments = [(1, [(1, 1.0)]), (30, [(0, 1.0)]), (2, [(2, 0.5), (1, 0.5)])]
    batch = LoraBatch.from_segments(AdapterStack(adapters), segments, DEVICE)
    x, y = randn(33, 24, seed=7), randn(33, 40, seed=8)
    wanted = apply_one_by_one(batch, "q", x, y)
    with torch.inference_mode():
        got = batch.apply("q", x, y)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert {type(work).__name__ for plan in batch._plans.values() for work in plan} == {"_Alone", "_Few"}
