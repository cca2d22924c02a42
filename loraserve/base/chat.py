"""Chat templates: messages to the prompt text the model was trained on.

Templates come with a base and are not trusted: they run in jinja2's immutable sandbox, set up as transformers does
(trim_blocks, lstrip_blocks, a `tojson` that does not escape HTML).
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loraserve.base.tokenizer import Tokenizer
from loraserve.errors import CheckpointError, InvalidRequest

Messages = Sequence[Mapping[str, Any]]


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(Extension):
    """`{% generation %}`, by which training libraries mark the assistant's text; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _source_of(tokenizer: Tokenizer) -> str | None:
    file = tokenizer.path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not UTF-8 ({error}); fetch the file again") from None
    source = tokenizer.config.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default") or next(iter(named.values()), None)
    return source if isinstance(source, str) else None


class ChatTemplate:
    """A base's chat template. A base without one loads all the same: it completes texts and does not chat.

    Raises:
        CheckpointError: the template does not compile.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._path = tokenizer.path
        self._special_tokens = tokenizer.special_tokens
        self.source = _source_of(tokenizer)
        try:
            self._template = None if self.source is None else _compile(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template in {tokenizer.path} does not compile: {error}") from None

    def render(
        self,
        messages: Messages,
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Return the prompt text of a conversation.

        Args:
            messages: each with `role` and `content`; an assistant's may have `reasoning_content` and `tool_calls`.
            tools: OpenAI's function descriptions.
            add_generation_prompt: end where the assistant's answer begins.
            kwargs: passed to the template, such as MiniMind's `open_thinking`.

        Raises:
            InvalidRequest: the template cannot render these messages (its reason is in the message), or there is none.
        """
        if self._template is None:
            raise InvalidRequest(
                f"this base has no chat template: add 'chat_template' to {self._path / 'tokenizer_config.json'}, "
                "or ask for completions of plain text",
                param="messages",
            )
        variables = {**self._special_tokens, **kwargs, "messages": messages, "tools": tools}
        try:
            return self._template.render(variables | {"add_generation_prompt": add_generation_prompt})
        except Exception as error:  # foreign code: whatever it raises is its answer to these messages
            raise InvalidRequest(f"the chat template cannot render these messages: {error}", param="messages") from None
