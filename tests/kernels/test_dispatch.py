"""Which kernels a device gets, and that both sets keep one contract."""

import inspect
from collections.abc import Iterator

import pytest
import torch

from loraserve.kernels import cpu, dispatch
from loraserve.kernels.dispatch import Kernels

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    dispatch._cuda.cache_clear()
    yield
    dispatch._cuda.cache_clear()


def test_a_cpu_gets_the_c_kernels_for_what_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: object())
    assert dispatch.of(torch.device("cpu"), torch.float32, 96) is cpu
    assert dispatch.of(torch.device("cpu"), torch.float32, 100) is None
    assert dispatch.of(torch.device("cpu"), torch.float16) is None
    assert dispatch.of(torch.device("meta"), torch.float32) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_where_triton_fails_the_plain_pass_serves_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    assert dispatch.of(CUDA, torch.float32) is None
    assert dispatch.of(CUDA, torch.bfloat16) is None
    (record,) = caplog.records
    assert "the model runs slower without" in record.message


def test_the_kernels_of_cuda_can_be_turned_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LORASERVE_KERNELS", "off")
    assert dispatch.of(CUDA, torch.float32) is None
    assert not caplog.records


def test_both_sets_of_kernels_keep_one_contract() -> None:
    pytest.importorskip("triton", reason="no Triton here")
    from loraserve.kernels import cuda

    names = [name for name in vars(Kernels) if not name.startswith("_")]
    assert len(names) == 7
    for name in names:
        wanted = list(inspect.signature(getattr(Kernels, name)).parameters)[1:]
        assert list(inspect.signature(getattr(cpu, name)).parameters) == wanted
        assert list(inspect.signature(getattr(cuda, name)).parameters) == wanted
    assert cuda.available(torch.float16, 80) and cuda.available(torch.bfloat16, 96)
    assert not cuda.available(torch.float64) and not cuda.available(torch.float32, 8)
