"""The two forms of an answer, chat and plain text, each as the `choices` entries of a stream and as a whole.

The whole is the stream joined together, so the two cannot differ.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from loraserve.engine.text import Piece
from loraserve.server.answer import AnswerParser, collect
from loraserve.server.payloads import chat_logprobs, completion_logprobs

Chunk = dict[str, Any]
"""One entry of `choices` in one event of a stream."""


class Form(Protocol):
    prefix: str
    object: str
    chunk_object: str

    def opening(self) -> list[Chunk]:
        """The entries that a stream begins with."""

    def chunks(self, index: int, piece: Piece) -> list[Chunk]:
        """The entries that `piece` of choice `index` adds."""

    def join(self, index: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """All of a choice's entries as one."""


class ChatForm:
    """Deltas with a role, reasoning, content and tool calls.

    Args:
        count: number of choices.
        in_reasoning: the prompt ended in `<think>`.
        tools: the request offered tools.
    """

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, count: int, *, in_reasoning: bool, tools: bool) -> None:
        self._parsers = [AnswerParser(in_reasoning=in_reasoning, tools=tools) for _ in range(count)]

    def opening(self) -> list[Chunk]:
        return [_delta(i, {"role": "assistant", "content": ""}) for i in range(len(self._parsers))]

    def chunks(self, index: int, piece: Piece) -> list[Chunk]:
        parser = self._parsers[index]
        deltas = parser.push(piece.text)
        if piece.finish_reason:
            deltas += parser.flush()
        if piece.logprobs and not deltas:
            deltas = [{"content": ""}]
        chunks = [_delta(index, delta) for delta in deltas]
        if piece.logprobs:
            chunks[0]["logprobs"] = chat_logprobs(piece.logprobs)
        if piece.finish_reason:
            chunks.append(_delta(index, {}, parser.finish_reason(piece.finish_reason)))
        return chunks

    def join(self, index: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
        logprobs = [entry for chunk in chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
        return {
            "index": index,
            "message": collect(chunk["delta"] for chunk in chunks),
            "logprobs": {"content": logprobs} if logprobs else None,
            "finish_reason": _finish_reason(chunks),
        }


class TextForm:
    """Plain text, as /v1/completions has it."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, count: int) -> None:
        self._offsets = [0] * count

    def opening(self) -> list[Chunk]:
        return []

    def chunks(self, index: int, piece: Piece) -> list[Chunk]:
        logprobs = None
        if piece.logprobs:
            logprobs = completion_logprobs(piece.logprobs, self._offsets[index])
            self._offsets[index] += sum(len(token.token) for token in piece.logprobs)
        if not (piece.text or logprobs or piece.finish_reason):
            return []
        return [{"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}]

    def join(self, index: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
        parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
        return {
            "index": index,
            "text": "".join(chunk["text"] for chunk in chunks),
            "logprobs": {key: [x for part in parts for x in part[key]] for key in parts[0]} if parts else None,
            "finish_reason": _finish_reason(chunks),
        }


def _delta(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> Chunk:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _finish_reason(chunks: Sequence[Chunk]) -> str | None:
    return next((chunk["finish_reason"] for chunk in reversed(chunks) if chunk["finish_reason"]), None)
