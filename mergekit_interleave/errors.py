"""One exception family: every error says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

Warn: TypeAlias = Callable[[str], object]
"""Takes a warning: one sentence about what to beware of."""


class InterleaveError(Exception):
    """Anything this project refuses to do, as a sentence for the person who asked.

    Args:
        message: What is wrong, naming the key, tensor or path.
        hint: What to do about it, where there is a remedy.

    Attributes:
        warnings: What was noticed before the error, one sentence each.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.warnings: tuple[str, ...] = ()


class DirectiveError(InterleaveError):
    """The command or directive is wrong whatever the model is."""

    exit_code = 2


class LayoutError(InterleaveError):
    """The directive does not fit this model."""


class CheckpointError(InterleaveError):
    """A model directory or Hub repository cannot be used."""


class UnreachableError(CheckpointError):
    """The Hub was not reached."""


class RefusedError(InterleaveError):
    """The result would not be exact, so it is not made."""


class UnrepresentableError(RefusedError):
    """config.json cannot represent a layout, though it can represent others of the same model."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"config.json cannot represent this layout: {reason}")


class OutputError(InterleaveError):
    """The place to write to cannot be written."""


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect warnings in a list. An error that is raised meanwhile keeps those found before it."""
    found: list[str] = []
    try:
        yield found
    except InterleaveError as error:
        error.warnings = tuple(dict.fromkeys((*found, *error.warnings)))
        raise


def check_keys(keys: Iterable[object], known: Collection[str], where: str = "") -> None:
    """Check that a mapping has no other keys than the known ones.

    Raises:
        DirectiveError: It has, and the nearest known key is the hint.
    """
    for key in keys:
        if key not in known:
            close = nearest(str(key), known)
            raise DirectiveError(
                f"{where + ': ' if where else ''}unknown key {str(key)!r}",
                hint=f"did you mean `{close}`?" if close else f"known keys: {', '.join(known)}",
            )


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` most likely stands for, if any comes close."""
    import difflib  # noqa: PLC0415 - only a wrong key needs it

    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
