"""Regexes that come with an adapter: matched by a library that gives up in time and lets other threads run meanwhile.

The standard library's `re` would hold the whole process for as long as a hostile expression likes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import regex

from loraserve.errors import AdapterRefused

MATCH_SECONDS = 0.5
"""An honest expression takes microseconds on a module path."""
LONGEST = 10_000
"""Characters of an expression."""


class Pattern:
    """One expression, read as `re` reads it.

    Raises:
        ValueError: it is not a regex, or too long.
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression
        self._compiled = _compile(expression)

    def match(self, path: str) -> "regex.Match[str] | None":
        """Match at the beginning of a module path.

        Raises:
            AdapterRefused: the expression backtracks without end.
        """
        with self._in_time():
            return self._compiled.match(path, timeout=MATCH_SECONDS)

    def covers(self, path: str) -> bool:
        """Whether it matches a module path from beginning to end. Raises as `match` does."""
        with self._in_time():
            return self._compiled.fullmatch(path, timeout=MATCH_SECONDS) is not None

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            problem = f"adapter_config.json: the regex {self.expression[:80]!r} takes too long: nest no repetitions"
            raise AdapterRefused("", [problem]) from None


@lru_cache(maxsize=1024)
def _compile(expression: str) -> "regex.Pattern[str]":
    if len(expression) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} characters")
    try:
        return regex.compile(expression)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from None
