"""All of the CUDA path on a real device: Triton's kernels, CUDA graphs, one wait per step, repeatable bits."""

import warnings

import pytest
import torch

pytest.importorskip("triton", reason="no Triton here")

from loraserve.base.model import Model
from loraserve.engine.graphs import DecodeGraphs, cuda_graphs
from loraserve.engine.params import SamplingParams
from loraserve.engine.runner import Runner
from loraserve.engine.sampler import sample
from loraserve.engine.sequence import Sequence
from tests.engine.test_graphs import SPECS, Adapters, Serving, adapters, model, plain_answers

__all__ = ["adapters", "model"]  # fixtures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
TOKENS = [12, 30, 21, 5, 17]


@pytest.mark.parametrize("model", [2], indirect=True)
def test_cuda_graphs_answer_as_the_plain_path(
    model: Model, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plain_answers(model, adapters, SPECS, TOKENS, monkeypatch)
    base = plain_answers(model, adapters, [{}] * 5, TOKENS, monkeypatch)
    assert all(a != b for a, b in zip(wanted[1:], base[1:], strict=True)), "the adapters must matter"
    serving = Serving(model, cuda_graphs())
    for _ in range(2):  # the second time everything is replayed
        assert serving.answers(adapters, SPECS, TOKENS) == wanted
        assert serving.answers(adapters, [{}] * 5, TOKENS) == base
        serving.answers(adapters, [{"c": 1.0}, {"b": 1.0}], [4, 4])  # other adapters take the recordings in between
    assert all((keys[5] == 0).all() for keys in serving.cache.keys), "padding wrote into the slot that nobody has"


def test_the_engine_takes_the_kernels_and_the_graphs_by_itself(model: Model) -> None:
    serving = Serving(model, None)
    runner = Runner(model, serving.cache)
    assert model.model.fused
    assert isinstance(runner._graphs, DecodeGraphs)


def test_a_replayed_step_repeats_bit_for_bit(model: Model, adapters: Adapters) -> None:
    serving = Serving(model, cuda_graphs())
    serving.answers(adapters, SPECS, [2] * 5)
    ((replay, _),) = serving.engine._runner._graphs._steps.values()
    with torch.inference_mode():
        first = replay().clone()
        assert first[:5].isfinite().all()
        for _ in range(20):
            assert torch.equal(replay()[:5], first[:5])


def test_sampling_waits_for_the_device_once() -> None:
    kinds = [{}, {"temperature": 0.0}, {"logprobs": 3}, {"top_k": 5, "top_p": 0.9},
             {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.1}]  # fmt: skip
    sequences = [Sequence([1, 2], SamplingParams(**kind), 10, output_token_ids=[3, 3, 4]) for kind in kinds]
    logits = torch.randn(len(kinds), 500, device="cuda")
    sample(logits, sequences)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            tokens = sample(logits, sequences)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(tokens)
    assert sum("synchroniz" in str(wait.message) for wait in waits) == 1
