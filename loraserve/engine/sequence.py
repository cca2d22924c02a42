"""One request on its way through the engine. Speaks token ids only; knows no torch and no text."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from loraserve.engine.params import SamplingParams
from loraserve.engine.speculation import PromptLookup
from loraserve.errors import LoraserveError

Weighted = tuple[tuple[Any, float], ...]
"""(adapter, weight) pairs; the engine only compares the adapters by identity and passes them on."""


class Lease(Protocol):
    """A claim on adapters that may still be on their way."""

    def join(self, on_failure: Callable[[LoraserveError], None]) -> None:
        """Begin to wait for them."""

    def peek(self) -> Weighted | None:
        """The adapters, None while one is missing."""

    @property
    def short_of_room(self) -> bool:
        """Whether a missing one has no room until others end; else it is on its way."""

    def take(self) -> Weighted | None:
        """The same, which stay from now on."""

    def release(self) -> None:
        """Let go of them."""


@dataclass(frozen=True)
class Token:
    """One generated token: its log-probability and alternatives if asked for, and why it was the last, if it was."""

    token_id: int
    finish_reason: str | None = None
    """None, or `stop` (end or stop token), or `length` (max_tokens or the context is reached)."""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Sequence:
    """A request's state.

    With a `lease` its `adapters` are known from admission to the end, else from the start.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    adapters: Weighted = ()
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    lease: Lease | None = None
    merged: Any = None
    """The merged adapter whose model computes it, from the first token to the last; None is the base's model."""
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    num_shared: int = 0
    """Tokens of the prompt whose keys and values were there already."""
    slot: int = -1
    """The cache slot it owns while running."""
    aborted: bool = False
    turn: float | None = None
    """When it would first have been admitted, but for its adapters."""

    lookup: PromptLookup = field(default_factory=PromptLookup)
    """Guesses its next tokens."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._drawn: deque[float] = deque()

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, start: int, count: int) -> list[int]:
        """The tokens at positions start to start + count of prompt and answer."""
        prompt = self.prompt_token_ids
        if start >= len(prompt):
            start -= len(prompt)
            return self.output_token_ids[start : start + count]
        return (prompt[start : start + count] + self.output_token_ids)[:count]

    def draft(self, most: int) -> tuple[int, ...]:
        """Guess up to `most` of the next tokens, and leave room for the one that is sampled after them."""
        most = min(most, self.max_tokens - len(self.output_token_ids) - 1)
        if most < 1:
            return ()
        known = self.lookup.num_tokens
        return self.lookup.propose(self.tokens(known, self.num_tokens - known), most)

    def uniform(self, ahead: int = 0) -> float:
        """The number in [0, 1) of this request's own random stream for the next token, or one `ahead` of that.

        It stays that token's until the token is appended, however often it is asked for.
        """
        while len(self._drawn) <= ahead:
            self._drawn.append(self._random.random())
        return self._drawn[ahead]

    def append(self, token_id: int) -> str | None:
        """Add a generated token; return why the sequence is finished, or None."""
        self.output_token_ids.append(token_id)
        if self._drawn:
            self._drawn.popleft()
        if token_id in self.stop_ids:
            return "stop"
        return "length" if len(self.output_token_ids) >= self.max_tokens else None
