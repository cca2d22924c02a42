"""Stop strings and streaming text, with the real tokenizer."""

import pytest

from loraserve.engine.sequence import Token
from loraserve.engine.text import TextStream

ANSWER = "你好，世界 🌈 hello STOP here"


def stream_of(base, stop: tuple[str, ...], step: int) -> tuple[str, str | None, int]:
    ids = base.tokenizer.encode(ANSWER)
    tokens = [Token(i) for i in ids[:-1]] + [Token(ids[-1], "length")]
    stream = TextStream(base.tokenizer, stop)
    text, reason, used = "", None, 0
    for start in range(0, len(tokens), step):
        piece = stream.push(tokens[start : start + step])
        assert "\ufffd" not in piece.text
        text += piece.text
        used += len(piece.token_ids)
        reason = piece.finish_reason
        if reason:
            break
    return text, reason, used


@pytest.mark.parametrize("step", [1, 2, 5, 1000])
def test_pieces_join_to_the_whole_text(base, step: int) -> None:
    assert stream_of(base, (), step)[:2] == (ANSWER, "length")


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("STOP",), "你好，世界 🌈 hello "),
        (("界", "STOP"), "你好，世"),
        (("hello STOP h",), "你好，世界 🌈 "),
        (("STOPX",), ANSWER),
    ],
)
def test_stop_string_ends_the_text_before_it(base, step: int, stop: tuple[str, ...], expected: str) -> None:
    text, reason, used = stream_of(base, stop, step)
    assert text == expected
    assert reason == ("length" if expected == ANSWER else "stop")
    if expected != ANSWER:
        assert used < len(base.tokenizer.encode(ANSWER))


def test_bytes_of_the_tokens_join_to_the_text_though_some_are_half_a_character(base) -> None:
    stream = TextStream(base.tokenizer, logprobs=True)
    ids = base.tokenizer.encode(ANSWER)
    scores = stream.push([Token(i, logprob=-1.0) for i in ids]).logprobs
    assert scores is not None and len(scores) == len(ids)
    assert bytes(byte for score in scores for byte in score.bytes).decode() == ANSWER
    assert any(score.token == "\ufffd" for score in scores)
    [marker] = TextStream(base.tokenizer, logprobs=True).push([Token(2, logprob=-1.0)]).logprobs or []
    assert bytes(marker.bytes).decode() == marker.token == "<|im_end|>"
