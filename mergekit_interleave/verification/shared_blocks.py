"""Find the ranges of two files that share blocks on disk, which need not be read.

The kernel reports them (Linux: FS_IOC_FIEMAP). Ranges that it does not report must be read.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

if sys.platform == "linux":
    import fcntl

FIEMAP = 0xC020660B
"""Linux: FS_IOC_FIEMAP, see Documentation/filesystems/fiemap.rst."""

_SYNC = 0x1
"""The flag that writes cached data to disk first."""

_SHARED = 0x2000
_PLAIN = 0x1 | 0x1000 | _SHARED
"""The flags (last, merged, shared) of an extent whose disk position identifies its content."""

_HEADER, _EXTENT = struct.Struct("=QQLLLL"), struct.Struct("=QQQQQLLLL")
_MOST = 256
"""The most extents of one request."""


class _Extent(NamedTuple):
    """A range of a file that is contiguous on disk."""

    start: int
    stop: int
    place: int


def unshared(ours: int, at: int, theirs: int, start: int, length: int) -> Iterator[tuple[int, int]]:
    """Find the parts of a range of one file that share no blocks with a range of another.

    Args:
        ours: The descriptor of the first file.
        at: Where the range starts in it.
        theirs: The descriptor of the second file.
        start: Where the range starts there.
        length: Its length.

    Yields:
        The offset within the range and the length of each part.
    """
    done = 0
    for first, stop in sorted(_shared(ours, at, theirs, start, length)):
        if first > done:
            yield done, first - done
        done = max(done, stop)
    if done < length:
        yield done, length - done


def _shared(ours: int, at: int, theirs: int, start: int, length: int) -> Iterator[tuple[int, int]]:
    if sys.platform != "linux" or os.fstat(ours).st_dev != os.fstat(theirs).st_dev:
        return
    mine = _extents(ours, at, length)
    others = _extents(theirs, start, length) if mine else []
    for one in mine:
        for other in others:
            first = max(one.start - at, other.start - start, 0)
            stop = min(one.stop - at, other.stop - start, length)
            same = one.place + at - one.start == other.place + start - other.start
            if first < stop and same:
                yield first, stop


def _extents(descriptor: int, start: int, length: int) -> list[_Extent]:
    """The shared extents of a range of a file; none if the kernel does not support this."""
    size = _HEADER.size + _MOST * _EXTENT.size
    answer = bytearray(_HEADER.pack(start, length, _SYNC, 0, _MOST, 0).ljust(size, b"\0"))
    try:
        fcntl.ioctl(descriptor, FIEMAP, answer)
    except OSError:
        return []
    count = _HEADER.unpack_from(answer)[3]
    found = []
    for number in range(min(count, _MOST)):
        logical, place, nbytes, _, _, flags, *_ = _EXTENT.unpack_from(
            answer, _HEADER.size + number * _EXTENT.size
        )
        if flags & _SHARED and not flags & ~_PLAIN:
            found.append(_Extent(logical, logical + nbytes, place))
    return found
