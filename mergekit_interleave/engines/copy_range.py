"""Copy byte ranges between files: by sharing blocks, inside the kernel, or with read and write.

Support for a method is detected by trying it, not by the name of a system or filesystem.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit_interleave._interrupts import uninterrupted

if sys.platform == "linux":
    import fcntl

_CHUNK = 2**26
"""The maximum number of bytes per call, so that a run can be interrupted and show its progress."""

_BUFFER = 2**18
"""The maximum number of bytes per read or write; they fit in a processor's cache."""

FICLONERANGE = 0x4020940D
"""The Linux ioctl that shares the blocks of a range; see ioctl_ficlonerange(2)."""

_CANNOT = (
    errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM,
    errno.ETXTBSY,
)  # fmt: skip
"""The error codes of a call that the kernel does not support, at least for these two files."""

_CUT = "it was cut short while it was read"

Tick = Callable[[int], object]
"""A function that is called after each write, with the number of bytes written."""


@dataclass(frozen=True)
class Pair:
    """A file to read and a file to write.

    All methods raise OSError if the disk fails or is full, or if the source ends too early.

    Attributes:
        source: The descriptor of the file to read.
        target: The descriptor of the file to write.
        tick: Called after each write, with the number of bytes written.
    """

    source: int
    target: int
    tick: Tick

    def copy(self, start: int, at: int, length: int, *, by_hand: bool = False) -> None:
        """Copy a range, inside the kernel if possible.

        Args:
            start: The offset of the range in the source.
            at: The offset of the range in the target.
            length: The number of bytes.
            by_hand: Whether to use only read and write, because the kernel might share blocks.
        """
        way = self._by_hand if by_hand else self._in_the_kernel
        done = 0
        while done < length:
            try:
                moved = way(start + done, at + done, length - done)
            except (AttributeError, OSError) as error:
                if way == self._by_hand or getattr(error, "errno", errno.ENOSYS) not in _CANNOT:
                    raise
                way = self._by_hand
                continue
            if not moved:
                raise OSError(errno.EIO, _CUT)
            done += moved
            self.tick(moved)

    def _in_the_kernel(self, start: int, at: int, length: int) -> int:
        return os.copy_file_range(self.source, self.target, min(length, _CHUNK), start, at)

    def _by_hand(self, start: int, at: int, length: int) -> int:
        os.lseek(self.source, start, os.SEEK_SET)
        data = os.read(self.source, min(length, _BUFFER))
        self.put(data, at)
        return len(data)

    def read(self, start: int, length: int) -> bytes:
        """Read a range of the source."""
        os.lseek(self.source, start, os.SEEK_SET)
        parts = []
        while length:
            data = os.read(self.source, length)
            if not data:
                raise OSError(errno.EIO, _CUT)
            parts.append(data)
            length -= len(data)
        return b"".join(parts)

    def share(self, start: int, at: int, length: int) -> bool:
        """Share the blocks of a range; all numbers must be multiples of the block size.

        Args:
            start: The offset of the range in the source.
            at: The offset of the range in the target.
            length: The number of bytes.

        Returns:
            Whether the filesystem supports it.
        """
        if sys.platform != "linux":
            return False
        argument = struct.pack("@qQQQ", self.source, start, length, at)
        try:
            fcntl.ioctl(self.target, FICLONERANGE, argument)
        except OSError as error:
            if error.errno in _CANNOT:
                return False
            raise
        self.tick(length)
        return True

    def fill(self, data: bytes, at: int, length: int) -> None:
        """Write the same bytes repeatedly.

        Args:
            data: The bytes.
            at: The offset at which they start.
            length: The number of bytes to write, a multiple of the length of `data`.
        """
        block = data * max(_BUFFER // len(data), 1)
        for done in range(0, length, len(block)):
            piece = block[: length - done]
            self.put(piece, at + done)
            self.tick(len(piece))

    def put(self, data: bytes, at: int) -> None:
        """Write bytes at an offset."""
        os.lseek(self.target, at, os.SEEK_SET)
        view = memoryview(data)
        while view:
            view = view[os.write(self.target, view) :]


def can_share(source: Path, folder: Path, block: int) -> bool:
    """Try whether new files in a directory can share blocks with a given file."""

    def shares() -> bool:
        with source.open("rb") as opened, tempfile.TemporaryFile(dir=folder) as target:
            pair = Pair(opened.fileno(), target.fileno(), lambda _: None)
            return os.fstat(pair.source).st_size >= block and pair.share(0, 0, block)

    try:
        # Uninterrupted: if the system cannot create unnamed files, this one briefly has a name.
        return uninterrupted(shares)
    except OSError:
        return False
