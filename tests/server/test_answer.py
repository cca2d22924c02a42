"""Chat answers taken apart: reasoning, content and tool calls, however the text is cut into pieces."""

import itertools
import json

import pytest

from loraserve.server.answer import AnswerParser, collect

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
OTHER = '<tool_call>{"name": "sub", "arguments": "{\\"b\\": 2}"}</tool_call>'


def parse(pieces: list[str], *, in_reasoning: bool = False, tools: bool = True) -> dict:
    parser = AnswerParser(in_reasoning=in_reasoning, tools=tools)
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.flush()
    return collect(deltas) | {"finish_reason": parser.finish_reason("stop")}


def without_ids(message: dict) -> dict:
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return {**message, "tool_calls": calls}


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        f"<think>\nwhy\n</think>\n\nLet me see.\n{CALL}\n{OTHER}",
        f"{CALL} and more",
        "a < b <tool <tool_call",
        "<tool_call>no json</tool_call> after",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>["name"]</tool_call>',
        '<tool_call>{"name": 5}</tool_call>',
        f"<tool_call>{CALL}",
    ],
)
def test_where_the_text_is_cut_does_not_matter(text: str) -> None:
    whole = without_ids(parse([text]))
    for start, end in itertools.combinations(range(len(text) + 1), 2):
        assert without_ids(parse([text[:start], text[start:end], text[end:]])) == whole
    assert without_ids(parse(list(text))) == whole


def test_reasoning_content_and_calls_are_told_apart() -> None:
    message = parse([f"<think>\nwhy\n</think>\n\nLet me see.\n{CALL}\n{OTHER}"])
    assert message["reasoning_content"] == "why" and message["content"] == "Let me see."
    first, second = message["tool_calls"]
    assert first["id"] != second["id"] and first["function"]["name"] == "add"
    assert json.loads(first["function"]["arguments"]) == {"a": 1}
    assert json.loads(second["function"]["arguments"]) == {"b": 2}
    assert message["finish_reason"] == "tool_calls"


def test_what_is_no_call_stays_text() -> None:
    for text in ("<tool_call>no json</tool_call>", '<tool_call>{"name": 5}</tool_call>', "<tool_call>{", "5 <tool"):
        message = parse([text])
        assert message["content"] == text and message["finish_reason"] == "stop"
        assert "tool_calls" not in message


def test_without_tools_a_call_is_text() -> None:
    assert parse([CALL], tools=False)["content"] == CALL


def test_an_answer_can_begin_inside_the_reasoning() -> None:
    message = parse(["because", "\n</think>\n\nYes"], in_reasoning=True)
    assert message["reasoning_content"] == "because" and message["content"] == "Yes"
