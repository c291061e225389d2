"""Describe weight files as runs of bytes of their base and bytes that the base does not have."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from mergekit_interleave import _dtypes
from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave.engines.out_file import OutFile
from mergekit_interleave.planning import arithmetic
from mergekit_interleave.planning.tensor_plan import Fill, TensorSpec

_OTHER = bytes(byte ^ 0x55 for byte in range(256))
_SIGN = bytes(byte & 0x80 for byte in range(256))


class Span(NamedTuple):
    """A range of bytes of a file on this machine."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class BaseFile:
    """A file of the base.

    Attributes:
        spans: The places of its bytes on this machine, in order.
    """

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, path: Path) -> BaseFile:
        """Return a whole file on this machine."""
        return cls((Span(path, 0, path.stat().st_size),))

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._ends[-1]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(span.length for span in self.spans))

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes from the offset `start` to `stop`, as far as the file has them."""
        start, stop = max(start, 0), min(stop, self.nbytes)
        parts = []
        while start < stop:
            number = bisect_right(self._ends, start)
            span, end = self.spans[number], self._ends[number]
            with span.path.open("rb", buffering=0) as file:
                file.seek(span.start + span.length - (end - start))
                parts.append(file.read(min(stop, end) - start))
            start = min(stop, end)
        return b"".join(parts)


Change: TypeAlias = Callable[[bytes], bytes]
"""Makes bytes of the base into bytes of the result, or into others that compress as well."""


def unchanged(data: bytes) -> bytes:
    """Return the bytes of a file that is not the base."""
    return data


def others(data: bytes) -> bytes:
    """Return bytes that compress like these, for numbers that are not computed yet."""
    return data.translate(_OTHER)


@cache
def signed_zeros(width: int) -> Change:
    """Return what multiplies floats by zero: they become zeros that keep their signs.

    Args:
        width: The size of a float in bytes.
    """

    def change(data: bytes) -> bytes:
        zeros = bytearray(len(data))
        zeros[width - 1 :: width] = data[width - 1 :: width].translate(_SIGN)
        return bytes(zeros)

    return change


class Run(NamedTuple):
    """A run of bytes in a file of the result.

    Attributes:
        file: The file of the base, or another that the bytes are derived from.
        start: The offset of the first byte in it.
        length: The number of bytes in it.
        change: Makes the bytes of the file into those of the result; None if the base has them.
    """

    file: BaseFile
    start: int
    length: int
    change: Change | None = None

    @property
    def stop(self) -> int:
        """The offset after the last byte."""
        return self.start + self.length

    def data(self) -> bytes:
        """Return its bytes in the result."""
        data = self.file.read(self.start, self.stop)
        return data if self.change is None else self.change(data)


Piece: TypeAlias = Run | bytes
"""A run, or bytes that are stated."""


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Join runs that are adjacent in the base and in the result."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else b""
        if (
            isinstance(piece, Run)
            and isinstance(last, Run)
            and (last.file, last.stop, last.change) == (piece.file, piece.start, None)
            and piece.change is None
        ):
            found[-1] = last._replace(length=last.length + piece.length)
        else:
            found.append(piece)
    return found


_CHUNK, _KEPT = 2**17, 8
"""The size in bytes of a chunk of equal bytes, which is the maximum, and the number of them that
are kept."""


def filled(data: bytes, length: int) -> bytes:
    """Return repeated bytes, without whole chunks that equal those before.

    Args:
        data: The bytes to repeat.
        length: The total number of bytes.
    """
    if length > _KEPT * _CHUNK:
        length = (_KEPT - 1) * _CHUNK + length % _CHUNK
    return (data * (length // len(data) + 1))[:length]


def planned(file: OutFile, *, multiplies: bool) -> list[Piece]:
    """Describe a file that an engine would write.

    Args:
        file: The file.
        multiplies: Whether the engine multiplies by zero, which keeps the signs of floats.
    """
    bases = {source: BaseFile.of(source.file) for source in file.sources}
    pieces: list[Piece] = [file.header()]
    for piece, spec in file.pieces():
        base, change = bases[spec.tensor.shard], _change(spec, multiplies=multiplies)
        is_padding = isinstance(piece, Fill) and spec.scale != 0 and spec.constant is None
        if change is not None and not is_padding:
            pieces.append(Run(base, spec.tensor.start, spec.tensor.nbytes, change))
        elif isinstance(piece, Fill):
            pieces.append(filled(piece.data, piece.length))
        else:
            pieces.append(Run(base, *piece))
    return joined(pieces)


def _change(spec: TensorSpec, *, multiplies: bool) -> Change | None:
    """Return how an engine changes the bytes of a tensor; None if the base has them."""
    is_zero = multiplies and spec.scale == 0 and _dtypes.is_float(spec.dtype)
    if len(spec.dtypes) > 1 and (is_zero or spec.is_computed):
        return _converted(spec.tensor.dtype, spec.scale, spec.through, spec.dtype)
    if is_zero:
        return signed_zeros(spec.tensor.width)
    return others if spec.is_computed or spec.model.lora is not None else None


@cache
def _converted(stored: str, scale: float | None, through: str, dtype: str) -> Change:
    return partial(arithmetic.compute, stored=stored, scale=scale, through=through, dtype=dtype)


Origin: TypeAlias = Callable[[str], "tuple[BaseFile, int] | None"]
"""Returns the file of the base, and the offset in it, that hold the bytes of a tensor of this name.

The base has other bytes there if the model was trained; None if it has no such tensor.
"""


def in_sources(specs: Iterable[TensorSpec]) -> Origin:
    """Return where the sources of a model hold its tensors.

    Args:
        specs: What the model must contain, each tensor with its source.
    """
    unchanged_specs = {spec.name: spec for spec in specs if spec.is_unchanged}
    files = {
        shard: BaseFile.of(shard.file)
        for shard in {spec.tensor.shard for spec in unchanged_specs.values()}
    }

    def origin(name: str) -> tuple[BaseFile, int] | None:
        spec = unchanged_specs.get(name)
        return None if spec is None else (files[spec.tensor.shard], spec.tensor.start)

    return origin


def in_itself(specs: Iterable[TensorSpec], order: Callable[[TensorSpec], Any]) -> Origin:
    """Return where the base of a model is assumed to hold its tensors: in one file, in an order.

    Args:
        specs: What the model must contain. Its original tensors are their own sources.
        order: The key that sorts the original tensors.
    """
    specs = [spec for spec in specs if spec.is_unchanged]
    originals = sorted((spec for spec in specs if spec.source == spec.name), key=order)
    header = _likely_header(originals)
    spans = (Span(spec.tensor.file, spec.tensor.start, spec.nbytes) for spec in originals)
    base = BaseFile((*header, *spans))
    starts = accumulate((spec.nbytes for spec in originals), initial=sum(h.length for h in header))
    offsets = dict(zip((spec.name for spec in originals), starts, strict=False))
    sources = {spec.name: offsets[spec.source] for spec in specs if spec.source in offsets}

    def origin(name: str) -> tuple[BaseFile, int] | None:
        return (base, sources[name]) if name in sources else None

    return origin


def _likely_header(originals: Sequence[TensorSpec]) -> list[Span]:
    """Return the bytes before the data of a model, but the first few: its base has others there."""
    if not originals:
        return []
    first = originals[0].tensor.file
    start = min(spec.tensor.start for spec in originals if spec.tensor.file == first)
    return [Span(first, 8, start - 8)]


def stored(tensors: Mapping[str, Tensor], origin: Origin) -> list[list[Piece]]:
    """Describe the weight files of a model that exists.

    Args:
        tensors: Its tensors by name.
        origin: Returns where the base holds the bytes of a tensor.

    Returns:
        The pieces of each file.
    """
    files: dict[Path, dict[str, Tensor]] = defaultdict(dict)
    for name in sorted(tensors, key=lambda name: tensors[name].start):
        files[tensors[name].file][name] = tensors[name]
    return [joined(_stored(BaseFile.of(path), files[path], origin)) for path in sorted(files)]


def _stored(own: BaseFile, tensors: Mapping[str, Tensor], origin: Origin) -> Iterator[Piece]:
    """Describe a file by its tensors, in the order of their data."""
    at = 0
    for name, tensor in tensors.items():
        if tensor.start > at:
            yield own.read(at, tensor.start)
        at = tensor.start + tensor.nbytes
        base, start = origin(name) or (own, tensor.start)
        size = min(tensor.nbytes, _COMPARED)
        known = base is not own and base.read(start, start + size) == own.read(
            tensor.start, tensor.start + size
        )
        if known:
            yield Run(base, start, tensor.nbytes)
        else:
            yield Run(own, tensor.start, tensor.nbytes, unchanged)
    if own.nbytes > at:
        yield own.read(at, own.nbytes)


_COMPARED = 2**16
"""The number of bytes of a tensor that are compared to find out whether it was trained."""
