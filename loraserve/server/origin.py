"""Keeps other sites' pages from changing things here."""

from urllib.parse import urlsplit

from flask import request
from werkzeug.exceptions import Forbidden


def same_origin() -> None:
    """Refuse what another site's page sends without asking: browsers ask no leave for a form, unlike for JSON."""
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        raise Forbidden(f"pages of {origin} are not allowed to do this")
