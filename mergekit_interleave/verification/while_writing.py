"""Compare tensors while they are written, right after each piece of them.

Both sides of a piece then lie in the page cache. Later, a model that is larger than the cache would
have to be read from the disk, and its sources once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mergekit_interleave.checkpoint.safetensors_header import read_file
from mergekit_interleave.errors import CheckpointError
from mergekit_interleave.planning.tensor_plan import TensorSpec
from mergekit_interleave.verification.stored_bytes import (
    Files,
    Job,
    Pair,
    first_difference,
    jobs_of,
)


class RunningComparison:
    """Compares the tensors of files that grow in order.

    Args:
        specs: The expected tensors.
        unread: Returns the reason why a tensor is not compared, or None if it is compared.

    Attributes:
        equal: The names of the tensors that were found equal to the expected ones, byte for byte.
            All others must still be compared.
    """

    def __init__(
        self, specs: Sequence[TensorSpec], unread: Callable[[TensorSpec], str | None]
    ) -> None:
        self.equal: set[str] = set()
        self._specs = {spec.name: spec for spec in specs if unread(spec) is None}
        self._files: dict[Path, _GrowingFile] = {}

    def written(self, file: Path, end: int) -> None:
        """Compare the tensors of a file up to an offset; for each file, call it from one thread.

        Args:
            file: A safetensors file.
            end: The number of bytes that are in place.
        """
        # What cannot be read now is compared later, which then reports the error.
        with suppress(CheckpointError):
            if file not in self._files:
                self._files[file] = _GrowingFile(file, self._specs)
            self.equal.update(self._files[file].equal_up_to(end))

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()


class _GrowingFile:
    """A file that is compared from its start to its end."""

    def __init__(self, file: Path, specs: Mapping[str, TensorSpec]) -> None:
        tensors = read_file(file)
        pairs = [
            Pair(tensor, specs[name], "")
            for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start)
            if name in specs
            and tensor.shape == specs[name].shape
            and tensor.dtype == specs[name].dtype
        ]
        self._jobs = jobs_of(pairs)
        self._next: Job | None = next(self._jobs, None)
        self._wrong: set[str] = set()
        self._files = Files(growing=file)

    def equal_up_to(self, end: int) -> Iterator[str]:
        """Yield the names of the tensors that end before an offset and are equal."""
        while self._next is not None and self._next.stop <= end:
            job, self._next = self._next, next(self._jobs, None)
            name = job.pair.spec.name
            if name not in self._wrong and first_difference(job, self._files) is not None:
                self._wrong.add(name)
            if job.is_last and name not in self._wrong:
                yield name
        if self._next is None:
            self.close()

    def close(self) -> None:
        self._files.close()
