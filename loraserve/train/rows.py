"""Reads training files: one dialogue per row, in any of four formats, each row recognised by its own fields.

    {"conversations": [{"role": ..., "content": ...}, ...]}         MiniMind
    {"messages": [{"role": ..., "content": ...}, ...]}              OpenAI, optionally with "tools"
    {"conversations": [{"from": "human", "value": ...}, ...]}       ShareGPT
    {"instruction": ..., "input": ..., "output": ...}               Alpaca, optionally with "system" and "history"

A file is JSON lines, or one JSON array. It is read whole and everything wrong with it is reported at once, by line.
Knows no tokens: what a dialogue is as token ids is the business of `data`.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraserve.errors import DataError, did_you_mean

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
} | {role: role for role in ROLES}
EXAMPLE = '{"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}'
MAX_SHOWN_REASONS = 12
MAX_SHOWN_LINES = 8

Message = dict[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """One row: messages as a chat template takes them, the tools it offers, and its line (or item) in the file."""

    messages: list[Message]
    tools: list[Any] | None
    line: int


@dataclass(frozen=True)
class DataFile:
    """What a training file holds: its dialogues in file order and the sha256 of its bytes."""

    name: str
    dialogues: list[Dialogue]
    sha256: str


class Problems:
    """Collects what is wrong with a file, so that one error can say all of it."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[str, list[int]] = {}

    def add(self, line: int, reason: str) -> None:
        self.lines.setdefault(reason, []).append(line)

    def raise_if_any(self, advice: str = "") -> None:
        """Raise DataError that names every reason with its lines, if there is one."""
        if not self.lines:
            return
        parts = [f"{_lines(lines)}: {reason}" for reason, lines in list(self.lines.items())[:MAX_SHOWN_REASONS]]
        if len(self.lines) > MAX_SHOWN_REASONS:
            parts.append(f"and {len(self.lines) - MAX_SHOWN_REASONS} more kinds of problem")
        bad = len({line for lines in self.lines.values() for line in lines})
        text = f"{self.file}: {bad} {'row' if bad == 1 else 'rows'} cannot be used: " + "; ".join(parts)
        raise DataError(f"{text}{'; ' + advice if advice else ''}", param="data")


class _UnusableError(Exception):
    """Why one row cannot be used."""


def read_file(path: Path) -> DataFile:
    """Read and check every row of a training file.

    Raises DataError if the file is missing, not UTF-8, empty, or has any row that is not a dialogue: broken JSON, none
    of the four formats, an unknown role, an empty or missing answer. All bad rows are named with their line and reason.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", param="data") from None
    problems = Problems(path.name)
    dialogues = []
    for line, row in _rows(raw, problems):
        try:
            dialogues.append(_dialogue(row, line))
        except _UnusableError as error:
            problems.add(line, str(error))
    problems.raise_if_any()
    if not dialogues:
        raise DataError(f"{path} is empty; write one dialogue per line, like {EXAMPLE}", param="data")
    return DataFile(path.name, dialogues, hashlib.sha256(raw).hexdigest())


def _rows(raw: bytes, problems: Problems) -> Iterator[tuple[int, Any]]:
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip()[:1] == b"[":
        rows = _parse(raw, 1, problems)
        yield from enumerate(rows if rows is not None else [], start=1)
        return
    for line, text in enumerate(raw.split(b"\n"), start=1):
        if text.strip():
            row = _parse(text, line, problems)
            if row is not None:
                yield line, row


def _parse(text: bytes, line: int, problems: Problems) -> Any:
    try:
        row = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        problems.add(line, f"not UTF-8 (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        problems.add(line + error.lineno - 1, f"broken JSON ({error.msg} at column {error.colno})")
    except ValueError:
        problems.add(line, "a number of thousands of digits")
    except RecursionError:
        problems.add(line, "JSON nested too deeply")
    else:
        if row is None:
            problems.add(line, "not a JSON object")
        return row
    return None


def _dialogue(row: Any, line: int) -> Dialogue:
    if not isinstance(row, dict):
        raise _UnusableError("not a JSON object")
    for field in ("conversations", "messages"):
        if row.get(field) is not None:
            items = row[field]
            if not isinstance(items, list) or not items:
                raise _UnusableError(f"{field!r} is not a list of messages, or an empty one")
            return _checked([_message(item) for item in items], row.get("tools"), line)
    if "instruction" in row:
        return _checked(list(_alpaca(row)), row.get("tools"), line)
    raise _UnusableError("has neither 'conversations' nor 'messages' nor 'instruction' and 'output'")


def _message(item: Any) -> Message:
    if not isinstance(item, dict):
        raise _UnusableError("a message is not a JSON object")
    if "role" in item:
        role, content, known = item["role"], item.get("content"), {role: role for role in ROLES}
    elif "from" in item:
        role, content, known = item["from"], item.get("value"), SHAREGPT_ROLES
    else:
        raise _UnusableError("a message has neither 'role' nor 'from'")
    if not isinstance(role, str) or role not in known:
        hint = did_you_mean(str(role), known) or f"use {', '.join(known)}"
        raise _UnusableError(f"unknown role {role!r}; {hint}")
    message = {key: value for key, value in item.items() if key not in ("role", "content", "from", "value")}
    message = {key: value for key, value in message.items() if value is not None}
    message |= {"role": known[role], "content": _text(content, message)}
    if "tool_calls" in message:
        message["tool_calls"] = _json_list(message["tool_calls"], "tool_calls")
    if not isinstance(message.get("reasoning_content", ""), str):
        raise _UnusableError("'reasoning_content' of a message is not text")
    return message


def _text(content: Any, message: Message) -> str:
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list):  # OpenAI's content parts
        texts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(texts) != len(content):
            raise _UnusableError("a message has parts that are not text")
        return "".join(texts)
    if not isinstance(content, str):
        raise _UnusableError("the content of a message is not text")
    return content


def _alpaca(row: dict[str, Any]) -> Iterator[Message]:
    def text(field: str) -> str:
        value = row.get(field)
        if value is not None and not isinstance(value, str):
            raise _UnusableError(f"{field!r} is not text")
        return value or ""

    if text("system"):
        yield {"role": "system", "content": text("system")}
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise _UnusableError("'history' is not a list of [question, answer]")
    for question, answer in history:
        yield _message({"role": "user", "content": question})
        yield _message({"role": "assistant", "content": answer})
    yield {"role": "user", "content": "\n".join(part for part in (text("instruction"), text("input")) if part)}
    yield {"role": "assistant", "content": text("output")}


def _checked(messages: list[Message], tools: Any, line: int) -> Dialogue:
    for message in messages:
        offered = message.pop("tools", None)
        if message["role"] == "system" and offered:
            tools = offered
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise _UnusableError("nothing to supervise: it has no assistant message")
    if any(not message["content"].strip() and not message.get("tool_calls") for message in answers):
        raise _UnusableError("an assistant message is empty")
    return Dialogue(messages, _json_list(tools, "tools") if tools else None, line)


def _json_list(value: Any, field: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _UnusableError(f"{field!r} is not JSON") from None
    if not isinstance(value, list):
        raise _UnusableError(f"{field!r} is not a list")
    return value


def _lines(lines: list[int]) -> str:
    shown = ", ".join(str(line) for line in lines[:MAX_SHOWN_LINES])
    more = f" and {len(lines) - MAX_SHOWN_LINES} more" if len(lines) > MAX_SHOWN_LINES else ""
    return f"{'line' if len(lines) == 1 else 'lines'} {shown}{more}"
