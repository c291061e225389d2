"""This project's own writer, for what mergekit cannot write: bytes are copied as they are.

It does no arithmetic: every tensor of the result is made of bytes of a source tensor, zeros and
stated constants.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from mergekit_interleave.assembly import Fill, Part
from mergekit_interleave.checkpoint import INDEX, WEIGHTS

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
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            for block in _data(part):
                out.write(block)


def _data(part: Part) -> Iterator[bytes]:
    with part.tensor.file.open("rb") as file:
        for piece in part.pieces():
            if isinstance(piece, Fill):
                most = max(_BLOCK // len(piece.data), 1)
                for done in range(0, piece.times, most):
                    yield piece.data * min(most, piece.times - done)
                continue
            file.seek(piece.start)
            left = piece.length
            while left:
                block = file.read(min(_BLOCK, left))
                if not block:
                    raise OSError(f"{part.tensor.file} was cut short while it was read")
                left -= len(block)
                yield block
