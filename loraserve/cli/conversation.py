"""A conversation: what was said, who answers next, and how an answer comes out."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from loraserve.engine.params import SamplingParams
    from loraserve.engine.service import Service
    from loraserve.lora.spec import Spec

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a model must not send to a terminal: it could move the cursor or retitle the window."""


@dataclass
class Conversation:
    """Messages, and the settings of the next answer."""

    service: "Service"
    spec: "Spec"
    sampling: "SamplingParams"
    system: str | None = None
    open_thinking: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def use(self, text: str) -> None:
        """Let the adapters of a SPEC answer from now on.

        Raises:
            InvalidRequest, AdapterNotFound, AdapterRefused: it cannot be used; the one before stays.
        """
        from loraserve.lora.spec import parse_spec

        spec = parse_spec(text)
        self.service.adapters.resolve(spec)
        self.spec = spec

    def ask(self, text: str) -> str:
        """Print the answer to `text` as it is generated, and remember both. Returns why it ended.

        Ctrl-C ends the answer: what there is of it is remembered, and the reason is `abort`.

        Raises:
            LoraserveError: it cannot be answered; nothing is remembered.
        """
        question = {"role": "user", "content": text}
        content, reason = "", ""
        screen = Screen()
        try:
            for reasoning, more, ended in self._stream(question):
                screen.push(reasoning, more)
                content += more
                reason = ended
        except KeyboardInterrupt:
            reason = "abort"
        if content:
            self.messages += [question, {"role": "assistant", "content": content}]
        return reason

    def _stream(self, question: dict[str, str]) -> Iterator[tuple[str, str, str]]:
        """(reasoning, content, finish reason) as they come."""
        from loraserve.base.reasoning import OPEN, ReasoningSplitter

        system = [{"role": "system", "content": self.system}] if self.system else []
        thinking: dict[str, Any] = {"open_thinking": True} if self.open_thinking else {}
        prompt = self.service.base.template.render([*system, *self.messages, question], **thinking)
        generation = self.service.generate(self.service.encode(prompt), self.spec, self.sampling)
        splitter = ReasoningSplitter(inside=prompt.rstrip().endswith(OPEN))
        try:
            for piece in generation:
                yield *splitter.push(piece.text), piece.finish_reason or ""
                if piece.finish_reason:
                    yield *splitter.flush(), piece.finish_reason
        finally:
            generation.cancel()


class Screen:
    """Prints one answer as it comes. Its reasoning appears only on a terminal, dimmed, on lines of its own."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._reasoned = False

    def push(self, reasoning: str, content: str) -> None:
        if reasoning and self._terminal:
            click.secho(self._safe(reasoning), dim=True, nl=False)
            self._reasoned = True
        if content:
            click.echo(("\n\n" if self._reasoned else "") + self._safe(content), nl=False)
            self._reasoned = False

    def _safe(self, text: str) -> str:
        return CONTROL.sub("", text) if self._terminal else text
