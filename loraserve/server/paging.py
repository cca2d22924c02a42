"""Long lists by pages, as OpenAI's API cuts them: ?limit=&after= asks; has_more, first_id and last_id answer."""

import itertools
from collections.abc import Iterable
from typing import Any

from flask import Request

from loraserve.errors import InvalidRequest

MAX_LIMIT = 1000


def limit_of(request: Request, default: int | None = None) -> int | None:
    """The number of entries a request asks for. Raises InvalidRequest for anything but 1 to MAX_LIMIT."""
    text = request.args.get("limit")
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MAX_LIMIT):
        raise InvalidRequest(f"limit must be a number from 1 to {MAX_LIMIT}, not {text[:60]!r}", param="limit")
    return int(text)


def cut(names: Iterable[str], limit: int | None) -> tuple[list[str], bool]:
    """The first `limit` names, and whether there are more; names beyond that are not looked at."""
    found = list(itertools.islice(names, None if limit is None else limit + 1))
    return found[:limit], limit is not None and len(found) > limit


def envelope(entries: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """The list object around a page of entries."""
    first, last = (entries[0]["id"], entries[-1]["id"]) if entries else (None, None)
    return {"object": "list", "data": entries, "has_more": has_more, "first_id": first, "last_id": last}
