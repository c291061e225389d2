"""Measure shards in processes of this machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

from mergekit_interleave.scanning.distribution import (
    LOSSES,
    Job,
    Outcomes,
    Scored,
    Scorer,
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

    @contextmanager
    def started(self, job: Job) -> Iterator[Scorer]:
        """Measure shards; see `Way`.

        A process that dies ends its pool. A new pool measures the shards that are left.
        """
        pool = _Pool(self.count, job)
        try:
            yield pool.score
        finally:
            pool.end()


class _Pool:
    """Processes, which are all replaced if one of them dies."""

    def __init__(self, count: int, job: Job) -> None:
        import torch  # noqa: PLC0415 - takes seconds to import

        threads = max(1, torch.get_num_threads() // count)
        self._count, self._begin_with = count, (job, threads)
        self._stack = ExitStack()
        self._executor: ProcessPoolExecutor | None = None

    def score(self, shards: Sequence[Shard]) -> Outcomes:
        """Measure shards.

        Raises:
            InterleaveError: One cannot be measured, or the processes die again and again.
        """
        missing, losses = dict(enumerate(shards)), 0
        while missing:
            broken: BrokenProcessPool | None = None
            futures = {self._submitted(shard): number for number, shard in missing.items()}
            for future in as_completed(futures):
                number = futures[future]
                try:
                    found = future.result()
                except BrokenProcessPool as error:
                    broken = error
                else:
                    yield missing.pop(number), found
                    losses = 0
            if broken is not None:
                losses += 1
                self.end()
                if losses == LOSSES:
                    raise lost(
                        broken,
                        "use a smaller --workers, which needs less memory; a script that calls "
                        '`scan` needs `if __name__ == "__main__":`',
                    ) from broken

    def end(self) -> None:
        """End the processes; the next shard starts others."""
        self._executor = None
        self._stack.close()

    def _open(self) -> ProcessPoolExecutor:
        context = get_context("spawn")
        reader, writer = context.Pipe(duplex=False)
        executor = ProcessPoolExecutor(
            self._count, context, initializer=_begin, initargs=(reader, *self._begin_with)
        )
        self._stack.callback(reader.close)
        self._stack.callback(executor.shutdown, cancel_futures=True)
        self._stack.callback(writer.close)  # the first of these: it ends the processes
        return executor

    def _submitted(self, shard: Shard) -> Future[Scored]:
        """Submit a shard; if the pool is broken, the future says so."""
        self._executor = self._executor or self._open()
        try:
            with _without_interrupts():
                return self._executor.submit(_score, shard)
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
