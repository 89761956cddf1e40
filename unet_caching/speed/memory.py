"""Freed memory stays with the process, which saves asking the system for it again in every layer."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4       # glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to return nothing to the system. Returns whether it was told: False with other libraries.

    By default it returns large feature maps as soon as they are freed. The system then has to find and clear each page
    of the next one, which takes longer than the arithmetic of many layers.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))     # never
