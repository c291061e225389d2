"""Lay out a file of the result: which bytes of it are copied, shared, holes or filled.

Some filesystems can share blocks between files. A copied tensor can share its blocks with the base
if both start at the same offset within a block. Therefore a file contains the tensors of one source
file in their original order, and its header is padded so that its data starts at the same offset as
in the source. A tensor that fills whole blocks does not change the offsets of later ones. Therefore
the copies of such tensors follow the last of their originals before the next tensor that fills no
whole blocks. The other copies, which are small, are at the end, before zeros and computed tensors.
If blocks cannot be shared, this costs nothing, so the layout does not depend on whether they can.

The Hub's storage sends a chunk of about 64 KiB again wherever a file departs from the bytes of the
base. Tensors that are adjacent in the base are therefore also copied as one run, and all zeros of a
file are together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from mergekit_interleave._stored_tensor import Shard, padded
from mergekit_interleave.planning.tensor_plan import ByteRange, Fill, Piece, TensorSpec

Sharing = Callable[[Shard], bool]
"""Returns whether blocks are shared with a source file."""


class WriteStep(NamedTuple):
    """The way to write a range of a file.

    Attributes:
        how: `copy` from the source, `share` whole blocks with it, leave a `hole` that reads as
            zeros, `fill` with the same bytes repeatedly, or `compute` the numbers of a tensor.
        at: The offset of the range in the file.
        length: The number of bytes.
        start: The offset of the bytes in the source.
        data: The bytes to fill it with.
        spec: The tensor, if the range is copied, shared or computed.
    """

    how: str
    at: int
    length: int
    start: int = 0
    data: bytes = b""
    spec: TensorSpec | None = None


@dataclass(frozen=True)
class OutFile(ABC):
    """A file of the result.

    Attributes:
        name: Its name.
        specs: Its tensors, in the order of their data.
        block: The block size: data keeps its offset within a block of this many bytes.
    """

    name: str
    specs: Sequence[TensorSpec]
    block: int

    @abstractmethod
    def header(self) -> bytes:
        """Return the bytes before the data."""

    @property
    def alignment(self) -> int:
        """The number of bytes at a multiple of which each tensor starts."""
        return 1

    @property
    def sources(self) -> list[Shard]:
        """The source files of its tensors."""
        means = (spec.mean_with.tensor.shard for spec in self.specs if spec.mean_with is not None)
        return list(dict.fromkeys((*(spec.tensor.shard for spec in self.specs), *means)))

    @property
    def nbytes(self) -> int:
        """The size of its data, with the padding between tensors."""
        return sum(padded(spec.nbytes, self.alignment) for spec in self.specs)

    def best_start(self, step: int) -> int | None:
        """Return the offset within a block at which the most data can share blocks, if any.

        Args:
            step: The number that the offset must be a multiple of.
        """
        shareable: dict[int, int] = {}
        offset = 0
        for spec in self.specs:
            start = (spec.tensor.start - offset) % self.block
            if spec.is_unchanged and start % step == 0:
                shareable[start] = shareable.get(start, 0) + spec.nbytes
            offset += padded(spec.nbytes, self.alignment)
        return max(shareable, key=shareable.__getitem__, default=None)

    def steps(self, at: int, share: Sharing) -> Iterator[WriteStep]:
        """Yield the steps that write its data, in order.

        Args:
            at: The offset of the data in the file.
            share: Whether to share blocks with a source if the offsets agree.
        """
        end = at + self.nbytes
        for piece, spec in _joined(self.pieces()):
            if isinstance(piece, Fill):
                how = "fill" if any(piece.data) else "hole"
                yield WriteStep(how, at, piece.length, data=piece.data)
            elif spec.is_computed:
                yield WriteStep("compute", at, piece.length, piece.start, spec=spec)
            else:
                yield from self._moved(piece, spec, at, share=share(spec.tensor.shard))
            at += piece.length
        if at != end:
            raise ValueError(f"{self.name}: its pieces do not add up to its size")

    def _moved(
        self, piece: ByteRange, spec: TensorSpec, at: int, *, share: bool
    ) -> Iterator[WriteStep]:
        before, blocks = _whole_blocks(piece, at, self.block) if share else (0, 0)
        done = before + blocks
        ranges = (("copy", 0, before), ("share", before, blocks))
        for how, offset, size in (*ranges, ("copy", done, piece.length - done)):
            if size:
                yield WriteStep(how, at + offset, size, piece.start + offset, spec=spec)

    def pieces(self) -> Iterator[tuple[Piece, TensorSpec]]:
        """Yield the pieces of its data in order: those of all tensors, and the padding behind."""
        for spec in self.specs:
            if spec.is_computed:
                yield ByteRange(spec.tensor.start, spec.nbytes), spec
            else:
                for piece in spec.pieces():
                    yield piece, spec
            padding = padded(spec.nbytes, self.alignment) - spec.nbytes
            if padding:
                yield Fill(b"\0", padding), spec


def _joined(
    pieces: Iterable[tuple[Piece, TensorSpec]],
) -> Iterator[tuple[Piece, TensorSpec]]:
    """Join ranges that are adjacent in the source and in the result."""
    pending: tuple[ByteRange, TensorSpec] | None = None
    for piece, spec in pieces:
        if (
            pending
            and isinstance(piece, ByteRange)
            and spec.tensor.shard is pending[1].tensor.shard
            and not (spec.is_computed or pending[1].is_computed)
            and piece.start == pending[0].start + pending[0].length
        ):
            pending = ByteRange(pending[0].start, pending[0].length + piece.length), pending[1]
            continue
        if pending:
            yield pending
        pending = (piece, spec) if isinstance(piece, ByteRange) else None
        if isinstance(piece, Fill):
            yield piece, spec
    if pending:
        yield pending


def _whole_blocks(piece: ByteRange, at: int, block: int) -> tuple[int, int]:
    """Return the offset and length of the whole blocks that the source and the target can share."""
    if (at - piece.start) % block:
        return 0, 0
    before = -at % block
    length = (piece.length - before) // block * block
    return (before, length) if length > 0 else (0, 0)


def in_order(specs: Sequence[TensorSpec], block: int, alignment: int = 1) -> list[TensorSpec]:
    """Put the tensors of one source file in the order that the module's docstring describes.

    Args:
        specs: The tensors.
        block: The block size.
        alignment: The number of bytes at a multiple of which each tensor starts.
    """
    section, end = 0, 0
    numbers: Counter[str] = Counter()
    keyed: list[tuple[tuple[int, int, int], TensorSpec]] = []
    for spec in sorted(specs, key=lambda spec: spec.tensor.start):
        number, keeps = numbers[spec.source], padded(spec.nbytes, alignment) % block == 0
        numbers[spec.source] += 1
        if number == 0:
            section += not keeps or (spec.tensor.start - end) % block != 0
            end = spec.tensor.start + padded(spec.tensor.nbytes, alignment)
        if number == 0 or (keeps and spec.is_unchanged):
            keyed.append(((0, section, number), spec))
        else:
            keyed.append(((1 if spec.is_unchanged else 2, 0, 0), spec))
    return [spec for _, spec in sorted(keyed, key=itemgetter(0))]
