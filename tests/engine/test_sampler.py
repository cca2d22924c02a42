"""The sampler against the definitions of its parameters."""

import math
from collections import Counter

import pytest
import torch

from loraserve.engine.params import SamplingParams
from loraserve.engine.sampler import sample
from loraserve.engine.sequence import Sequence
from loraserve.errors import InvalidRequest

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])


def draws(count: int, prompt: list[int] | None = None, output: list[int] | None = None, **params) -> Counter:
    sequence = Sequence(prompt or [0], SamplingParams(**params), 10, seed=3)
    seen: Counter = Counter()
    for _ in range(count):
        sequence.output_token_ids = list(output or [])
        seen[token_id := sample(LOGITS, [sequence])[0].token_id] += 1
        sequence.append(token_id)
    return seen


def test_frequencies_follow_the_softmax_at_the_given_temperature() -> None:
    for temperature in (0.7, 1.0, 1.6):
        seen = draws(6000, temperature=temperature)
        expected = (LOGITS[0] / temperature).softmax(0)
        for token_id, probability in enumerate(expected.tolist()):
            assert abs(seen[token_id] / 6000 - probability) < 0.025


def test_temperature_zero_is_the_argmax() -> None:
    assert draws(5, temperature=0.0) == {0: 5}


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(draws(500, top_k=3)) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probs = LOGITS[0].softmax(0)
    assert probs[0] < 0.7 < probs[:2].sum()
    assert set(draws(500, top_p=0.7)) == {0, 1}
    assert set(draws(100, top_p=0.01)) == {0}


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert set(draws(800, min_p=math.exp(-1.6))) == {0, 1, 2}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    assert draws(1, prompt=[0], temperature=0.0, repetition_penalty=3.0) == {1: 1}
    assert draws(1, prompt=[5], temperature=0.0, repetition_penalty=3.0) == {0: 1}


def test_frequency_and_presence_penalties_count_the_answer_only() -> None:
    assert draws(1, prompt=[0, 0, 0], temperature=0.0, frequency_penalty=2.0) == {0: 1}
    assert draws(1, output=[0], temperature=0.0, frequency_penalty=0.9) == {0: 1}
    assert draws(1, output=[0, 0], temperature=0.0, frequency_penalty=0.9) == {1: 1}
    assert draws(1, output=[0, 0], temperature=0.0, presence_penalty=0.9) == {0: 1}
    assert draws(1, output=[0], temperature=0.0, presence_penalty=1.1) == {1: 1}


def test_logprobs_are_the_models_own_and_ranked() -> None:
    plain = Sequence([0], SamplingParams(temperature=0.0), 10)
    asking = Sequence([0], SamplingParams(temperature=0.5, logprobs=2, seed=1), 10)
    first, second = sample(LOGITS.repeat(2, 1), [plain, asking])
    assert first.logprob is None
    expected = LOGITS[0].log_softmax(0)
    assert second.logprob == pytest.approx(expected[second.token_id].item())
    assert [token_id for token_id, _ in second.top_logprobs] == [0, 1]
    assert second.top_logprobs[1][1] == pytest.approx(expected[1].item())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_after_drafts_is_sampled_as_if_they_had_been_appended(temperature: float) -> None:
    params = SamplingParams(
        temperature=temperature, repetition_penalty=1.4, frequency_penalty=0.6, presence_penalty=0.4
    )
    logits = torch.linspace(0.1, 0.9, 9).repeat(5, 1)
    drafts = (8, 7, 7, 5)
    one_by_one, plain = Sequence([1, 2], params, 10, seed=8), Sequence([1, 2], params, 10, seed=8)
    wanted = []
    for row, draft in zip(logits, (*drafts, 0), strict=True):
        wanted.append(sample(row.unsqueeze(0), [one_by_one])[0])
        one_by_one.append(draft)
    rows = [drafts[:i] for i in range(5)]
    assert sample(logits, [plain] * 5, rows) == wanted
    assert sample(logits, [plain] * 5) != wanted, "the drafts must matter"
    assert sample(logits, [plain] * 5, rows) == wanted, "what is not appended is not drawn"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_has_no_token_and_disturbs_no_other(bad: float) -> None:
    kinds = [{}, {"logprobs": 2}, {"temperature": 0.0}, {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 0}]

    def sequences() -> list[Sequence]:
        return [Sequence([0], SamplingParams(**kind), 10, seed=i) for i, kind in enumerate(kinds * 2)]

    logits = LOGITS.repeat(8, 1)
    wanted = sample(logits, sequences())
    logits[::2, 3] = bad
    got = sample(logits, sequences())
    assert got[::2] == [None] * 4
    assert got[1::2] == wanted[1::2]
    assert [len(token.top_logprobs) for token in wanted if token] == [0, 2, 0, 0] * 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 0), ("max_tokens", -1), ("temperature", -0.1), ("temperature", math.nan), ("top_p", 0.0),
     ("top_p", 1.5), ("top_k", -2), ("min_p", 2.0), ("repetition_penalty", 0.0), ("frequency_penalty", 3.0),
     ("presence_penalty", math.inf), ("logprobs", 21), ("stop", ("",))],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
