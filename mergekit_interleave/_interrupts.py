"""Run short steps without interruption, and remove scratch directories even after an interrupt.

Python can turn a signal into an exception between any two instructions of the main thread: for
example after a directory is created and before the `try` that removes it. Therefore a step runs in
a thread of its own, which Python never interrupts. No signal handler is replaced, so this also
works in a notebook and in any thread.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar, cast

T = TypeVar("T")


def uninterrupted(step: Callable[[], T], *, drop: bool = False) -> T:
    """Run a step completely or not at all, even if a signal arrives.

    Args:
        step: The function to run, in another thread.
        drop: Whether to ignore an exception that a signal handler raises while the step runs, such
            as KeyboardInterrupt. Otherwise it is raised again when the step has ended.

    Returns:
        The return value of the step.

    Raises:
        BaseException: The exception of the step, or the interrupt. When it is raised, the step has
            ended or will never start.
    """
    task = _Task(step)
    try:
        try:
            # Not threading.Thread: an interrupt during its start() can leave a lock held forever.
            _thread.start_new_thread(task.run, ())
        except RuntimeError:  # no more threads can be started
            task.run()
        task.wait()
    except BaseException:
        if task.end() and drop:
            return task.result()
        raise
    return task.result()


class _Task(Generic[T]):
    """A step that runs at most once.

    `wait` and `end` can be interrupted at any point and called again.
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
        """Wait for the step to end, or prevent it from starting; return whether it ran."""
        while True:
            try:
                if self._is_first("end"):
                    return False
                self.wait()
            except BaseException:  # noqa: BLE001, S112 - another interrupt changes nothing
                continue
            return True

    def _is_first(self, who: str) -> bool:
        """Return whether the first call came from `who`, that is, from `run` or from `end`."""
        return self._first.setdefault("who", who) == who  # setdefault is atomic

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return cast("T", self._value)


@contextmanager
def scratch_directory(prefix: str = "mk-interleave-") -> Iterator[Path]:
    """Create a directory that exists until the end of a block.

    Args:
        prefix: The beginning of the name of the directory.

    Yields:
        The empty directory.
    """
    import tempfile  # noqa: PLC0415 - not needed by `gen`

    created: list[tempfile.TemporaryDirectory[str]] = []

    def make() -> None:
        created.append(tempfile.TemporaryDirectory(prefix=prefix))

    def remove() -> None:
        for folder in created:
            folder.cleanup()

    try:
        try:
            uninterrupted(make)
            yield Path(created[0].name)
        finally:
            uninterrupted(remove)
    except BaseException:
        # Again, because an interrupt may have come just before the first call.
        uninterrupted(remove, drop=True)
        raise
