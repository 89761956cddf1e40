"""Keep freed memory in the process, so that it is not requested from the system again in every layer."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4       # glibc's <malloc.h>


def keep_freed_memory() -> bool:
    """Set glibc's malloc to return no memory to the system. Returns False with other libraries.

    By default glibc returns the memory of large feature maps as soon as they are freed. Then the system must find and
    clear each page of the next one, which takes longer than the arithmetic of many layers.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))     # never
