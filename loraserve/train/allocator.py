"""How the C library's allocator treats memory that training has freed.

By default it keeps what was freed for the next request, and between tensors that live for a whole step and those that
live for a moment it ends up with far more than it hands out, with checkpointing several times as much. What is mapped
on its own is given back at once, at the price of mapping it again, which takes time (docs/performance.md).
"""

import ctypes

M_MMAP_THRESHOLD = -3
"""Of `mallopt` in glibc's malloc.h."""
LARGE = 1 << 20
"""Bytes from which a tensor is mapped on its own."""


def give_back_large_tensors() -> bool:
    """Let this process give the memory of large tensors back as soon as they are freed.

    Returns:
        whether the C library can: glibc's, of Linux.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE))
    except (OSError, AttributeError, TypeError):
        return False
