"""The growth line `append: 4`: new copies of the last layer at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING

from mergekit_interleave.directive.growth.base import (
    COUNT,
    Flag,
    Growth,
    Line,
    Named,
    Schema,
    positive,
)
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import AUTO

if TYPE_CHECKING:
    from mergekit_interleave.directive.growth.explained import Pattern, Summary

KEY = "append"


@dataclass(frozen=True)
class Append(Growth):
    """A number of new copies of the last layer at the end."""

    count: int
    default_zero = AUTO

    def ranges(self, depth: int, model: ModelRef) -> Iterator[tuple[int, int]]:
        """Return the whole model, then its last layer `count` times."""
        del model
        return chain([(0, depth)], repeat((depth - 1, depth), self.count))

    def to_document(self, called: Callable[[ModelRef], object]) -> dict[str, object]:
        """Return the number of copies under the key."""
        del called
        return {KEY: self.count}

    def sentence(self, made: Summary) -> str:
        """Describe how many copies of the last layer there are."""
        copies = "1 copy" if self.count == 1 else f"{self.count} copies"
        appended = "appended " if self.count == 1 else ""
        return f"{copies} of the last of {made.depth} layers{made.edited}: {appended}{made.kind}"


def _read(value: object, where: str, named: Named) -> Growth:
    del named
    return Append(positive(value, where))


def _propose(pattern: Pattern) -> Iterator[Growth]:
    if pattern.added > 0:
        yield Append(pattern.added)


def _schema() -> Schema:
    return {**COUNT, "description": "The number of zeroed copies of the last layer to append."}


LINE = Line(
    KEY,
    _read,
    _schema,
    flags=(Flag("append", "K", "Append K zeroed copies of the last layer."),),
    propose=_propose,
)
