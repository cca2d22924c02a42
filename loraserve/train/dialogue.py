"""What a row of a training file says: one dialogue, in any of four formats, each recognised by its own fields.

    {"conversations": [{"role": ..., "content": ...}, ...]}         MiniMind
    {"messages": [{"role": ..., "content": ...}, ...]}              OpenAI, optionally with "tools"
    {"conversations": [{"from": "human", "value": ...}, ...]}       ShareGPT, optionally with "system" and "tools"
    {"instruction": ..., "input": ..., "output": ...}               Alpaca, optionally with "system" and "history"

Knows no tokens: what a dialogue is as token ids is the business of `data`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loraserve.errors import did_you_mean
from loraserve.train.rows import BadRow, Row

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
} | {role: role for role in ROLES}
ANSWERS_TO = {"assistant": ("user", "tool"), "tool": ("assistant", "tool")}
"""What may stand before a message of a role; a user may speak at any time."""
EXAMPLE = '{"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}'
LONGEST_SHOWN_ROLE = 40

Message = dict[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """Messages as a chat template takes them, and the tools they may call."""

    messages: list[Message]
    tools: list[Any] | None
    format: str
    """MiniMind, OpenAI, ShareGPT, Alpaca, or preference for half of a pair."""


def read_dialogue(row: Row) -> Dialogue:
    """Return what a row says.

    Raises:
        BadRow: it is no UTF-8, no JSON, none of the four formats; a role is unknown or out of order; a field has the
            wrong type; an answer is missing or empty.
    """
    value = parse_object(row.raw)
    for field, form in (("conversations", "MiniMind"), ("messages", "OpenAI")):
        if value.get(field) is not None:
            return read_messages(value, field, form)
    if "instruction" in value:
        return _checked(list(_alpaca(value)), value.get("tools"), "Alpaca")
    if ("chosen" in value and "rejected" in value) or "preferred_output" in value:
        raise BadRow("a preference pair, which only train --objective dpo learns from")
    raise BadRow("has neither 'conversations' nor 'messages' nor 'instruction' and 'output'")


def read_messages(row: dict[str, Any], field: str, form: str) -> Dialogue:
    """The dialogue that a list of messages under `field` makes, with the row's system message and tools.

    Args:
        form: its format's name, where messages have roles; else they are ShareGPT's.

    Raises BadRow as `read_dialogue` does.
    """
    items = row[field]
    if not isinstance(items, list) or not items:
        raise BadRow(f"{field!r} is not a list of messages, or an empty one")
    messages = [_message(item) for item in items]
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(row["system"], {})})
    return _checked(messages, row.get("tools"), form if "role" in items[0] else "ShareGPT")


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that a row's bytes are; raises BadRow if they are none."""
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"broken JSON ({error.msg} at character {error.pos + 1})") from None
    except ValueError:
        raise BadRow("a number of thousands of digits") from None
    except RecursionError:
        raise BadRow("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise BadRow("not a JSON object")
    return value


def _message(item: Any) -> Message:
    if not isinstance(item, dict):
        raise BadRow("a message is not a JSON object")
    if "role" in item:
        role, content, known = item["role"], item.get("content"), {role: role for role in ROLES}
    elif "from" in item:
        role, content, known = item["from"], item.get("value"), SHAREGPT_ROLES
    else:
        raise BadRow("a message has neither 'role' nor 'from'")
    if not isinstance(role, str) or role not in known:
        hint = did_you_mean(str(role), known) or f"use {', '.join(known)}"
        raise BadRow(f"unknown role {str(role)[:LONGEST_SHOWN_ROLE]!r}; {hint}")
    message = {key: value for key, value in item.items() if key not in ("role", "content", "from", "value")}
    message = {key: value for key, value in message.items() if value is not None}
    if role == "function_call":
        content, message["tool_calls"] = None, _calls(content)
    elif calls := message.pop("tool_calls", None):
        message["tool_calls"] = _calls(calls)
    message |= {"role": known[role], "content": _text(content, message)}
    if not isinstance(message.get("reasoning_content", ""), str):
        raise BadRow("'reasoning_content' of a message is not text")
    return message


def _text(content: Any, message: Message) -> str:
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list):  # OpenAI's content parts
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(texts) != len(content):
            raise BadRow("a message has parts that are not text")
        return "".join(texts)
    if not isinstance(content, str):
        raise BadRow("the content of a message is not text")
    return content


def _alpaca(row: dict[str, Any]) -> Iterator[Message]:
    def text(field: str) -> str:
        value = row.get(field)
        if value is not None and not isinstance(value, str):
            raise BadRow(f"{field!r} is not text")
        return value or ""

    if text("system"):
        yield {"role": "system", "content": text("system")}
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRow("'history' is not a list of [question, answer]")
    for question, answer in history:
        yield _message({"role": "user", "content": question})
        yield _message({"role": "assistant", "content": answer})
    question = "\n".join(part for part in (text("instruction"), text("input")) if part)
    if not question.strip():
        raise BadRow("'instruction' and 'input' are empty")
    yield {"role": "user", "content": question}
    yield {"role": "assistant", "content": text("output")}


def _checked(messages: list[Message], tools: Any, form: str) -> Dialogue:
    for message in messages:
        offered = message.pop("tools", None)
        if message["role"] == "system" and offered:
            tools = offered
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("nothing to supervise: it has no assistant message")
    if any(not message["content"].strip() and not message.get("tool_calls") for message in answers):
        raise BadRow("an assistant message is empty")
    _check_order([message["role"] for message in messages])
    return Dialogue(messages, _objects(tools, "tools") if tools else None, form)


def _check_order(roles: list[str]) -> None:
    if "system" in roles[1:]:
        raise BadRow("roles out of order: a system message is not the first")
    for before, role in zip(["nothing", *roles], roles, strict=False):
        if role in ANSWERS_TO and before not in ANSWERS_TO[role]:
            wanted = " or ".join(ANSWERS_TO[role])
            raise BadRow(f"roles out of order: {role} follows {before}, not {wanted}")


def _calls(value: Any) -> list[Any]:
    """Tool calls, each {"name", "arguments"}, OpenAI's with that in "function"; a single one may stand alone."""
    if isinstance(value, str):
        value = _json(value, "tool_calls")
    calls = _objects([value] if isinstance(value, dict) else value, "tool_calls")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("a tool call has no 'name'")
    return calls


def _objects(value: Any, field: str) -> list[Any]:
    if isinstance(value, str):
        value = _json(value, field)
    if not isinstance(value, list):
        raise BadRow(f"{field!r} is not a list")
    if not all(isinstance(each, dict) for each in value):
        raise BadRow(f"{field!r} is not a list of JSON objects")
    return value


def _json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(f"{field!r} is not JSON") from None
