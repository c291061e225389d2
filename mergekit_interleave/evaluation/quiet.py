"""Keep lm-eval and its libraries from writing to the terminal."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from io import StringIO
from types import ModuleType
from typing import Any

_LOGGERS = ("lm_eval", "datasets", "evaluate", "fsspec", "filelock")

_WITH_BARS = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")
"""Modules that show bars, of which no option hides all."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hide bars, warnings and what is printed within the block; errors of the loggers remain."""
    import datasets  # noqa: PLC0415 - takes seconds to import
    from tqdm import tqdm  # noqa: PLC0415

    def hidden(*args: Any, **options: Any) -> Any:
        return tqdm(*args, **{**options, "disable": True})

    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    were_hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            for name in _WITH_BARS:
                stack.enter_context(_replaced(import_module(name), "tqdm", hidden))
            stack.enter_context(redirect_stdout(StringIO()))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if not were_hidden:
            datasets.enable_progress_bars()


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Replace a name of a module within the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
