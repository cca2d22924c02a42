"""Turns the text of a chat answer into OpenAI deltas: reasoning, content and tool calls.

    <think>…</think>          -> {"reasoning_content": …}
    <tool_call>{…}</tool_call> -> {"tool_calls": [{"index", "id", "type", "function": {"name", "arguments"}}]}
    anything else             -> {"content": …}

Text arrives in pieces of any size; a tag cut in two is held back until it is whole. A call whose body is not the JSON
of a call stays content, as the model wrote it. Streamed and whole answers take the same road (`collect`).
"""

import json
import secrets
from collections.abc import Iterable
from typing import Any

from loraserve.base.reasoning import ReasoningSplitter, overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Delta = dict[str, Any]


class ToolCallSplitter:
    """Splits content from tool calls in a stream of text."""

    def __init__(self) -> None:
        self.count = 0
        self._held = ""

    def push(self, text: str) -> list[Delta]:
        self._held += text
        deltas: list[Delta] = []
        while self._held:
            if self._held.startswith(OPEN):
                end = self._held.find(CLOSE)
                if end < 0:
                    break
                body, self._held = self._held[len(OPEN) : end], self._held[end + len(CLOSE) :]
                deltas.append(self._call(body))
                if "tool_calls" in deltas[-1]:
                    self._held = self._held.lstrip("\n")
                continue
            start = self._held.find(OPEN)
            keep = start if start >= 0 else len(self._held) - overlap(self._held, OPEN)
            if keep == 0:
                break
            deltas.append({"content": self._held[:keep]})
            self._held = self._held[keep:]
        return deltas

    def flush(self) -> list[Delta]:
        """What is still held back, as content: an unfinished call is no call."""
        rest, self._held = self._held, ""
        return [{"content": rest}] if rest else []

    def _call(self, body: str) -> Delta:
        try:
            call = json.loads(body)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {"content": f"{OPEN}{body}{CLOSE}"}
        if not isinstance(name, str):
            return {"content": f"{OPEN}{body}{CLOSE}"}
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        index, self.count = self.count, self.count + 1
        function = {"name": name, "arguments": arguments}
        call_id = f"call_{secrets.token_hex(12)}"
        return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}


class AnswerParser:
    """One chat choice being written.

    Args:
        in_reasoning: the prompt ended in `<think>`, so the answer starts inside the reasoning.
        tools: the request offered tools, so `<tool_call>` means a call.
    """

    def __init__(self, *, in_reasoning: bool, tools: bool) -> None:
        self._reasoning = ReasoningSplitter(in_reasoning)
        self._calls = ToolCallSplitter() if tools else None

    def push(self, text: str) -> list[Delta]:
        return self._deltas(*self._reasoning.push(text))

    def flush(self) -> list[Delta]:
        deltas = self._deltas(*self._reasoning.flush())
        return deltas + self._calls.flush() if self._calls else deltas

    def finish_reason(self, reason: str) -> str:
        """The engine's reason in OpenAI's words: an answer that ended by calling tools says so."""
        return "tool_calls" if reason == "stop" and self._calls and self._calls.count else reason

    def _deltas(self, reasoning: str, content: str) -> list[Delta]:
        deltas: list[Delta] = [{"reasoning_content": reasoning}] if reasoning else []
        if content:
            deltas += self._calls.push(content) if self._calls else [{"content": content}]
        return deltas


def collect(deltas: Iterable[Delta]) -> dict[str, Any]:
    """Join all deltas of a choice into its message."""
    content, reasoning, calls = [], [], []
    for delta in deltas:
        content.append(delta.get("content", ""))
        reasoning.append(delta.get("reasoning_content", ""))
        calls += [{k: v for k, v in call.items() if k != "index"} for call in delta.get("tool_calls", [])]
    text = "".join(content)
    if calls:
        text = text.rstrip("\n")
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
    if any(reasoning):
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message
