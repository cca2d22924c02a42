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
        try:
            for reasoning, more, ended in self._stream(question):
                show(reasoning, more)
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
        generation = self.service.generate(self.service.base.tokenizer.encode(prompt), self.spec, self.sampling)
        splitter = ReasoningSplitter(inside=prompt.rstrip().endswith(OPEN))
        try:
            for piece in generation:
                yield *splitter.push(piece.text), piece.finish_reason or ""
                if piece.finish_reason:
                    yield *splitter.flush(), piece.finish_reason
        finally:
            generation.cancel()


def show(reasoning: str, content: str) -> None:
    """Print the next part of an answer; its reasoning only on a terminal, dimmed."""
    terminal = sys.stdout.isatty()
    if reasoning and terminal:
        click.secho(CONTROL.sub("", reasoning), dim=True, nl=False)
    if content:
        click.echo(CONTROL.sub("", content) if terminal else content, nl=False)
