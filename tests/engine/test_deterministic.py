"""Deterministic: a request's numbers do not depend on what else is in the batch, bit for bit."""

import dataclasses
import shutil
from collections.abc import Iterator

import pytest
import torch

from loraserve.base.load import load_base
from loraserve.base.model import Model
from loraserve.engine.kv_cache import KVCache
from loraserve.engine.params import SamplingParams
from loraserve.engine.runner import Runner
from loraserve.engine.service import Service
from loraserve.errors import InvalidRequest
from loraserve.kernels import build
from loraserve.lora.spec import parse_spec
from loraserve.registry import Registry

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
PROMPTS = [[5, 6, 7], list(range(10, 160)), [70, 80], list(range(100, 180)), [9] * 33]
SPECS = ["base", "b", "a:0.5+b:0.7", "b", "c"]
WATCHED = SamplingParams(max_tokens=15, temperature=0.0, ignore_eos=True, logprobs=20)


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def service(request: pytest.FixtureRequest, tiny_base_dir, registry: Registry) -> Iterator[Service]:
    base = load_base(str(tiny_base_dir), device="cpu", dtype=request.param)
    service = Service(base, registry, max_model_len=192, max_num_seqs=16, prefix_memory=0, deterministic=True)
    service.start()
    yield service
    service.stop()


def watch(service: Service, asked: list[tuple[list[int], str]]) -> list[list[object]]:
    """Every token with its log-probabilities, of requests at once."""
    generations = [service.generate(prompt, parse_spec(spec), WATCHED) for prompt, spec in asked]
    return [[token for piece in generation for token in piece.logprobs or ()] for generation in generations]


@needs_compiler
def test_log_probabilities_alone_and_in_a_crowd_are_the_same_bits(service: Service) -> None:
    asked = list(zip(PROMPTS, SPECS, strict=True))
    alone = [watch(service, [one])[0] for one in asked]
    assert watch(service, asked) == alone
    crowd = watch(service, [asked[1], *asked[::-1], *asked])
    assert crowd == [alone[1], *alone[::-1], *alone]
    assert all(len(answer) == 15 for answer in alone)


@needs_compiler
def test_shared_prefixes_do_not_change_a_bit(tiny_base_dir, registry: Registry) -> None:
    base = load_base(str(tiny_base_dir), device="cpu", dtype="bfloat16")
    service = Service(base, registry, max_model_len=192, max_num_seqs=4, deterministic=True)
    service.start()
    try:
        first, second = (watch(service, [(PROMPTS[1], "b")]) for _ in range(2))
        assert service.stats()["prefix_shared_tokens_total"] == len(PROMPTS[1]) - 1
        assert first == second
    finally:
        service.stop()


def test_without_kernels_it_is_refused(tiny_base_dir, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASERVE_KERNELS", "off")
    build.library.cache_clear()
    try:
        base = load_base(str(tiny_base_dir), device="cpu", dtype="float32")
        with pytest.raises(InvalidRequest, match="deterministic needs the kernels"):
            Service(base, registry, max_model_len=192, deterministic=True)
    finally:
        build.library.cache_clear()


@needs_compiler
def test_heads_that_no_kernel_reads_are_refused(tiny_base_dir) -> None:
    config = dataclasses.replace(load_base(str(tiny_base_dir), device="cpu").config, head_dim=24)
    odd = Model(config)
    with pytest.raises(InvalidRequest, match="heads of 24"):
        Runner(odd, KVCache(odd.config, 1, 8, torch.device("cpu"), torch.float32), deterministic=True)
