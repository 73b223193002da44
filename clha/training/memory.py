"""Keeps freed memory in the process: activations of one micro-batch reuse the pages of the one before."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc's allocator not to hand large blocks back to the system; True where it could be told.

    Otherwise every large tensor on the CPU is mapped anew and its pages are zeroed by the kernel at first touch,
    which costs about as much as an elementwise operation on it. Call once, before tensors are made.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
