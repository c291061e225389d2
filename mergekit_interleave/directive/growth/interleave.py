"""The growth lines `interleave: every 4` and `interleave: 8 layers`: new layers among the old."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_interleave.directive.growth.base import (
    Flag,
    Growth,
    Line,
    Named,
    Schema,
    not_empty,
    positive,
)
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import AUTO
from mergekit_interleave.errors import DirectiveError, LayoutError

if TYPE_CHECKING:
    from mergekit_interleave.directive.growth.explained import Pattern, Summary

KEY = "interleave"


@dataclass(frozen=True)
class Every(Growth):
    """A new layer after every nth layer; an incomplete group at the end gets none."""

    n: int
    default_zero = AUTO

    def ranges(self, depth: int, model: ModelRef) -> Iterator[tuple[int, int]]:
        """Return the model with a copy after every nth layer."""
        del model
        return _with_copies(range(self.n - 1, depth, self.n), depth)

    def to_document(self, called: Callable[[ModelRef], object]) -> dict[str, object]:
        """Return `every n` under the key."""
        del called
        return {KEY: f"every {self.n}"}

    def sentence(self, made: Summary) -> str:
        """Describe where the new layers are."""
        teens = self.n % 100 in (11, 12, 13)
        suffix = "th" if teens else {1: "st", 2: "nd", 3: "rd"}.get(self.n % 10, "th")
        layer = "each" if self.n == 1 else f"every {self.n}{suffix}"
        return f"{made.new_layers}, one after {layer} of {made.depth}: {made.kind}"

    def why_unchanged(self, depth: int) -> str:
        """Return the error message for a group that is larger than the model."""
        return f"{KEY}: every {self.n}: the model has only {depth} layers, so none is added"


@dataclass(frozen=True)
class Spread(Growth):
    """A number of new layers, evenly spread: new layer j of k follows layer floor(j*L/k) - 1."""

    count: int
    default_zero = AUTO

    def ranges(self, depth: int, model: ModelRef) -> Iterator[tuple[int, int]]:
        """Return the model with evenly spread copies."""
        del model
        count = self.count
        if count > depth:
            raise LayoutError(
                f"{KEY}: {count} layers: the model has only {depth} layers to copy",
                hint=f"add at most {depth}: `{KEY}: {depth} layers`",
            )
        return _with_copies((j * depth // count - 1 for j in range(1, count + 1)), depth)

    def to_document(self, called: Callable[[ModelRef], object]) -> dict[str, object]:
        """Return `k layers` under the key."""
        del called
        return {KEY: f"{self.count} layers"}

    def sentence(self, made: Summary) -> str:
        """Describe how many new layers there are."""
        return f"{made.new_layers}, evenly spread among {made.depth}: {made.kind}"


def _with_copies(indices: Iterable[int], depth: int) -> Iterator[tuple[int, int]]:
    """Yield the whole model, with a copy of each given layer right after that layer."""
    start = 0
    for index in indices:
        yield start, index + 1
        yield index, index + 1
        start = index + 1
    yield from not_empty(start, depth)


def _read(value: object, where: str, named: Named) -> Growth:
    del named
    match value.split() if isinstance(value, str) else None:
        case ["every", n] | ["every", n, "layers" | "layer"]:
            return Every(positive(re.sub(r"(?<=\d)(st|nd|rd|th)$", "", n), f"{where}: every {n}"))
        case [count, "layers" | "layer"]:
            return Spread(positive(count, f"{where}: {count} layers"))
    raise DirectiveError(
        f"{where}: expected `every N` or `K layers`, found {value!r:.200}",
        hint="write `interleave: every 4` for a new layer after every 4th, or "
        "`interleave: 8 layers` for 8 new layers",
    )


def _propose(pattern: Pattern) -> Iterator[Growth]:
    if pattern.added > 0:
        yield Every(pattern.written[0][1])
        yield Spread(pattern.added)


def _schema() -> Schema:
    return {
        "description": "`every 4`: a new copy after every 4th layer; `8 layers`: 8 new layers, "
        "evenly spread. The new layers are zeroed unless `zero` is set.",
        "type": "string",
        "pattern": r"^\s*(every\s+[1-9]\d*(st|nd|rd|th)?(\s+layers?)?|[1-9]\d*\s+layers?)\s*$",
        "examples": ["every 4", "8 layers"],
    }


LINE = Line(
    KEY,
    _read,
    _schema,
    flags=(
        Flag(
            "every",
            "N",
            "Insert a new, zeroed layer after every Nth layer.",
            lambda text, where: Every(positive(text, where)),
            in_yaml="interleave: every N",
        ),
        Flag(
            "add",
            "K",
            "Insert K new, zeroed layers, evenly spread.",
            lambda text, where: Spread(positive(text, where)),
            in_yaml="interleave: K layers",
        ),
    ),
    propose=_propose,
)
