"""Show progress bars on a terminal, and nowhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


def progress_bar(
    what: str, unit: str, **options: Any
) -> Callable[[int], AbstractContextManager[Callable[[int], object]]]:
    """Return the argument `progress` of a command; it shows nothing if there is no terminal.

    Args:
        what: What is counted.
        unit: Its unit.
        options: Other options of tqdm.
    """

    @contextmanager
    def bar(total: int) -> Iterator[Callable[[int], object]]:
        if sys.stderr is None or not sys.stderr.isatty():
            yield lambda _: None
            return
        from tqdm import tqdm  # noqa: PLC0415 - rarely needed

        with tqdm(total=total, desc=what, unit=unit, leave=False, **options) as shown:
            yield shown.update

    return bar


def show_bars_on_terminals_only() -> None:
    """Disable the progress bars of the libraries if standard error is no terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        # Some progress bars of mergekit and the Hub client can be disabled only this way.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
