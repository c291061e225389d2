"""Read the header of a GGUF file, and write one.

A file has the metadata, the descriptions of its tensors, and their data. What ggml rejects is
rejected here, too, before anything is written. Source:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from mergekit_interleave._stored_tensor import Shard, Stamp, Tensor, padded
from mergekit_interleave.errors import CheckpointError
from mergekit_interleave.gguf import values
from mergekit_interleave.gguf.ggml_types import BY_NAME, BY_NUMBER
from mergekit_interleave.gguf.values import ARRAY, SIZES, STRING, UINT32, Value

MAGIC = b"GGUF"
VERSIONS = (2, 3)

ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32

_MAX_HEADER = 2**28
"""The maximum size of a header in bytes. The largest tokenizers take a tenth of it."""

_MAX_NESTING = 8
"""The maximum depth of arrays in arrays."""

_MAX_DIMENSIONS, _MAX_NAME = 4, 63
"""The limits of ggml on the shape and on the name of a tensor."""

_MAX_ALIGNMENT = 2**20
"""The maximum alignment in bytes: each header and each tensor is padded to a multiple of it."""

_CHUNK = 2**22
"""The number of bytes read at once."""


@dataclass(frozen=True, eq=False)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        shard: The file.
        version: The version of the format.
        metadata: The metadata, in its order.
        tensors: The tensors, in the order of their data. A shape has the slowest dimension first.
        alignment: The alignment of the data in bytes.
        start: The offset of the data in the file.
    """

    shard: Shard
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Tensor]
    alignment: int
    start: int

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.shard.file


def is_gguf(path: str) -> bool:
    """Whether a path names a GGUF file, by its suffix or its first bytes."""
    if path.lower().endswith(".gguf"):
        return not os.path.isdir(path)  # noqa: PTH112 - Path.is_dir may raise
    if not os.path.isfile(path):
        return False
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(path: Path) -> GgufFile:
    """Read the header of a file.

    Raises:
        CheckpointError: The file cannot be read, or is one that ggml rejects.
    """
    try:
        # Non-blocking, because opening a pipe would otherwise wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            return _parse(Shard(path, {}, Stamp.of(status)), _Reader(file, status.st_size))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except _MalformedError as error:
        raise CheckpointError(f"{path}: malformed GGUF header ({error})") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: malformed GGUF header (a name is not UTF-8)") from error


class _MalformedError(Exception):
    """The content of a header is wrong."""


class _Reader:
    """Reads a file from its start, in large pieces.

    Attributes:
        data: The bytes read so far.
        at: The offset of the next value.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.data, self.at = bytearray(), 0

    def need(self, length: int) -> None:
        """Read on, so that a number of bytes are at hand."""
        wanted = self.at + length - len(self.data)
        if wanted <= 0:
            return
        if length > self.rest:
            raise _MalformedError("it ends before the end of the file" if self.at else "empty")
        if self.at + length > _MAX_HEADER:
            raise _MalformedError(f"longer than {_MAX_HEADER} bytes")
        while wanted > 0:
            piece = self._file.read(max(_CHUNK, wanted))
            if not piece:
                raise _MalformedError("the file was truncated while it was read")
            self.data += piece
            wanted -= len(piece)

    @property
    def rest(self) -> int:
        """The number of bytes of the file that are left."""
        return self._size - self.at

    def take(self, length: int) -> bytes:
        """Return the next bytes."""
        self.need(length)
        found = bytes(self.data[self.at : self.at + length])
        self.at += length
        return found

    def unpack(self, code: str, length: int) -> tuple[int, ...]:
        """Return the next numbers."""
        self.need(length)
        found = struct.unpack_from(code, self.data, self.at)
        self.at += length
        return found

    def skip_texts(self, count: int) -> None:
        """Skip a number of texts."""
        if count * 8 > self.rest:
            raise _MalformedError(f"an array of {count} texts does not fit in the file")
        for _ in range(count):
            if self.at + 8 > len(self.data):
                self.need(8)
            self.at += 8 + int.from_bytes(self.data[self.at : self.at + 8], "little")
            if self.at > len(self.data):
                self._return_to_end()

    def _return_to_end(self) -> None:
        """Read up to the current offset."""
        end = self.at
        self.at = len(self.data)
        self.need(end - self.at)
        self.at = end


def _parse(shard: Shard, reader: _Reader) -> GgufFile:
    path = shard.file
    if reader.rest < len(MAGIC) or reader.take(len(MAGIC)) != MAGIC:
        tiny = shard.stamp.size < 1024  # noqa: PLR2004 - pointers are tiny
        raise CheckpointError(
            f"{path}: not a GGUF file, or cut short",
            hint="if it is a Git LFS pointer, run `git lfs pull`" if tiny else None,
        )
    (version,) = reader.unpack("<I", 4)
    _check_version(version, path)
    tensors, pairs = reader.unpack("<QQ", 16)
    metadata = _metadata(reader, pairs)
    alignment = alignment_of(metadata)
    rows = _rows(reader, tensors)
    start = padded(reader.at, alignment)
    found = _tensors(rows, shard, start, alignment)
    return GgufFile(shard, version, metadata, found, alignment, start)


def _check_version(version: int, path: Path) -> None:
    if version in VERSIONS:
        return
    if version and version % 2**16 == 0:
        raise CheckpointError(
            f"{path}: the numbers in this file are big-endian, which cannot be read",
            hint="convert it: `gguf-convert-endian FILE little`, from the package gguf",
        )
    known = " and ".join(map(str, VERSIONS))
    raise CheckpointError(f"{path}: GGUF version {version}; only versions {known} can be read")


def _name(reader: _Reader) -> str:
    (length,) = reader.unpack("<Q", 8)
    name = reader.take(length).decode()
    if not name:
        raise _MalformedError("a name is empty")
    return name


def _metadata(reader: _Reader, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(count):
        key = _name(reader)
        if key in metadata:
            raise _MalformedError(f"two values of the key {key!r:.100}")
        (kind,) = reader.unpack("<I", 4)
        metadata[key] = _value(reader, kind, key)
    return metadata


def _value(reader: _Reader, kind: int, key: str) -> Value:
    begin = reader.at
    items, count = _skip(reader, kind, key, 0)
    return Value(kind, bytes(reader.data[begin : reader.at]), items, count)


def _skip(reader: _Reader, kind: int, key: str, nesting: int) -> tuple[int | None, int]:
    """Skip a value; return the type and the number of the items of an array."""
    if kind in SIZES:
        reader.take(SIZES[kind])
        return None, 0
    if kind == STRING:
        reader.skip_texts(1)
        return None, 0
    if kind != ARRAY:
        raise _MalformedError(f"unknown type {kind} of the value of {key!r:.100}")
    items, count = reader.unpack("<IQ", 12)
    if items in SIZES:
        reader.need(count * SIZES[items])
        reader.at += count * SIZES[items]
    elif items == STRING:
        reader.skip_texts(count)
    elif nesting == _MAX_NESTING or count * 12 > reader.rest:
        raise _MalformedError(f"the arrays of {key!r:.100} do not fit in the file")
    else:
        for _ in range(count):
            _skip(reader, items, key, nesting + 1)
    return items, count


def alignment_of(metadata: Mapping[str, Value]) -> int:
    """Return the alignment of the data in bytes that the metadata states."""
    value = metadata.get(ALIGNMENT)
    if value is None:
        return DEFAULT_ALIGNMENT
    alignment = value.decoded() if value.kind == UINT32 else 0
    if alignment < 1 or alignment & (alignment - 1) or alignment > _MAX_ALIGNMENT:
        raise _MalformedError(f"{ALIGNMENT} is not a power of two up to {_MAX_ALIGNMENT}")
    return int(alignment)


_Row = tuple[str, tuple[int, ...], int, int]
"""The name, dimensions, type and offset of a tensor. The fastest dimension is the first."""


def _rows(reader: _Reader, count: int) -> list[_Row]:
    if count * 24 > reader.rest:
        raise _MalformedError(f"{count} tensors do not fit in the file")
    rows = []
    for _ in range(count):
        name = _name(reader)
        (dimensions,) = reader.unpack("<I", 4)
        if dimensions > _MAX_DIMENSIONS:
            raise _MalformedError(f"{name!r:.100} has {dimensions} dimensions")
        *shape, kind, offset = reader.unpack(f"<{dimensions}QIQ", 8 * dimensions + 12)
        rows.append((name, tuple(shape), kind, offset))
    return rows


def _tensors(rows: Iterable[_Row], shard: Shard, start: int, alignment: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, dimensions, kind, offset in rows:
        if name in tensors:
            raise _MalformedError(f"two tensors {name!r:.100}")
        if len(name.encode()) > _MAX_NAME:
            raise _MalformedError(f"the name {name!r:.100} has more than {_MAX_NAME} bytes")
        row = BY_NUMBER.get(kind)
        if row is None:
            raise _MalformedError(f"{name} has the unknown type {kind}")
        elements = math.prod(dimensions)
        first = dimensions[0] if dimensions else 1
        if max(elements, *dimensions, 0) >= 2**63 or first % row.elements:
            raise _MalformedError(f"{name} has the shape {list(dimensions)}, of {row.name}")
        if offset != end:
            raise _MalformedError(f"{name} starts at offset {offset}, not at {end}")
        nbytes = elements // row.elements * row.nbytes
        if start + offset + nbytes > shard.stamp.size:
            raise CheckpointError(f"{shard.file}: cut short: it ends before the end of {name}")
        end += padded(nbytes, alignment)
        tensors[name] = Tensor(row.name, dimensions[::-1], start + offset, nbytes, shard)
    return tensors


class Entry(NamedTuple):
    """The description of a tensor in a header that is written.

    Attributes:
        name: Its name.
        type: The name of its type.
        shape: Its shape, with the slowest dimension first.
        nbytes: The size of its data.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


def encode(metadata: Mapping[str, Value], entries: Sequence[Entry], version: int) -> bytes:
    """Return the bytes of a header, up to the data, which is aligned as the metadata states."""
    alignment = alignment_of(metadata)
    return encode_with(metadata, encode_entries(entries, alignment), len(entries), version)


def encode_entries(entries: Iterable[Entry], alignment: int) -> bytes:
    """Return the bytes of the descriptions of tensors whose data is aligned."""
    parts, offset = [], 0
    for entry in entries:
        shape, kind = entry.shape[::-1], BY_NAME[entry.type].number
        numbers = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        parts += [values.text(entry.name).data, numbers]
        offset += padded(entry.nbytes, alignment)
    return b"".join(parts)


def encode_with(metadata: Mapping[str, Value], encoded: bytes, count: int, version: int) -> bytes:
    """Return the bytes of a header, up to the data.

    Args:
        metadata: The metadata.
        encoded: The descriptions of the tensors; see `encode_entries`.
        count: The number of tensors.
        version: The version of the format.
    """
    parts = [MAGIC, struct.pack("<IQQ", version, count, len(metadata))]
    for key, value in metadata.items():
        parts += [values.text(key).data, struct.pack("<I", value.kind), value.data]
    header = b"".join([*parts, encoded])
    return header.ljust(padded(len(header), alignment_of(metadata)), b"\0")
