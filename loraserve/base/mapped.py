"""Weights that lie in a mapped file: reading them brings pages of it into memory, where they stay with the mapping."""

import ctypes
import mmap

from torch import Tensor

MADV_PAGEOUT = 21
"""Of `madvise` in Linux's mman.h, from 5.4 on: unlike MADV_DONTNEED it never loses what a page holds."""


def page_out(tensor: Tensor) -> None:
    """Let the memory under a tensor on the CPU go; it comes back from the file when it is read. A hint, no more."""
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return
    madvise(ctypes.c_void_p(first), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - first), MADV_PAGEOUT)
