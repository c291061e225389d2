"""Compare ranges of two files in the page cache, without copying them out of it.

This takes half the processor time of reading both. But a process that touches a page which its file
has lost is killed by the system, so only files that were read moments ago are compared this way.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

_WINDOW = 2**22
"""The number of bytes mapped at once; mapped pages count as memory of the process."""


def are_equal(one: int, one_at: int, other: int, other_at: int, length: int) -> bool | None:
    """Compare a range of a file with a range of another one.

    Args:
        one: The descriptor of a file.
        one_at: The offset of its range in bytes.
        other: The descriptor of the other file.
        other_at: The offset of its range in bytes.
        length: The length of both ranges in bytes, at least 1.

    Returns:
        Whether they are equal, or None if this system or a filesystem cannot map them.
    """
    if _MEMCMP is None:
        return None
    try:
        for done in range(0, length, _WINDOW):
            size = min(_WINDOW, length - done)
            with (
                _mapped(one, one_at + done, size) as first,
                _mapped(other, other_at + done, size) as second,
            ):
                if _MEMCMP(first, second, size):
                    return False
    except (OSError, ValueError):
        return None
    return True


@contextmanager
def _mapped(file: int, at: int, length: int) -> Iterator[int]:
    """Map a range of a file into memory during a block, and yield the address of its start."""
    before = at % mmap.ALLOCATIONGRANULARITY
    # ctypes gives addresses of writable memory only. What is written to a copy changes no file.
    mapping = mmap.mmap(file, before + length, access=mmap.ACCESS_COPY, offset=at - before)
    with closing(mapping):
        start = ctypes.c_char.from_buffer(mapping, before)
        try:
            yield ctypes.addressof(start)
        finally:
            del start  # otherwise the mapping cannot be closed


def _memcmp() -> ctypes._NamedFuncPointer | None:
    """Return the C function, which releases Python's global lock, or None if there is none."""
    if sys.platform == "win32":
        return None
    function = ctypes.CDLL(None).memcmp
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = ctypes.c_int
    return function


_MEMCMP = _memcmp()
