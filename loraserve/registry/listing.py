"""Which names of the registry's directory are adapters, cheaply for ten thousand of them: no file is opened."""

import os
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from loraserve.lora.spec import BASE, NAME_PATTERN
from loraserve.registry.folder import is_adapter


def may_name(name: str) -> bool:
    """Whether an entry of that name can be an adapter."""
    return name != BASE and NAME_PATTERN.fullmatch(name) is not None


def iterate_names(root: Path, after: str = "", query: str = "") -> Iterator[str]:
    """The adapters' names in order; one or two stat calls each, when it is its turn.

    Args:
        after: only names that come after this one, which need not exist.
        query: only names with this in them, in upper or lower case.
    """
    try:
        entries = os.scandir(root)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        found = sorted(e.name for e in entries if may_name(e.name) and e.is_dir(follow_symlinks=False))
    wanted = query.casefold()
    for name in found[bisect_right(found, after) :]:
        if wanted in name.casefold() and is_adapter(f"{root}/{name}"):
            yield name
