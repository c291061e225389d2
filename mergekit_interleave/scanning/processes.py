"""Measure shards in processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

from mergekit_interleave.scanning.distribution import (
    LOSSES,
    Job,
    Outcomes,
    Scored,
    Shard,
    Worker,
    lost,
)

_worker: list[Worker] = []
"""The worker of this process."""


@dataclass(frozen=True)
class Processes:
    """Measures shards in processes of this machine, which share its threads.

    Attributes:
        count: The number of processes.
    """

    count: int

    def run(self, shards: Sequence[Shard], job: Job) -> Outcomes:
        """Measure shards; see `Way`.

        A process that dies ends its pool. A new pool measures the shards that are left.
        """
        missing = dict(enumerate(shards))
        losses = 0
        while missing:
            broken: BrokenProcessPool | None = None
            for number, found in _pooled(self.count, missing, job):
                if isinstance(found, BrokenProcessPool):
                    broken = found
                else:
                    yield missing.pop(number), found
                    losses = 0
            losses += 1
            if broken and losses == LOSSES:
                raise lost(
                    broken,
                    "use a smaller --workers, which needs less memory; a script that calls `scan` "
                    'needs `if __name__ == "__main__":`',
                ) from broken


def _pooled(
    count: int, shards: dict[int, Shard], job: Job
) -> Iterator[tuple[int, Scored | BrokenProcessPool]]:
    """Measure shards in a pool of processes, which ends with this iterator."""
    import torch  # noqa: PLC0415 - takes seconds to import

    threads = max(1, torch.get_num_threads() // count)
    context = get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(
        min(count, len(shards)), context, initializer=_begin, initargs=(reader, job, threads)
    )
    try:
        futures = {_submitted(pool, shard): number for number, shard in shards.items()}
        for future in as_completed(futures):
            try:
                found: Scored | BrokenProcessPool = future.result()
            except BrokenProcessPool as error:
                found = error
            yield futures[future], found
    finally:
        writer.close()
        pool.shutdown(cancel_futures=True)
        reader.close()


def _submitted(pool: ProcessPoolExecutor, shard: Shard) -> Future[Scored]:
    """Submit a shard; if the pool is broken, the future says so."""
    try:
        with _without_interrupts():
            return pool.submit(_score, shard)
    except BrokenProcessPool as error:
        future: Future[Scored] = Future()
        future.set_exception(error)
        return future


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach; this process ends them.

    A process that is started inherits which signals are blocked.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(lifeline: Connection, job: Job, threads: int) -> None:
    """Prepare a process, which ends as soon as its parent closes the lifeline or is gone."""
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.append(Worker(job, threads))


def _end_with(lifeline: Connection) -> None:
    with suppress(OSError):  # Windows says so that the other end is gone
        lifeline.poll(None)
    os._exit(1)


def _score(shard: Shard) -> Scored:
    return _worker[0].score(shard)
