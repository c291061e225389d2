"""Compare tensors while they are written, soon after each piece of them.

Both sides of a piece then lie in the page cache. Later, a model that is larger than the cache would
have to be read from the disk, and its sources once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock

from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave.checkpoint.safetensors_header import read_file
from mergekit_interleave.errors import CheckpointError
from mergekit_interleave.planning.tensor_plan import ByteRange, TensorSpec
from mergekit_interleave.verification import mapped_bytes
from mergekit_interleave.verification.stored_bytes import (
    Files,
    Job,
    Pair,
    first_difference,
    has_form,
    jobs_of,
)

Reader = Callable[[Path], Mapping[str, Tensor]]
"""Reads the header of a file, and returns its tensors."""


class RunningComparison:
    """Compares the tensors of files that grow in order, in threads of its own.

    The threads that write never wait for it: while they wait for the disk, it uses the processor.

    Args:
        specs: The expected tensors.
        unread: Returns the reason why a tensor is not compared, or None if it is compared.
        read: Reads the header of a file.

    Attributes:
        equal: The names of the tensors that were found equal to the expected ones, byte for byte.
            All others must still be compared. It is complete after `close`.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        unread: Callable[[TensorSpec], str | None] = lambda _: None,
        read: Reader = read_file,
    ) -> None:
        self.equal: set[str] = set()
        self._read = read
        self._specs = {spec.name: spec for spec in specs if unread(spec) is None}
        self._files: dict[Path, _GrowingFile] = {}
        self._pool = ThreadPoolExecutor(_THREADS)

    def written(self, file: Path, end: int) -> None:
        """Compare the tensors of a file up to an offset, later; for each file, call it in order.

        Args:
            file: A safetensors file.
            end: The number of bytes that are in place.
        """
        if file not in self._files:
            self._files[file] = _GrowingFile(file, self._specs, self.equal, self._read)
        growing = self._files[file]
        if growing.reaches(end):
            self._pool.submit(growing.compare)

    def close(self) -> None:
        """Wait for the comparisons to end, and close all files."""
        self._pool.shutdown()
        for file in self._files.values():
            file.close()


_THREADS = 2
"""The number of files that are compared at once, as many as are written at once."""

_WORTH_MAPPING = 2**20
"""The number of bytes from which mapping a range is faster than reading it."""


class _GrowingFile:
    """A file that is compared from its start to its end.

    Args:
        file: The file.
        specs: The expected tensors by name.
        equal: The set to which the names of equal tensors are added.
        read: Reads the header of the file.
    """

    def __init__(
        self, file: Path, specs: Mapping[str, TensorSpec], equal: set[str], read: Reader
    ) -> None:
        self._file, self._specs, self._equal, self._read = file, specs, equal, read
        self._files = Files(growing=file)
        self._end = 0
        self._lock = Lock()
        self._is_running = False
        self._wrong: set[str] = set()
        self._jobs: Iterator[Job] | None = None
        self._next: Job | None = None

    def reaches(self, end: int) -> bool:
        """Note how far the file is written; return whether `compare` must be called for it."""
        with self._lock:
            self._end = end
            is_idle, self._is_running = not self._is_running, True
            return is_idle

    def compare(self) -> None:
        """Compare what is written, until nothing is left to compare."""
        # What cannot be read now is compared later, which then reports the error.
        with suppress(CheckpointError):
            if self._jobs is None:
                self._jobs = self._found_jobs()
                self._next = next(self._jobs, None)
            while (job := self._take()) is not None:
                self._compare(job)

    def _found_jobs(self) -> Iterator[Job]:
        tensors = self._read(self._file)
        pairs = [
            Pair(tensor, self._specs[name], "")
            for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start)
            if name in self._specs and has_form(tensor, self._specs[name])
        ]
        return jobs_of(pairs)

    def _take(self) -> Job | None:
        """Return the next job if its bytes are in place; otherwise become idle."""
        with self._lock:
            if self._next is None or self._next.stop > self._end:
                self._is_running = False
                return None
            return self._next

    def _compare(self, job: Job) -> None:
        name = job.pair.spec.name
        if name not in self._wrong and not self._is_equal(job):
            self._wrong.add(name)
        if job.is_last and name not in self._wrong:
            self._equal.add(name)
        self._next = next(self._jobs or iter(()), None)

    def _is_equal(self, job: Job) -> bool:
        """Whether a range that was written has the expected bytes."""
        tensor, source, piece = job.pair.found, job.pair.spec.tensor, job.piece
        if (
            isinstance(piece, ByteRange)
            and job.pair.spec.scale != 0
            and job.length >= _WORTH_MAPPING
        ):
            found = self._files.of(tensor.shard).fileno(), tensor.start + job.at
            expected = self._files.of(source.shard).fileno(), piece.start
            is_equal = mapped_bytes.are_equal(*found, *expected, job.length)
            if is_equal is not None:
                return is_equal
        return first_difference(job, self._files) is None

    def close(self) -> None:
        """Close the file and its sources."""
        self._files.close()
