"""Describe weight files as runs of bytes of their base and bytes that the base does not have."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeAlias

from mergekit_interleave import _dtypes
from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave.engines.out_file import OutFile
from mergekit_interleave.planning import arithmetic
from mergekit_interleave.planning.tensor_plan import Fill, Operation, TensorSpec

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
        parts: Its bytes in order: where they are on this machine, or the bytes themselves.
    """

    parts: tuple[Span | bytes, ...]

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
        return list(accumulate(map(_size, self.parts)))

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes from the offset `start` to `stop`, as far as the file has them."""
        start, stop = max(start, 0), min(stop, self.nbytes)
        found = []
        while start < stop:
            number = bisect_right(self._ends, start)
            part, end = self.parts[number], self._ends[number]
            offset = _size(part) - (end - start)
            found.append(_read(part, offset, min(stop, end) - start))
            start = min(stop, end)
        return b"".join(found)


def _size(part: Span | bytes) -> int:
    return len(part) if isinstance(part, bytes) else part.length


def _read(part: Span | bytes, offset: int, size: int) -> bytes:
    if isinstance(part, bytes):
        return part[offset : offset + size]
    with part.path.open("rb", buffering=0) as file:
        file.seek(part.start + offset)
        return file.read(size)


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


def planned(file: OutFile, header: bytes, *, multiplies: bool) -> list[Piece]:
    """Describe a file that an engine would write.

    Args:
        file: The file.
        header: Its bytes before the data.
        multiplies: Whether the engine multiplies by zero, which keeps the signs of floats.
    """
    bases = {source: BaseFile.of(source.file) for source in file.sources}
    pieces: list[Piece] = [header]
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
    if spec.mean_with is None and len(spec.dtypes) > 1 and (is_zero or spec.is_computed):
        return _computed(spec.operation)
    if is_zero:
        return signed_zeros(spec.tensor.width)
    return others if spec.is_computed or spec.model.lora is not None else None


@cache
def _computed(operation: Operation) -> Change:
    return partial(arithmetic.compute, operation=operation)


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


def in_itself(
    specs: Iterable[TensorSpec], originals: Sequence[TensorSpec], header: Span | bytes
) -> Origin:
    """Return where the base of a model is assumed to hold its tensors: in one file.

    Args:
        specs: What the model must contain, each tensor with its original in the model.
        originals: The tensors of the base, in the order of their data.
        header: The bytes before the data.
    """
    data = [Span(spec.tensor.file, spec.tensor.start, spec.nbytes) for spec in originals]
    base = BaseFile((header, *data))
    starts = accumulate((span.length for span in data), initial=_size(header))
    offsets = dict(zip((spec.name for spec in originals), starts, strict=False))
    sources = {
        spec.name: offsets[spec.source]
        for spec in specs
        if spec.is_unchanged and spec.source in offsets
    }

    def origin(name: str) -> tuple[BaseFile, int] | None:
        return (base, sources[name]) if name in sources else None

    return origin


def originals_of(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return the tensors of a model that are their own originals, in the order of their data."""
    own = (spec for spec in specs if spec.is_unchanged and spec.source == spec.name)
    return sorted(own, key=lambda spec: (spec.tensor.file, spec.tensor.start))


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
