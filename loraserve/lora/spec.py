"""Adapter SPECs: how a request names what it wants.

    name            one adapter at its own scale
    name:0.5        scaled
    a:0.7+b:0.3     an exact blend, ΔW = Σ weight·ΔWᵢ
    base            no adapter

Knows nothing of which adapters exist, nor of torch.
"""

import math
import re
from dataclasses import dataclass

from loraserve.errors import InvalidRequest

BASE = "base"
MAX_BLEND = 16
MAX_SCALE = 100.0
MAX_NAME_BYTES = 200
"""So that a file system's 255 leave room for the marks of a name's temporary files."""
NAME_PATTERN = re.compile(r"\w(?:[\w.-]{0,62}\w)?")


@dataclass(frozen=True)
class Term:
    """One adapter of a blend and the factor on its ΔW."""

    name: str
    scale: float = 1.0


Spec = tuple[Term, ...]
"""A parsed SPEC; the empty tuple is the base alone."""


def check_name(name: object, *, param: str | None = None) -> str:
    """Return `name` if it may name an adapter.

    Raises InvalidRequest for anything but 1 to 64 letters, digits, `_`, `-`, `.` that begins and ends with a letter,
    digit or `_`, and for the reserved word `base`.
    """
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name) or len(name.encode()) > MAX_NAME_BYTES:
        raise InvalidRequest(
            f"{name!r} cannot name an adapter: use 1 to 64 letters, digits, '_', '-' or '.', "
            f"starting and ending with a letter or digit, of {MAX_NAME_BYTES} bytes at most",
            param=param,
        )
    if name == BASE:
        raise InvalidRequest(f"{BASE!r} is reserved: it means no adapter; choose another name", param=param)
    return name


def make_spec(terms: list[Term], *, param: str | None = None) -> Spec:
    """Join repeated names and check the limits.

    Raises InvalidRequest for more than 16 adapters and for a scale that is not finite or beyond ±100.
    """
    if len(terms) > MAX_BLEND:
        raise InvalidRequest(f"a blend of {len(terms)} adapters is over the limit of {MAX_BLEND}", param=param)
    scales: dict[str, float] = {}
    for term in terms:
        if not math.isfinite(term.scale) or abs(term.scale) > MAX_SCALE:
            raise InvalidRequest(
                f"scale {term.scale} of adapter {term.name!r} is not a number between -{MAX_SCALE:g} and {MAX_SCALE:g}",
                param=param,
            )
        if term.name != BASE:
            check_name(term.name, param=param)
            scales[term.name] = scales.get(term.name, 0.0) + term.scale
    for name, scale in scales.items():
        if abs(scale) > MAX_SCALE:
            raise InvalidRequest(
                f"the scales of adapter {name!r} add up to {scale:g}, beyond {MAX_SCALE:g}", param=param
            )
    return tuple(Term(name, scale) for name, scale in scales.items())


def parse_spec(text: str | None, *, param: str | None = "adapter") -> Spec:
    """Parse a SPEC string; None and '' mean the base. Raises InvalidRequest naming the part that is wrong."""
    if text is None or text.strip() in ("", BASE):
        return ()
    if text.count("+") >= MAX_BLEND:
        raise InvalidRequest(f"a blend of {text.count('+') + 1} adapters is over the limit of {MAX_BLEND}", param=param)
    terms = []
    for part in text.split("+"):
        name, colon, scale = part.strip().partition(":")
        try:
            terms.append(Term(name.strip(), float(scale) if colon else 1.0))
        except ValueError:
            raise InvalidRequest(
                f"{part.strip()!r}: the scale after ':' must be a number, as in '{name.strip()}:0.5'", param=param
            ) from None
    return make_spec(terms, param=param)


def format_spec(spec: Spec) -> str:
    """Write a Spec back as text, `base` for the empty one."""
    return "+".join(t.name if t.scale == 1.0 else f"{t.name}:{t.scale:g}" for t in spec) or BASE
