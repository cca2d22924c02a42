"""Names of files, jobs and events: a prefix, the time and chance, as in `file-18ab3c9d12ef45670b5f9a3c`.

Sorted as text they are in the order in which they were made. Nothing else becomes part of a path.
"""

import re
import secrets
import time

DIGITS = re.compile(r"[0-9a-f]{24}")


def new_id(prefix: str) -> str:
    return f"{prefix}-{time.time_ns():016x}{secrets.token_hex(4)}"


def is_id(prefix: str, text: str) -> bool:
    """Whether `text` is a name that `new_id` may have made."""
    return text.startswith(f"{prefix}-") and DIGITS.fullmatch(text.removeprefix(f"{prefix}-")) is not None
