"""`append: 4`: new copies of the last layer at the end."""

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
        """The whole model, then its last layer `count` times."""
        del model
        return chain([(0, depth)], repeat((depth - 1, depth), self.count))

    def to_document(self, called: Callable[[ModelRef], object]) -> dict[str, object]:
        """The number of copies."""
        del called
        return {KEY: self.count}

    def sentence(self, made: Summary) -> str:
        """How many copies of the last layer there are."""
        if self.count == 1:
            return f"the last of {made.depth} layers again{made.edited}: appended {made.kind}"
        return f"the last of {made.depth} layers {self.count} more times{made.edited}: {made.kind}"


def _read(value: object, where: str, named: Named) -> Growth:
    del named
    return Append(positive(value, where))


def _propose(pattern: Pattern) -> Iterator[Growth]:
    if pattern.added > 0:
        yield Append(pattern.added)


def _schema() -> Schema:
    return {**COUNT, "description": "Copies of the last layer at the end, zeroed."}


LINE = Line(
    KEY,
    _read,
    _schema,
    flags=(Flag("append", "K", "Append K zeroed copies of the last layer."),),
    propose=_propose,
)
