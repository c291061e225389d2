"""Find the ranges of two files that do not share blocks on disk. Only these ranges must be read.

The kernel reports shared blocks (Linux: FS_IOC_FIEMAP).
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
"""FS_IOC_FIEMAP, see Documentation/filesystems/fiemap.rst in the Linux sources."""

_SYNC = 0x1
"""The flag that writes cached data to disk first."""

_SHARED = 0x2000
_PLAIN = 0x1 | 0x1000 | _SHARED
"""The flags (last, merged, shared) of an extent whose disk position identifies its content."""

_HEADER, _EXTENT = struct.Struct("=QQLLLL"), struct.Struct("=QQQQQLLLL")
"""The formats of the header of a request, and of each extent after it."""

_MAX_EXTENTS = 256
"""The maximum number of extents of one request."""


class _Extent(NamedTuple):
    """A range of a file that is contiguous on disk.

    Attributes:
        start: The offset of its first byte in the file.
        stop: The offset after its last byte.
        place: The offset of its first byte on disk.
    """

    start: int
    stop: int
    place: int


def unshared(
    file: int, start: int, other: int, other_start: int, length: int
) -> Iterator[tuple[int, int]]:
    """Find the parts of a range of one file that share no blocks with a range of another.

    Args:
        file: The descriptor of the first file.
        start: The offset of the range in the first file.
        other: The descriptor of the second file.
        other_start: The offset of the range in the second file.
        length: The length of both ranges.

    Yields:
        The offset within the range and the length of each part.
    """
    done = 0
    for first, stop in sorted(_shared(file, start, other, other_start, length)):
        if first > done:
            yield done, first - done
        done = max(done, stop)
    if done < length:
        yield done, length - done


def _shared(
    file: int, start: int, other: int, other_start: int, length: int
) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each part that shares blocks, within the range."""
    if sys.platform != "linux" or os.fstat(file).st_dev != os.fstat(other).st_dev:
        return
    extents = _extents(file, start, length)
    other_extents = _extents(other, other_start, length) if extents else []
    for one in extents:
        for two in other_extents:
            first = max(one.start - start, two.start - other_start, 0)
            stop = min(one.stop - start, two.stop - other_start, length)
            same = one.place + start - one.start == two.place + other_start - two.start
            if first < stop and same:
                yield first, stop


def _extents(descriptor: int, start: int, length: int) -> list[_Extent]:
    """Return the shared extents of a range of a file; none if the kernel cannot report them."""
    size = _HEADER.size + _MAX_EXTENTS * _EXTENT.size
    answer = bytearray(_HEADER.pack(start, length, _SYNC, 0, _MAX_EXTENTS, 0).ljust(size, b"\0"))
    try:
        fcntl.ioctl(descriptor, FIEMAP, answer)
    except OSError:
        return []
    count = _HEADER.unpack_from(answer)[3]
    found = []
    for number in range(min(count, _MAX_EXTENTS)):
        logical, place, nbytes, _, _, flags, *_ = _EXTENT.unpack_from(
            answer, _HEADER.size + number * _EXTENT.size
        )
        if flags & _SHARED and not flags & ~_PLAIN:
            found.append(_Extent(logical, logical + nbytes, place))
    return found
