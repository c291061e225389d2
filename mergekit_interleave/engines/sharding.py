"""Distribute tensors among the files of the result, and lay out each file.

Some filesystems can share blocks between files. A copied tensor can share its blocks with the base
if both start at the same offset within a block. Therefore an output shard contains the tensors of
one source shard in their original order, and its header is padded so that its data starts at the
same offset as in the source. A copy of a tensor that fills whole blocks follows its original, since
it does not change the offsets of later tensors; the other copies, which are small, are at the end.
If blocks cannot be shared, this costs nothing, so the layout does not depend on whether they can.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mergekit_interleave._stored_tensor import Shard
from mergekit_interleave.checkpoint.safetensors_header import WEIGHTS
from mergekit_interleave.planning.tensor_plan import ByteRange, Fill, Piece, TensorSpec

_ALIGNMENT = 8
"""The alignment of data in safetensors; no element is wider."""

_HEADER = 99_000_000
"""The maximum size of a header without padding and metadata; readers accept 100 MB."""


@dataclass(frozen=True)
class OutShard:
    """A file of the result.

    Attributes:
        name: Its name in OUT.
        specs: Its tensors, all from one source shard, in the order of their data.
        block: The block size: data keeps its offset within a block of this many bytes.
    """

    name: str
    specs: Sequence[TensorSpec]
    block: int

    @property
    def source(self) -> Shard:
        """The source shard of its tensors."""
        return self.specs[0].tensor.shard

    @property
    def nbytes(self) -> int:
        """The size of its data."""
        return sum(spec.nbytes for spec in self.specs)

    def header(self) -> bytes:
        """Return the bytes before the data: a length of 8 bytes, then the padded JSON."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt", **self.source.metadata}}
        offset = 0
        for spec in self.specs:
            entries[spec.name] = {
                "dtype": spec.dtype,
                "shape": spec.shape,
                "data_offsets": (offset, offset + spec.nbytes),
            }
            offset += spec.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        start = self._start
        start, step = (0, _ALIGNMENT) if start is None else (start, self.block)
        text += b" " * ((start - 8 - len(text)) % step)
        return struct.pack("<Q", len(text)) + text

    @property
    def _start(self) -> int | None:
        """The offset within a block at which the most data can share blocks; None if none can."""
        shareable: dict[int, int] = {}
        offset = 0
        for spec in self.specs:
            start = (spec.tensor.start - offset) % self.block
            if spec.is_whole and start % _ALIGNMENT == 0:
                shareable[start] = shareable.get(start, 0) + spec.nbytes
            offset += spec.nbytes
        return max(shareable, key=shareable.__getitem__, default=None)

    def steps(self, at: int, *, share: bool) -> Iterator[WriteStep]:
        """Yield the steps that write its data, in order.

        Args:
            at: The offset of the data in the file.
            share: Whether to share blocks with the source if the offsets agree.
        """
        end = at + self.nbytes
        for piece in _joined(piece for spec in self.specs for piece in spec.pieces()):
            if isinstance(piece, Fill):
                length = len(piece.data) * piece.times
                yield WriteStep("fill" if any(piece.data) else "hole", at, length, data=piece.data)
            else:
                length = piece.length
                before, blocks = _whole_blocks(piece, at, self.block) if share else (0, 0)
                ends = (("copy", 0, before), ("share", before, blocks))
                done = before + blocks
                for how, offset, size in (*ends, ("copy", done, length - done)):
                    if size:
                        yield WriteStep(how, at + offset, size, piece.start + offset)
            at += length
        if at != end:
            raise ValueError(f"{self.name}: its pieces do not add up to its size")


class WriteStep(NamedTuple):
    """The way to write a range of a file.

    Attributes:
        how: `copy` from the source, `share` whole blocks with it, leave a `hole` that reads as
            zeros, or `fill` with the same bytes repeatedly.
        at: The offset of the range in the file.
        length: The number of bytes.
        start: The offset of the bytes in the source.
        data: The bytes to fill it with.
    """

    how: str
    at: int
    length: int
    start: int = 0
    data: bytes = b""


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Join ranges that are adjacent in the source and in the result."""
    pending: ByteRange | None = None
    for piece in pieces:
        if (
            pending
            and isinstance(piece, ByteRange)
            and piece.start == pending.start + pending.length
        ):
            pending = ByteRange(pending.start, pending.length + piece.length)
            continue
        if pending:
            yield pending
        pending = piece if isinstance(piece, ByteRange) else None
        if isinstance(piece, Fill):
            yield piece
    if pending:
        yield pending


def _whole_blocks(piece: ByteRange, at: int, block: int) -> tuple[int, int]:
    """Return the offset and length of the whole blocks that the source and the target can share."""
    if (at - piece.start) % block:
        return 0, 0
    before = -at % block
    length = max(piece.length - before, 0) // block * block
    return (before, length) if length else (0, 0)


def shards_of(specs: Sequence[TensorSpec], limit: int, block: int) -> list[OutShard]:
    """Distribute the tensors of a model among files.

    Args:
        specs: Every tensor of the model; none needs arithmetic.
        limit: The maximum bytes of data in one shard, unless a single tensor is larger.
        block: The block size of the filesystem, a multiple of 8.
    """
    groups: dict[Shard, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.tensor.shard, []).append(spec)
    parts = [part for group in groups.values() for part in _cut(_in_order(group, block), limit)]
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        names = [WEIGHTS]
    return [
        OutShard(name, _with_aligned_elements(part), block)
        for name, part in zip(names, parts, strict=True)
    ]


def _in_order(specs: Sequence[TensorSpec], block: int) -> list[TensorSpec]:
    """Put the tensors of one source shard in the order that the module's docstring describes."""
    placed: set[str] = set()
    aligned: list[TensorSpec] = []
    at_the_end: list[TensorSpec] = []
    for spec in sorted(specs, key=lambda spec: spec.tensor.start):
        is_first = spec.source not in placed
        (aligned if is_first or spec.nbytes % block == 0 else at_the_end).append(spec)
        placed.add(spec.source)
    return aligned + at_the_end


def _cut(specs: Sequence[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    """Cut a sequence of tensors into parts, each of which fits in one shard."""
    shard: list[TensorSpec] = []
    size = header = 0
    for spec in specs:
        # The maximum size of an entry: the escaped name, and numbers of up to 20 digits.
        entry = len(json.dumps(spec.name)) + 22 * len(spec.shape) + 100
        if shard and (size + spec.nbytes > limit or header + entry > _HEADER):
            yield shard
            shard, size, header = [], 0, 0
        shard.append(spec)
        size += spec.nbytes
        header += entry
    yield shard


def _with_aligned_elements(specs: list[TensorSpec]) -> list[TensorSpec]:
    """Order the tensors so that each starts at a multiple of its element's size.

    The order changes only if narrow elements of an odd size precede wide ones.
    """
    offset = 0
    for spec in specs:
        if offset % max(spec.tensor.width, 1):
            return sorted(specs, key=lambda spec: spec.tensor.width, reverse=True)
        offset += spec.nbytes
    return specs
