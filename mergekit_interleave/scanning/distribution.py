"""Divide a scan into shards, and measure them: here, in processes, or on machines.

A shard is measured by one worker, which has loaded the base. Its scores do not depend on the other
shards, so every way gives the same scores if each worker computes with as many threads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from mergekit_interleave.checkpoint.meta_model import memory_errors
from mergekit_interleave.errors import RefusedError, Warn
from mergekit_interleave.scanning.batches import Batch
from mergekit_interleave.scanning.measure import Measure
from mergekit_interleave.scanning.results import Floats

Outcomes: TypeAlias = "Generator[tuple[Shard, Scored], None, None]"
"""Shards that were measured, and what each gave."""

LOSSES = 3
"""How often workers may end by themselves before another shard is measured."""


@dataclass(frozen=True)
class Shard:
    """Layouts to measure on a batch of sequences.

    Attributes:
        rows: The rows of the results, of which the base has the first.
        layouts: The directives of the layouts; none for the base.
        batch: The sequences.
    """

    rows: tuple[int, ...]
    layouts: tuple[str, ...]
    batch: Batch


Scorer: TypeAlias = "Callable[[Sequence[Shard]], Outcomes]"
"""Measures shards, in any order.

Raises:
    InterleaveError: One cannot be measured, or the workers end by themselves.
"""


class Job(Protocol):
    """What a worker needs to begin. It can be pickled."""

    def start(self, warn: Warn) -> Measure:
        """Load the base, and find out how its layouts can be measured."""


@dataclass(frozen=True)
class Scored:
    """A shard that was measured.

    Attributes:
        scores: The scores, of shape (rows, sequences).
        warnings: New warnings of the worker.
    """

    scores: Floats
    warnings: tuple[str, ...]


@dataclass
class Worker:
    """Measures shards, one after another. The first one loads the base.

    Attributes:
        job: The job.
        threads: The number of threads to compute with; None leaves it as it is.
    """

    job: Job
    threads: int | None = None
    _measure: Measure | None = None
    _warnings: list[str] = field(default_factory=list)

    def score(self, shard: Shard) -> Scored:
        """Measure a shard.

        Raises:
            InterleaveError: It cannot be measured.
        """
        with memory_errors():
            measure = self._measure = self._measure or self._started()
            if shard.layouts:
                scores = measure.scores(shard.layouts, shard.batch)
            else:
                scores = measure.base_scores(shard.batch)
        warnings = tuple(self._warnings)
        self._warnings.clear()
        return Scored(scores, warnings)

    def _started(self) -> Measure:
        if self.threads is not None:
            import torch  # noqa: PLC0415 - takes seconds to import

            torch.set_num_threads(self.threads)
        return self.job.start(self._warnings.append)


class Way(Protocol):
    """A way to measure shards."""

    def started(self, job: Job) -> AbstractContextManager[Scorer]:
        """Return a context in which workers measure shards; they start with the first shard.

        They measure the shards of all calls one after another, and end with the context.
        """


@dataclass(frozen=True)
class Here:
    """Measures all shards in this process."""

    @contextmanager
    def started(self, job: Job) -> Iterator[Scorer]:
        """Measure shards in their order; see `Way`."""
        worker = Worker(job)
        yield lambda shards: ((shard, worker.score(shard)) for shard in shards)


def lost(reason: object, hint: str) -> RefusedError:
    """Return the error that says that workers end by themselves."""
    text = " ".join(str(reason).split())
    return RefusedError(f"the workers ended {LOSSES} times without a score: {text:.300}", hint=hint)
