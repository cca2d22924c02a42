"""From generated tokens to text: incremental decoding, stop strings, log-probabilities in words.

Everything textual about an answer lives here, outside the engine.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from loraserve.base.reasoning import overlap
from loraserve.base.tokenizer import Tokenizer
from loraserve.engine.sequence import Token


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its text and bytes, its log-probability and, if asked for, the likeliest alternatives."""

    token_id: int
    token: str
    logprob: float
    bytes: list[int]
    top: list["TokenLogprob"] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """The next part of an answer. The last one carries the reason it ended."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None


class TextStream:
    """Turns one request's tokens into Pieces.

    Text that could be the beginning of a stop string is held back until it is certain.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), logprobs: bool = False) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.stream()
        self._stop = stop
        self._logprobs = logprobs
        self._held = ""

    def push(self, tokens: Iterable[Token]) -> Piece:
        """Add tokens, up to the one that ends the answer; a stop string ends it too."""
        ids: list[int] = []
        scores: list[TokenLogprob] = []
        text, reason = "", None
        for token in tokens:
            ids.append(token.token_id)
            if self._logprobs and token.logprob is not None:
                scores.append(self._describe(token))
            self._held += self._detokenizer.push(token.token_id)
            if token.finish_reason:
                self._held += self._detokenizer.flush()
            released, stopped = self._release(final=token.finish_reason is not None)
            text += released
            reason = "stop" if stopped else token.finish_reason
            if reason:
                break
        return Piece(text, ids, scores if self._logprobs else None, reason)

    def _release(self, final: bool) -> tuple[str, bool]:
        """Return the text that is certain, and whether a stop string was met."""
        at = min((i for s in self._stop if (i := self._held.find(s)) >= 0), default=-1)
        if at >= 0:
            text, self._held = self._held[:at], ""
            return text, True
        keep = 0 if final else max((overlap(self._held, s) for s in self._stop), default=0)
        certain = len(self._held) - keep
        text, self._held = self._held[:certain], self._held[certain:]
        return text, False

    def _describe(self, token: Token) -> TokenLogprob:
        top = [self._one(token_id, value) for token_id, value in token.top_logprobs]
        assert token.logprob is not None
        return self._one(token.token_id, token.logprob, top)

    def _one(self, token_id: int, logprob: float, top: list[TokenLogprob] | None = None) -> TokenLogprob:
        raw = self._tokenizer.token_bytes(token_id) or self._tokenizer.id_to_token(token_id).encode()
        return TokenLogprob(token_id, raw.decode("utf-8", "replace"), logprob, list(raw), top or [])
