"""Define the exceptions of this project.

A message says what is wrong and where; a hint says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

Warn: TypeAlias = Callable[[str], object]
"""A function that receives a warning of one sentence."""


class InterleaveError(Exception):
    """Base class of all errors of this project; the message is one sentence for the user.

    Args:
        message: What is wrong, naming the key, tensor or path.
        hint: A remedy, if there is one.

    Attributes:
        warnings: The warnings that were collected before the error, one sentence each.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.warnings: tuple[str, ...] = ()


class DirectiveError(InterleaveError):
    """The command or directive is invalid for every model."""

    exit_code = 2


class LayoutError(InterleaveError):
    """The directive does not fit this model."""


class CheckpointError(InterleaveError):
    """A model directory or Hub repository cannot be used."""


class UnreachableError(CheckpointError):
    """The Hub cannot be reached."""


class RefusedError(InterleaveError):
    """The request is refused, because its result would not be exact."""


class OutOfMemoryError(RefusedError):
    """The memory of this machine is exhausted."""


class UnrepresentableError(RefusedError):
    """config.json cannot represent this layout, but can represent others of the same model."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"config.json cannot represent this layout: {reason}")


class OutputError(InterleaveError):
    """The output cannot be written."""


class RequirementError(InterleaveError):
    """A required package is not installed, or has a release that this project does not support."""


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect warnings in a list; an error raised in the block carries the earlier warnings."""
    collected: list[str] = []
    try:
        yield collected
    except InterleaveError as error:
        error.warnings = tuple(dict.fromkeys((*collected, *error.warnings)))
        raise


def check_keys(keys: Iterable[object], known: Collection[str], where: str = "") -> None:
    """Check that a mapping has only known keys.

    Raises:
        DirectiveError: A key is unknown; the hint names the nearest known key.
    """
    for key in keys:
        if key not in known:
            close = nearest(str(key), known)
            raise DirectiveError(
                f"{where + ': ' if where else ''}unknown key {str(key)!r}",
                hint=f"did you mean `{close}`?" if close else f"known keys: {', '.join(known)}",
            )


def nearest(word: str, known: Iterable[str], similarity: float = 0.6) -> str | None:
    """Return the known word that is most similar to `word`, or None if none is similar enough."""
    import difflib  # noqa: PLC0415 - needed only for an unknown word

    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=similarity)
    return matches[0] if matches else None
