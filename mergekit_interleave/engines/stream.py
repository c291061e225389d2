"""This project's own engine: bytes are moved as they are.

It does no arithmetic: every tensor of the result is made of bytes of a source tensor, zeros and
stated constants. Bytes move inside the kernel, zeros are holes, and nothing is kept in memory.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from mergekit_interleave.assembly import Part, Range
from mergekit_interleave.shards import INDEX, WEIGHTS

_BLOCK = 2**22


def reason_against(parts: Sequence[Part]) -> str | None:
    """Why these tensors need arithmetic, if they do."""
    for part in parts:
        if part.scale not in (None, 0, 1):
            return f"{part.name} is multiplied by {part.scale:g}"
        if part.dtype != part.tensor.dtype:
            return f"{part.name} is converted from {part.tensor.dtype} to {part.dtype}"
        if part.model.lora is not None:
            return f"{part.name} is merged with a LoRA"
    return None


def write(parts: Sequence[Part], out: Path, shard_size: int) -> None:
    """Write the weights into a directory.

    Args:
        parts: Every tensor of the result; none needs arithmetic.
        out: The directory.
        shard_size: The most bytes of one shard, unless a single tensor is larger.
    """
    # Wide elements first, so that every tensor starts at a multiple of its element's size.
    parts = sorted(parts, key=lambda part: -part.tensor.nbytes // max(part.tensor.elements, 1))
    shards = list(_shards(parts, shard_size))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [WEIGHTS]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(out / name, shard)
    if len(shards) > 1:
        content = {
            "metadata": {"total_size": sum(part.nbytes for part in parts)},
            "weight_map": {
                part.name: name for name, shard in zip(names, shards, strict=True) for part in shard
            },
        }
        (out / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(parts: Sequence[Part], limit: int) -> Iterator[list[Part]]:
    shard: list[Part] = []
    size = 0
    for part in parts:
        if shard and size + part.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += part.nbytes
    yield shard


def _write_shard(file: Path, parts: Sequence[Part]) -> None:
    """8 bytes of header length, the header padded to a multiple of 8, then the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for part in parts:
        header[part.name] = {
            "dtype": part.dtype,
            "shape": part.shape,
            "data_offsets": [offset, offset + part.nbytes],
        }
        offset += part.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as out:
        _write_all(out.fileno(), struct.pack("<Q", len(text)) + text)
        for source, neighbours in groupby(parts, key=lambda part: part.tensor.file):
            with source.open("rb", buffering=0) as opened:
                for part in neighbours:
                    _write_part(part, opened.fileno(), out.fileno())
        out.truncate(8 + len(text) + offset)  # zeros at the end are a hole, too
        os.fsync(out.fileno())


def _write_part(part: Part, source: int, out: int) -> None:
    for piece in part.pieces():
        if isinstance(piece, Range):
            _copy(source, out, piece)
        elif not any(piece.data):
            os.lseek(out, len(piece.data) * piece.times, os.SEEK_CUR)  # a hole reads as zeros
        else:
            most = max(_BLOCK // len(piece.data), 1)
            for done in range(0, piece.times, most):
                _write_all(out, piece.data * min(most, piece.times - done))


def _copy(source: int, out: int, piece: Range) -> None:
    """Move bytes inside the kernel where it can, through this process where it cannot."""
    start, stop = piece.start, piece.start + piece.length
    while start < stop:
        try:
            moved = os.copy_file_range(source, out, stop - start, start)
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in _NOT_IN_THE_KERNEL:
                raise
            block = os.pread(source, min(_BLOCK, stop - start), start)
            _write_all(out, block)
            moved = len(block)
        if not moved:
            raise OSError(errno.EIO, "a source was cut short while it was read")
        start += moved


_NOT_IN_THE_KERNEL = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""What it answers where it has no such call, or not between these two filesystems."""


def _write_all(out: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]
