"""Run a check while something else is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from mergekit_interleave.engines.protocol import Bar


@contextmanager
def checking(check: Callable[[], None]) -> Iterator[Future[None]]:
    """Run a check in another thread during a block, which must take its result.

    Args:
        check: The function to run; it must not write anything that the block uses.
    """
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(check)


def stopped_by(check: Future[None], bar: Bar) -> Bar:
    """Return a progress bar whose steps raise the error of a check as soon as it has failed."""

    @contextmanager
    def checked(nbytes: int) -> Iterator[Callable[[int], None]]:
        with bar(nbytes) as tick:

            def step(done: int) -> None:
                if check.done():
                    check.result()
                tick(done)

            yield step

    return checked
