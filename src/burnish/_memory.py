"""Memory that the allocator holds although nothing uses it."""

from __future__ import annotations

import ctypes
import sys


def return_freed_memory() -> None:
    """Gives freed pages back to the system, where the allocator is glibc's. It keeps them otherwise, and a process
    would hold the weights that packing replaced beside the packed ones."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
