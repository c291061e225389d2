"""Compare the bytes of tensors with the expected ones.

A few threads read each side once, in blocks. torch is imported only if a weight was computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import IO, NamedTuple

from mergekit_interleave import _dtypes
from mergekit_interleave._stored_tensor import Shard, Tensor
from mergekit_interleave.checkpoint.safetensors_header import next_data
from mergekit_interleave.errors import CheckpointError
from mergekit_interleave.planning import arithmetic
from mergekit_interleave.planning.tensor_plan import ByteRange, Fill, TensorSpec
from mergekit_interleave.verification import shared_blocks

_BLOCK = 2**20
"""The number of bytes compared at once; each thread has one block of each side in memory. Smaller
blocks take more processor time for each byte."""

_SPAN = 2**26
"""The maximum size of one job in bytes, so that a large tensor keeps all threads busy."""

_THREADS = 2
"""The number of threads. Reading releases Python's global lock; comparing does not."""

_MAX_OPEN = 4
"""The number of files that a thread keeps open. A job needs two at once."""


class Difference(NamedTuple):
    """A difference between a model and what it must contain.

    Attributes:
        what: A description; if `tensor` is given, a predicate that follows its name.
        tensor: The name of the tensor, if the difference concerns one.
        layer: The index of the tensor's layer in the new model, if it belongs to one.
        file: The name of the file beside the weights, if the difference concerns one.
    """

    what: str
    tensor: str | None = None
    layer: int | None = None
    file: str | None = None

    def __str__(self) -> str:
        place = "" if self.layer is None else f"layer {self.layer}: "
        return f"{place}{self.tensor} {self.what}" if self.tensor else self.what


class Pair(NamedTuple):
    """A tensor and its specification.

    Attributes:
        found: The tensor.
        spec: Its specification.
        source_name: The name of its source model within a sentence.
    """

    found: Tensor
    spec: TensorSpec
    source_name: str

    def difference(self, at: int) -> Difference:
        """Describe the difference at a byte offset of the tensor."""
        spec = self.spec
        what = "is not zero" if spec.scale == 0 else f"differs from {self._expected()}"
        shape, element = self.found.shape, at // max(self.found.width, 1)
        place = [element // math.prod(shape[axis + 1 :]) % size for axis, size in enumerate(shape)]
        where = f", first at {place}" if place else ""
        return Difference(f"{what}{where}", self.spec.name, self.spec.layer)

    def _expected(self) -> str:
        """Describe the expected values of a tensor that is not zeroed."""
        spec = self.spec
        steps = [f"averaged with {spec.mean_with.source}"] if spec.mean_with else []
        steps += [f"multiplied by {spec.scale:g}"] if spec.scale not in (None, 1) else []
        steps += [f"converted to {spec.dtype}"] if len(spec.dtypes) > 1 else []
        steps += [] if spec.constant is None else [f"filled with {spec.constant.value:g}"]
        if spec.source == spec.name and not steps:
            return self.source_name
        return ", ".join([f"{spec.source} of {self.source_name}", *steps])


class Job(NamedTuple):
    """A range of a tensor whose expected bytes are stored in one place, or are computed.

    Attributes:
        pair: The tensor and its specification.
        at: The offset of the range in the tensor.
        length: The length of the range in bytes.
        piece: The expected bytes; None if they are computed.
    """

    pair: Pair
    at: int
    length: int
    piece: ByteRange | Fill | None

    @property
    def stop(self) -> int:
        """The offset in the file at which the range ends."""
        return self.pair.found.start + self.at + self.length

    @property
    def is_last(self) -> bool:
        """Whether the range ends the tensor."""
        return self.at + self.length == self.pair.found.nbytes


def has_form(tensor: Tensor, spec: TensorSpec) -> bool:
    """Return whether a tensor has exactly the expected shape and dtype."""
    return tensor.shape == spec.shape and tensor.dtype == spec.dtype


def jobs_of(pairs: Iterable[Pair]) -> Iterator[Job]:
    """Yield the jobs of all tensors."""
    for pair in pairs:
        at = 0
        for length, piece in _expected_pieces(pair):
            for done in range(0, length, _SPAN):
                rest = min(length - done, _SPAN)
                if isinstance(piece, ByteRange):
                    yield Job(pair, at + done, rest, ByteRange(piece.start + done, rest))
                else:
                    yield Job(pair, at + done, rest, piece)
            at += length


def _expected_pieces(pair: Pair) -> Iterator[tuple[int, ByteRange | Fill | None]]:
    """Yield the length and the location of the expected bytes of a tensor, in order."""
    if pair.spec.is_computed:
        yield pair.found.nbytes, None
        return
    for piece in pair.spec.pieces():
        yield piece.length, piece


def differences_of(pairs: Iterable[Pair]) -> list[Difference]:
    """Compare the bytes, and return the first difference of each tensor."""
    jobs, lock, stopped = jobs_of(pairs), Lock(), Event()
    wrong: dict[str, tuple[int, Pair]] = {}

    def work() -> None:
        with closing(Files()) as files:
            while (job := take()) is not None:
                name, at = job.pair.spec.name, first_difference(job, files)
                with lock:
                    if at is not None and (name not in wrong or at < wrong[name][0]):
                        wrong[name] = (at, job.pair)

    def take() -> Job | None:
        """Return the next job that could find an earlier difference in its tensor."""
        with lock:
            for job in () if stopped.is_set() else jobs:
                first, _ = wrong.get(job.pair.spec.name, (math.inf, None))
                if job.at < first:
                    return job
        return None

    def stop_others_on_error() -> None:
        try:
            work()
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for done in as_completed([pool.submit(stop_others_on_error) for _ in range(_THREADS)]):
                done.result()
        finally:
            stopped.set()  # otherwise the pool waits until the other threads have read everything
    return [pair.difference(at) for at, pair in wrong.values()]


@dataclass(frozen=True)
class Files:
    """The most recently used files, kept open.

    Attributes:
        growing: A file that is being written, which may change while it is read.
        opened: The open files.
    """

    growing: Path | None = None
    opened: dict[Shard, IO[bytes]] = field(default_factory=dict)

    def read(self, shard: Shard, at: int, length: int) -> bytes:
        """Read a range of a file.

        Raises:
            CheckpointError: It cannot be read, or the file has changed.
        """
        file = self.of(shard)
        try:
            file.seek(at)
            data = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{shard.file}: {error.strerror or error}") from error
        if len(data) < length:
            raise CheckpointError(f"{shard.file}: was truncated while it was read")
        return data

    def of(self, shard: Shard) -> IO[bytes]:
        """Open a file, or return it if it is open already.

        Raises:
            CheckpointError: It cannot be opened, or has changed.
        """
        file = self.opened.pop(shard, None)
        try:
            file = file or shard.file.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{shard.file}: {error.strerror or error}") from error
        self.opened[shard] = file  # now the most recent
        if len(self.opened) > _MAX_OPEN:
            self.opened.pop(next(iter(self.opened))).close()
        if shard.file != self.growing:
            shard.check_unchanged(file.fileno())
        return file

    def close(self) -> None:
        """Close all files."""
        for file in self.opened.values():
            with suppress(OSError):
                file.close()


def first_difference(job: Job, files: Files) -> int | None:
    """Return the offset in the tensor of the first wrong byte of a job, or None."""
    found, spec, piece = job.pair.found, job.pair.spec, job.piece
    for start, stop in _ranges_to_read(job, files):
        for done in range(start, stop, _BLOCK):
            at, length = job.at + done, min(stop - done, _BLOCK)
            block = files.read(found.shard, found.start + at, length)
            if spec.scale == 0:
                wrong = _first_nonzero(block, found, spec.zero)
            elif isinstance(piece, Fill):
                wrong = _first_unequal(block, piece.data * (length // len(piece.data)))
            elif isinstance(piece, ByteRange):
                other = files.read(spec.tensor.shard, piece.start + done, length)
                wrong = _first_unequal(block, other)
            else:
                wrong = _first_unequal(block, _computed(spec, at, length, files))
            if wrong is not None:
                return at + wrong
    return None


def _ranges_to_read(job: Job, files: Files) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a job that must be read.

    Holes of a tensor that must be zero, and blocks shared with the source, need not be read. The
    kernel must write a file to disk before it tells which of its blocks are shared.
    """
    found, spec, piece = job.pair.found, job.pair.spec, job.piece
    start, descriptor = found.start + job.at, files.of(found.shard).fileno()
    if spec.scale == 0 and not spec.zero:
        done = 0
        while done < job.length:
            # The next data may start within an element.
            done = max(done, next_data(descriptor, start + done) - start) // _BLOCK * _BLOCK
            yield done, min(done + _BLOCK, job.length)
            done += _BLOCK
    elif isinstance(piece, ByteRange) and job.length > _BLOCK and files.growing is None:
        source = files.of(spec.tensor.shard).fileno()
        for at, length in shared_blocks.unshared(
            descriptor, start, source, piece.start, job.length
        ):
            yield at, at + length
    else:
        yield 0, job.length


def _first_unequal(block: bytes, expected: bytes) -> int | None:
    """Return the first position at which two blocks differ, or None if they are equal."""
    if block == expected:
        return None
    pairs = enumerate(zip(block, expected, strict=True))
    return next(i for i, (one, other) in pairs if one != other)


def _first_nonzero(block: bytes, tensor: Tensor, zero: int) -> int | None:
    """Return the first position that is not zero, or None; a float may also be a negative zero."""
    if block.count(zero) == len(block):
        return None
    if zero or not _dtypes.is_float(tensor.dtype):
        return next(i for i, byte in enumerate(block) if byte != zero)
    # Little-endian: the sign is in the last byte of each element.
    size = tensor.width
    signs = block[size - 1 :: size]
    negative = signs.count(0x80)
    if signs.count(0) + negative == len(signs) and block.count(0) == len(block) - negative:
        return None
    return next(
        i
        for i, byte in enumerate(block)
        if byte and (byte != 0x80 or (i + 1) % size)  # noqa: PLR2004 - the sign bit
    )


def _computed(spec: TensorSpec, at: int, length: int, files: Files) -> bytes:
    """Compute the expected bytes of a range of a scaled or converted tensor."""
    tensor, width = spec.tensor, spec.nbytes // max(math.prod(spec.shape), 1)
    first, count = at // width, length // width

    def read(part: Tensor) -> bytes:
        return files.read(part.shard, part.start + first * part.width, count * part.width)

    other = None if spec.mean_with is None else read(spec.mean_with.tensor)
    return arithmetic.compute(read(tensor), spec.operation, other)
