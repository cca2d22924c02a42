"""Recorded decoding steps: the Triton path as a whole, buckets and padding, against the plain path.

Without a GPU the kernels are interpreted and a recording just computes the step again.
"""

from collections.abc import Callable

import pytest
import torch

from tests.conftest import TRITON, MakeAdapter, random_weights

pytest.importorskip("triton", minversion=TRITON, reason="no Triton, or none new enough, here")

from loraserve.base.config import ModelConfig
from loraserve.base.model import Model
from loraserve.engine.graphs import DecodeGraphs, Step, bucket
from loraserve.engine.kv_cache import KVCache
from loraserve.engine.params import SamplingParams
from loraserve.engine.runner import Runner
from loraserve.engine.scheduler import Chunk
from loraserve.engine.sequence import Sequence
from loraserve.kernels import cuda, dispatch
from loraserve.lora import table
from loraserve.lora.adapter import Adapter

Adapters = dict[str, Adapter]
PROMPTS = [[5, 6, 7], [10, 11, 12, 13, 14], [70, 80], [200], [100, 200]]
SPECS: list[dict[str, float]] = [{}, {"a": 1.0}, {"b": 0.5, "a": 0.7}, {"c": 1.0}, {"a": -0.5, "c": 0.5, "b": 1.0}]
SLOTS, LENGTH = 6, 48


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels, wherever the model is."""
    monkeypatch.setattr(dispatch, "of", lambda device, dtype, head_dim=16: cuda)
    monkeypatch.setattr(table, "LEAST_MOST", 16)  # less to interpret


@pytest.fixture(params=[1])
def model(request: pytest.FixtureRequest) -> Model:
    config = ModelConfig(
        vocab_size=230, hidden_size=48, num_hidden_layers=request.param, num_attention_heads=2, num_key_value_heads=1, head_dim=24,
        intermediate_size=80, qk_norm=True, tie_word_embeddings=False,
    )  # fmt: skip
    model = Model(config).requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    model.load_state_dict(random_weights(config))
    return model


@pytest.fixture
def adapters(model: Model, random_adapter: MakeAdapter) -> Adapters:
    shapes = model.config.linear_shapes()
    targets = {"a": ["q_proj", "down_proj"], "b": "all-linear", "c": ["v_proj", "lm_head"]}
    made = {name: random_adapter(shapes, chosen, 2 + 3 * i, i) for i, (name, chosen) in enumerate(targets.items())}
    return {name: adapter.to(model.lm_head.weight.device, torch.float32) for name, adapter in made.items()}


class Recorder:
    """Records by remembering the step, and counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: Step) -> Step:
        self.recorded += 1

        def replay() -> torch.Tensor:
            self.replayed += 1
            return step()

        return replay


class Serving:
    """A runner over its own cache, with or without recordings."""

    def __init__(self, model: Model, record: Callable[[Step], Step] | None) -> None:
        device = model.lm_head.weight.device
        self.cache = KVCache(model.config, SLOTS, LENGTH, device, torch.float32)
        self.runner = Runner(model, self.cache)
        self.runner._graphs = DecodeGraphs(model, self.cache, record) if record else None

    def answers(self, adapters: Adapters, specs: list[dict[str, float]], tokens: list[int]) -> list[list[int]]:
        """All prompts in one step, then a token of each sequence per step."""
        params = SamplingParams(temperature=0.0)
        sequences = [
            Sequence(prompt, params, count, tuple((adapters[name], weight) for name, weight in spec.items()))
            for prompt, spec, count in zip(PROMPTS, specs, tokens, strict=False)
        ]
        for slot, sequence in enumerate(sequences):
            sequence.slot = slot
        running = sorted(sequences, key=lambda s: len(s.prompt_token_ids) > 1)  # a step begins with single tokens
        chunks = [Chunk(s, 0, len(s.prompt_token_ids)) for s in running]
        while chunks:
            results = self.runner.run(chunks)
            assert [chunk.sequence for chunk, _ in results] == running
            running = [chunk.sequence for chunk, (token,) in results if chunk.sequence.append(token.token_id) is None]
            chunks = [Chunk(s, s.num_tokens - 1, 1) for s in running]
        self.runner.forget_adapters()
        return [sequence.output_token_ids for sequence in sequences]


def plain_answers(
    model: Model, adapters: Adapters, specs: list[dict[str, float]], tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> list[list[int]]:
    with monkeypatch.context() as without:
        without.setattr(dispatch, "of", lambda *_: None)
        return Serving(model, None).answers(adapters, specs, tokens)


TOKENS = [2, 4, 3, 1, 2]
"""The batch shrinks from five rows to one."""


@pytest.mark.parametrize("model", [2], indirect=True)
def test_the_kernels_and_the_recordings_answer_as_the_plain_path(
    model: Model, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plain_answers(model, adapters, SPECS, TOKENS, monkeypatch)
    assert not model.model.fused
    base = plain_answers(model, adapters, [{}] * 5, TOKENS, monkeypatch)
    assert all(a != b for a, b in zip(wanted[1:], base[1:], strict=True)), "the adapters must matter"
    assert Serving(model, None).answers(adapters, SPECS, TOKENS) == wanted
    assert model.model.fused
    recorder = Recorder()
    serving = Serving(model, recorder)
    assert serving.answers(adapters, SPECS, TOKENS) == wanted
    assert recorder.replayed == max(TOKENS) - 1, "every step after the prompts' is a recorded one"
    assert all((keys[5] == 0).all() for keys in serving.cache.keys), "padding wrote into the slot that nobody has"
    assert serving.answers(adapters, [{}] * 5, TOKENS) == base


def test_a_step_is_padded_to_a_bucket_and_recorded_once(model: Model, adapters: Adapters) -> None:
    recorder = Recorder()
    serving = Serving(model, recorder)
    first = serving.answers(adapters, [{"a": 1.0}] * 3, [2] * 3)
    assert recorder.recorded == 1
    assert serving.answers(adapters, [{}] * 3, [2] * 3) != first
    assert recorder.recorded == 2, "the base alone has a recording of its own"
    assert serving.answers(adapters, [{"c": 1.0}, {"b": 1.0}, {}, {"a": 1.0}], [2] * 4) != first
    assert recorder.recorded == 2, "other adapters, and four rows instead of three, take the same recording"
    assert serving.answers(adapters, [{"a": 1.0}] * 3, [2] * 3) == first
    assert (recorder.recorded, recorder.replayed) == (2, 4)


def test_adapters_come_and_go_without_staying_in_memory(model: Model, adapters: Adapters) -> None:
    """The table holds what runs, and no more than as much again."""
    serving = Serving(model, Recorder())
    table = serving.runner._graphs._adapters
    a, b, c = adapters.values()
    assert not table.hold([a, b])
    assert not table.hold([c])
    assert set(table._slots) == {c}
    table.hold([c, a])
    table.hold([a])
    assert set(table._slots) == {a, c}, "it may be asked for in the next step again"
    serving.runner.forget_adapters()
    assert not table._slots and not table._kept
    assert sorted(table._free) == list(range(64))


def test_a_rank_beyond_the_room_makes_new_recordings(
    model: Model, adapters: Adapters, random_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = model.config.linear_shapes()
    adapters["wide"] = random_adapter(shapes, ["o_proj"], 20, 5).to(model.lm_head.weight.device, torch.float32)
    specs = [{"a": 1.0}, {"wide": 1.0}]
    wanted = plain_answers(model, adapters, specs, [3, 3], monkeypatch)
    recorder = Recorder()
    serving = Serving(model, recorder)
    serving.answers(adapters, [{"a": 1.0}] * 2, [2, 2])
    assert recorder.recorded == 1
    assert serving.answers(adapters, specs, [3, 3]) == wanted
    assert recorder.recorded == 2


def test_what_cannot_be_recorded_runs_as_usual(
    model: Model, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plain_answers(model, adapters, SPECS, [2] * 5, monkeypatch)
    recorder = Recorder()
    serving = Serving(model, recorder)
    serving.runner._graphs._adapters.max_entries = 6  # five rows have seven
    assert serving.answers(adapters, SPECS, [2] * 5) == wanted
    assert recorder.recorded == 0


def test_buckets_are_powers_of_two_up_to_the_most() -> None:
    assert [bucket(n, 24) for n in (1, 2, 3, 5, 8, 9, 16, 17, 24)] == [1, 2, 4, 8, 8, 16, 16, 24, 24]
