"""Restore the log levels and progress bars of the libraries after a command."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from mergekit_interleave.checkpoint.hub import SHOW_BARS

_LOGGERS = ("", "accelerate", "huggingface_hub", "mergekit", "transformers")


@contextmanager
def restored_settings(*, bars: bool = False) -> Iterator[None]:
    """Restore the log levels and progress bars of the libraries when the block ends.

    Args:
        bars: Whether to show the progress of downloads within the block.
    """
    token = SHOW_BARS.set(bars)
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    enabled = _transformers_bars()
    try:
        yield
    finally:
        SHOW_BARS.reset(token)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if enabled and not _transformers_bars():
            with warnings.catch_warnings():  # huggingface_hub warns if a variable disables bars
                warnings.simplefilter("ignore")
                sys.modules["transformers.utils.logging"].enable_progress_bar()


def _transformers_bars() -> bool:
    """Return whether transformers shows progress bars, as it does by default."""
    module = sys.modules.get("transformers.utils.logging")
    return True if module is None else bool(module.is_progress_bar_enabled())
