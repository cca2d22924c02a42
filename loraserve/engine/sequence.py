"""One request on its way through the engine. Speaks token ids only; knows no torch and no text."""

import random
from dataclasses import dataclass, field
from typing import Any

from loraserve.engine.params import SamplingParams


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

    `adapters` holds (adapter, weight) pairs; the engine only compares the objects by identity and passes them on.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    adapters: tuple[tuple[Any, float], ...] = ()
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    merged: Any = None
    """The merged adapter whose model computes it, from the first token to the last; None is the base's model."""
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values are in the cache."""
    slot: int = -1
    """The cache slot it owns while running."""
    aborted: bool = False
    overtaken: int = 0
    """Later sequences that were admitted before it."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

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

    def uniform(self) -> float:
        """The next number in [0, 1) of this request's own random stream."""
        return self._random.random()

    def append(self, token_id: int) -> str | None:
        """Add a generated token; return why the sequence is finished, or None."""
        self.output_token_ids.append(token_id)
        if token_id in self.stop_ids:
            return "stop"
        return "length" if len(self.output_token_ids) >= self.max_tokens else None
