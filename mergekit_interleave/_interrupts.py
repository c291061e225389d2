"""Short steps that a signal must not cut in two, and scratch directories that never stay behind.

Python turns a signal into an exception between any two instructions of the main thread: after a
directory was made, say, and before the `try` that removes it. No signal handler is touched here,
so that all of it also works in a notebook and in any thread: a step runs in a thread of its own,
which Python never interrupts.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar, cast

T = TypeVar("T")


def uninterrupted(step: Callable[[], T], *, drop: bool = False) -> T:
    """Run a step as a whole, or not at all, whenever a signal arrives.

    Args:
        step: What to run. It runs in another thread.
        drop: Ignore an exception of a signal handler, such as KeyboardInterrupt, that comes while
            the step runs. Otherwise it is raised when the step is done.

    Returns:
        What the step returns.

    Raises:
        BaseException: What the step raised, or the interrupt. By then the step has ended, or it
            will never begin.
    """
    task = _Task(step)
    try:
        try:
            # Not threading.Thread, whose start() an interrupt can leave holding a lock for ever.
            _thread.start_new_thread(task.run, ())
        except RuntimeError:  # there can be no more threads
            task.run()
        task.wait()
    except BaseException:
        if task.end() and drop:
            return task.result()
        raise
    return task.result()


class _Task(Generic[T]):
    """A step that runs at most once.

    `wait` and `end` may be interrupted anywhere and called again.
    """

    def __init__(self, step: Callable[[], T]) -> None:
        self._step = step
        self._value: T | None = None
        self._error: BaseException | None = None
        self._first: dict[str, str] = {}
        self._ended = False
        self._wake = _thread.allocate_lock()
        self._wake.acquire()

    def run(self) -> None:
        if self._is_first("run"):
            try:
                self._value = self._step()
            except BaseException as error:  # noqa: BLE001 - `result` raises it again
                self._error = error
            self._ended = True
            self._wake.release()

    def wait(self) -> None:
        while not self._ended:
            self._wake.acquire()

    def end(self) -> bool:
        """Wait for the end of the step, or keep it from beginning; returns whether it ran."""
        while True:
            try:
                if self._is_first("end"):
                    return False
                self.wait()
            except BaseException:  # noqa: BLE001, S112 - one more interrupt changes nothing
                continue
            return True

    def _is_first(self, who: str) -> bool:
        return self._first.setdefault("who", who) == who  # one atomic call decides

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return cast("T", self._value)


@contextmanager
def scratch_directory(prefix: str = "mk-interleave-") -> Iterator[Path]:
    """A directory for the time of a block.

    Args:
        prefix: How its name begins.

    Yields:
        The directory, which is empty.
    """
    import tempfile  # noqa: PLC0415 - `gen` writes no file

    made: list[tempfile.TemporaryDirectory[str]] = []

    def make() -> None:
        made.append(tempfile.TemporaryDirectory(prefix=prefix))

    def remove() -> None:
        for folder in made:
            folder.cleanup()

    try:
        try:
            uninterrupted(make)
            yield Path(made[0].name)
        finally:
            uninterrupted(remove)
    except BaseException:
        # Again: an interrupt may have come just before the first call.
        uninterrupted(remove, drop=True)
        raise
