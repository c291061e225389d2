"""Describe a tensor that is stored in a file, and the file.

The readers of safetensors and of GGUF files return these descriptions. None holds any data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mergekit_interleave import _dtypes
from mergekit_interleave.errors import CheckpointError


class Stamp(NamedTuple):
    """The identity of a file, used to detect changes."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Return the stamp of a file with this status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, eq=False)
class Shard:
    """A file that holds tensors.

    Attributes:
        file: The path.
        metadata: The `__metadata__` of a safetensors header; empty for a GGUF file.
        stamp: The identity of the file when its header was read.
    """

    file: Path
    metadata: Mapping[str, str]
    stamp: Stamp

    def check_unchanged(self, descriptor: int | None = None) -> None:
        """Check that the file has not changed since its header was read.

        Args:
            descriptor: The descriptor of the file, if it is open.

        Raises:
            CheckpointError: The file has changed.
        """
        try:
            status = self.file.stat() if descriptor is None else os.fstat(descriptor)
        except OSError as error:
            raise CheckpointError(f"{self.file}: {error.strerror or error}") from error
        if Stamp.of(status) != self.stamp:
            raise CheckpointError(f"{self.file}: changed while it was read")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A stored tensor, as its header describes it.

    Attributes:
        dtype: The dtype in safetensors' spelling, such as BF16, or the name of a ggml type, such as
            Q4_K.
        shape: The dimensions.
        start: The offset of the data in the file.
        nbytes: The size of the data in bytes.
        shard: The file that holds the data.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    shard: Shard

    @property
    def file(self) -> Path:
        """The path of the file that holds the data."""
        return self.shard.file

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """The size of one element in bytes; 0 if several elements share a byte."""
        if self.dtype in _dtypes.STORED:
            return _dtypes.STORED[self.dtype].bits // 8
        return self.nbytes // max(self.elements, 1)


def check_unchanged(tensors: Iterable[Tensor]) -> None:
    """Check that the files of the tensors have not changed since their headers were read.

    Raises:
        CheckpointError: A file has changed.
    """
    for shard in {tensor.shard for tensor in tensors}:
        shard.check_unchanged()


def padded(nbytes: int, alignment: int) -> int:
    """Round a number of bytes up to a multiple of an alignment."""
    return -(-nbytes // alignment) * alignment
