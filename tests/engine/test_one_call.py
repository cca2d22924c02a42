"""A step in which every row decodes takes one call of the kernels, which computes the bits that many calls compute."""

import dataclasses
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loraserve.base.load import load_base
from loraserve.base.model import Model
from loraserve.engine.params import SamplingParams
from loraserve.engine.service import Service
from loraserve.kernels.decoder import DecoderKernel
from loraserve.lora.spec import parse_spec
from loraserve.registry import Registry

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
PROMPTS = [[5, 6, 7], list(range(10, 60)), [70, 80], [9] * 33]
SPECS = ["base", "b", "a:0.5+b:0.7", "c"]
WATCHED = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=20)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call."""
    rows: list[int] = []
    run = DecoderKernel.run

    def counted(kernel: DecoderKernel, embedded: torch.Tensor, *args: Any) -> torch.Tensor:
        rows.append(embedded.shape[0])
        return run(kernel, embedded, *args)

    monkeypatch.setattr(DecoderKernel, "run", counted)
    return rows


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def service(request: pytest.FixtureRequest, tiny_base_dir, registry: Registry) -> Iterator[Service]:
    base = load_base(str(tiny_base_dir), device="cpu", dtype=request.param)
    # Deterministic, for else it is left to chance which rows meet in a step.
    service = Service(base, registry, max_model_len=96, max_num_seqs=8, prefix_memory=0, deterministic=True)
    service.start()
    yield service
    service.stop()


def watch(service: Service, *specs: str) -> list[list[object]]:
    asked = [service.generate(prompt, parse_spec(spec), WATCHED) for prompt, spec in zip(PROMPTS, specs, strict=True)]
    return [[token for piece in generation for token in piece.logprobs or ()] for generation in asked]


def test_mixed_adapters_to_the_bit(service: Service, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(service, *SPECS)
    assert max(calls) > 1 and not any(one[i] == one[0] for i in range(1, 4))
    calls.clear()
    monkeypatch.setattr(service.base.model.model, "one_call", None)
    assert watch(service, *SPECS) == one and not calls


def test_the_base_alone_to_the_bit(service: Service, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    one = watch(service, *["base"] * 4)
    assert calls
    monkeypatch.setattr(service.base.model.model, "one_call", None)
    assert watch(service, *["base"] * 4) == one


def test_a_merged_adapter_runs_on_its_own_weights(tiny_base_dir, registry: Registry, calls: list[int]) -> None:
    base = load_base(str(tiny_base_dir), device="cpu", dtype="float32")
    service = Service(base, registry, max_model_len=96, max_num_seqs=8, prefix_memory=0, deterministic=True)
    service.start()
    try:
        before = watch(service, *["base"] * 4)
        merged = service.merge("b").model.model
        assert merged.one_call is not None and merged.one_call is not base.model.model.one_call
        calls.clear()
        with_b = watch(service, *["b"] * 4)
        assert calls and with_b != before
        merged.one_call = None
        calls.clear()
        assert watch(service, *["b"] * 4) == with_b and not calls
        assert watch(service, *["base"] * 4) == before
    finally:
        service.stop()


def test_not_with_experts(tiny_base_dir) -> None:
    config = load_base(str(tiny_base_dir), device="cpu").config
    experts = dataclasses.replace(config, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32)
    model = Model(experts).requires_grad_(False)
    model.pack()
    assert model.model.one_call is None and model.model.fused
