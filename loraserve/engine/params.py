"""What a request may ask of the sampler. Field names and meanings are OpenAI's and vLLM's."""

import math
from dataclasses import dataclass

from loraserve.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOPS = 16


@dataclass(frozen=True)
class SamplingParams:
    """How to pick each next token, and when to stop.

    Raises InvalidRequest, naming the field, for a value out of range.
    """

    max_tokens: int | None = None
    """At most this many tokens; None means as many as the context holds."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """Only the k most likely tokens; 0 or -1 means all."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Over prompt and answer, multiplicative (arXiv:1909.05858)."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    """The same seed gives the same text, whatever else is in the batch."""
    logprobs: int | None = None
    """None is off; k also returns the k most likely alternatives of each token."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._need("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._within("temperature", 0.0, 100.0)
        self._within("top_p", 0.0, 1.0)
        self._need("top_p", self.top_p > 0, "above 0")
        self._need("top_k", -1 <= self.top_k < 2**31, "-1, 0 or a count below 2147483648")
        self._within("min_p", 0.0, 1.0)
        self._within("repetition_penalty", 0.01, 100.0)
        self._within("frequency_penalty", -2.0, 2.0)
        self._within("presence_penalty", -2.0, 2.0)
        self._need("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        self._need("stop", len(self.stop) <= MAX_STOPS and all(self.stop), f"at most {MAX_STOPS} non-empty strings")

    def _need(self, field: str, holds: bool, what: str) -> None:
        if not holds:
            raise InvalidRequest(f"{field} must be {what}, not {getattr(self, field)!r}", param=field)

    def _within(self, field: str, low: float, high: float) -> None:
        value = getattr(self, field)
        self._need(field, math.isfinite(value) and low <= value <= high, f"between {low:g} and {high:g}")

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0
