"""POST /v1/chat/completions and /v1/completions: OpenAI's requests, with the adapter chosen per request.

A request becomes one generation per choice (`n`, times the prompts), all read as one stream. The response carries the
`adapter` that answered. What fails before the first token fails with its own status; later, as an event of the stream.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, jsonify, request

from loraserve.engine.generation import Generation
from loraserve.engine.params import SamplingParams
from loraserve.engine.text import Piece
from loraserve.errors import AdapterNotFound, InvalidRequest, LoraserveError
from loraserve.server.forms import ChatForm, Chunk, Form, TextForm
from loraserve.server.payloads import event, usage
from loraserve.server.problems import describe
from loraserve.server.schema import ChatCompletion, Completion, Generate, Message, parse
from loraserve.server.selection import Selection
from loraserve.server.state import State, current
from loraserve.server.streams import ClientGone, read_all

routes = Blueprint("completions", __name__)
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat answer may by default fill the context."""
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a request whose client left; nobody reads it but the metrics."""


@routes.post("/v1/chat/completions")
def chat_completions() -> Response:
    state, body = current(), parse(request, ChatCompletion)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    selection = state.select(body.model, body.adapter)
    kwargs = dict(body.chat_template_kwargs or {})
    if body.open_thinking is not None:
        kwargs["open_thinking"] = body.open_thinking
    tools = body.tools if body.tools and body.tool_choice != "none" else None
    prompt = state.base.template.render([_plain(m) for m in body.messages], tools=tools, **kwargs)
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    logprobs = body.top_logprobs or 0 if body.logprobs else None
    ids = state.service.encode(prompt)
    with _naming({"max_tokens": limit, "prompt": "messages"}):
        params = body.sampling(max_tokens=getattr(body, limit), logprobs=logprobs)
        generations = _submit(state, selection, [ids], body.n or 1, params)
    thinking = prompt.rstrip().endswith("<think>")
    form = ChatForm(len(generations), in_reasoning=thinking, tools=bool(tools))
    return Answer(state, body, selection, generations, form).respond()


@routes.post("/v1/completions")
def completions() -> Response:
    state, body = current(), parse(request, Completion)
    selection = state.select(body.model, body.adapter)
    limit = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    with _naming({"messages": "prompt"}):
        prompts = [state.service.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]
        params = body.sampling(max_tokens=limit, logprobs=body.logprobs)
        generations = _submit(state, selection, prompts, body.n or 1, params)
    return Answer(state, body, selection, generations, TextForm(len(generations))).respond()


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: text content, `system` for `developer`, no empty fields."""
    plain = message.model_dump(exclude_none=True)
    plain["content"] = message.content or ""
    if message.role == "developer":
        plain["role"] = "system"
    return plain


@contextmanager
def _naming(names: dict[str, str]) -> Iterator[None]:
    """Give errors the body's names for those fields that the engine calls differently."""
    try:
        yield
    except LoraserveError as error:
        error.param = names.get(error.param or "", error.param)
        raise


def _submit(
    state: State, selection: Selection, prompts: Sequence[list[int]], count: int, params: SamplingParams
) -> list[Generation]:
    """Start all generations of a request, or none: prompt by prompt, `count` each, every one with its own seed."""
    wanted, capacity = len(prompts) * count, state.service.max_num_seqs + state.service.max_queue
    if wanted > capacity:
        raise InvalidRequest(
            f"{wanted} answers in one request are more than the {capacity} this server holds", param="n"
        )
    generations: list[Generation] = []
    try:
        for prompt in prompts:
            for _ in range(count):
                seed = None if params.seed is None else params.seed + len(generations)
                own = replace(params, seed=seed)
                generations.append(state.service.generate(prompt, selection.spec, own))
    except LoraserveError as error:
        for generation in generations:
            generation.cancel()
        if isinstance(error, AdapterNotFound):
            raise state.unknown(selection) from None
        raise
    return generations


class Answer:
    """One response being written, from the pieces of its generations, in its form."""

    def __init__(
        self, state: State, body: Generate, selection: Selection, generations: list[Generation], form: Form
    ) -> None:
        self.form, self.count = form, len(generations)
        self.stream = body.stream
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.head = {
            "id": f"{form.prefix}-{secrets.token_hex(12)}",
            "object": form.chunk_object if body.stream else form.object,
            "created": int(time.time()),
            "model": body.model or state.base_name,
            "adapter": selection.text,
        }
        # The n choices of a prompt share it, so it counts once.
        self.of_prompts = generations[:: body.n or 1]
        self.prompt_tokens = sum(generation.prompt_tokens for generation in self.of_prompts)
        self.completion_tokens = 0
        gone = request.environ.get("waitress.client_disconnected", lambda: False)
        self.pieces = read_all(generations, gone, state.closing.is_set)
        self.meter = state.metrics.meter(selection.spec, self.prompt_tokens)

    def respond(self) -> Response:
        """Answer the request. The generations are over, or cancelled, when the response is."""
        if not self.stream:
            try:
                return jsonify(self.whole())
            except ClientGone:
                return Response(status=CLIENT_CLOSED_REQUEST)
            finally:
                self.pieces.close()
        try:
            first = next(self.pieces, None)
        except ClientGone:
            return Response(status=CLIENT_CLOSED_REQUEST)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        response = Response(self.events(first), 200, headers, "text/event-stream")
        response.call_on_close(self.pieces.close)
        return response

    def whole(self) -> dict[str, Any]:
        """Read to the end; return the response's body."""
        chunks: list[list[Chunk]] = [[] for _ in range(self.count)]
        for index, piece in self.pieces:
            chunks[index] += self.take(index, piece)
        choices = [self.form.join(index, parts) for index, parts in enumerate(chunks)]
        return {**self.head, "choices": choices, "usage": self.usage()}

    def events(self, first: tuple[int, Piece] | None) -> Iterator[bytes]:
        """Read to the end; yield the stream's events."""
        try:
            yield b"".join(self.event([chunk]) for chunk in self.form.opening())
            if first is not None:
                yield from map(self.event, ([chunk] for chunk in self.take(*first)))
            for index, piece in self.pieces:
                if chunks := self.take(index, piece):
                    yield b"".join(self.event([chunk]) for chunk in chunks)
            if self.include_usage:
                yield self.event([], self.usage())
        except ClientGone:
            return
        except Exception as error:  # the status is sent: all that is left is to say so in the stream
            yield event(describe(error))
        yield event("[DONE]")

    def take(self, index: int, piece: Piece) -> list[Chunk]:
        """Count a piece and return what it adds to the answer."""
        self.completion_tokens += len(piece.token_ids)
        self.meter.tokens(len(piece.token_ids))
        return self.form.chunks(index, piece)

    def event(self, choices: list[Chunk], total: dict[str, Any] | None = None) -> bytes:
        return event({**self.head, "choices": choices, **({"usage": total} if self.include_usage else {})})

    def usage(self) -> dict[str, Any]:
        cached = sum(generation.cached_tokens for generation in self.of_prompts)
        return usage(self.prompt_tokens, self.completion_tokens, cached)
