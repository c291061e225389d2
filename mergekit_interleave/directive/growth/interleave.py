"""The growth line `interleave`: new layers among the old.

Its forms are `every 4`, `8 layers` and `after [3, 9, 14]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mergekit_interleave.directive.growth.base import (
    Flag,
    Growth,
    Line,
    Named,
    Schema,
    index,
    not_empty,
    positive,
)
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import AUTO
from mergekit_interleave.errors import DirectiveError, LayoutError

if TYPE_CHECKING:
    from mergekit_interleave.directive.growth.explained import Pattern, Summary

KEY = "interleave"

_MOST_NAMED = 8
"""The maximum number of layers that a sentence lists."""


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


@dataclass(frozen=True)
class After(Growth):
    """A new layer directly after each of some layers, whose indices ascend without repeats."""

    layers: tuple[int, ...]
    default_zero = AUTO

    def ranges(self, depth: int, model: ModelRef) -> Iterator[tuple[int, int]]:
        """Return the model with a copy after each of the layers."""
        last = self.layers[-1]
        if last >= depth:
            raise LayoutError(
                f"{KEY}: after {last}: {model} has only {depth} layers",
                hint=f"indices start at 0: the last layer is {depth - 1}",
            )
        return _with_copies(self.layers, depth)

    def to_document(self, called: Callable[[ModelRef], object]) -> dict[str, object]:
        """Return `after [i, ...]` under the key."""
        del called
        return {KEY: f"after {list(self.layers)}"}

    def sentence(self, made: Summary) -> str:
        """Describe where the new layers are."""
        *others, last = self.layers
        if len(self.layers) > _MOST_NAMED:
            places = f"{len(self.layers)} of {made.depth} layers"
        elif others:
            places = f"layers {', '.join(map(str, others))} and {last} of {made.depth}"
        else:
            places = f"layer {last} of {made.depth}"
        return f"{made.new_layers}, after {places}: {made.kind}"


def _with_copies(indices: Iterable[int], depth: int) -> Iterator[tuple[int, int]]:
    """Yield the whole model, with a copy of each given layer right after that layer."""
    start = 0
    for layer in indices:
        yield start, layer + 1
        yield layer, layer + 1
        start = layer + 1
    yield from not_empty(start, depth)


def _read(value: object, where: str, named: Named) -> Growth:
    del named
    match value.split() if isinstance(value, str) else None:
        case ["every", n] | ["every", n, "layers" | "layer"]:
            return Every(positive(re.sub(r"(?<=\d)(st|nd|rd|th)$", "", n), f"{where}: every {n}"))
        case [count, "layers" | "layer"]:
            return Spread(positive(count, f"{where}: {count} layers"))
        case ["after", *layers] if layers:
            return _read_after(" ".join(layers), f"{where}: after")
    raise DirectiveError(
        f"{where}: expected `every N`, `K layers` or `after [LAYER, ...]`, found {value!r:.200}",
        hint="write `interleave: every 4` for a new layer after every 4th, `interleave: 8 layers` "
        "for 8 new layers, or `interleave: after [3, 9]` for one after each of these",
    )


def _read_after(text: str, where: str) -> Growth:
    """Read the indices of layers, in any order: `[3, 9, 14]`, or `3,9,14`."""
    bracketed = re.fullmatch(r"\s*\[(.*)\]\s*", text)
    parts = (bracketed[1] if bracketed else text).split(",")
    layers = sorted(index(part.strip(), where) for part in parts)
    repeated = next((a for a, b in pairwise(layers) if a == b), None)
    if repeated is not None:
        raise DirectiveError(
            f"{where}: layer {repeated} is given twice",
            hint=f"give it once; `repeat: {repeated}:{repeated + 1}x3` adds two copies of it",
        )
    return After(tuple(layers))


def _propose(pattern: Pattern) -> Iterator[Growth]:
    if pattern.added > 0:
        yield Every(pattern.written[0][1])
        yield Spread(pattern.added)
        sources = (layer for bounds in pattern.written for layer in range(*bounds))
        doubled = {a for a, b in pairwise(sources) if a == b}
        if len(doubled) == pattern.added:
            yield After(tuple(sorted(doubled)))


_INDICES = r"\s*\d+\s*(,\s*\d+\s*)*"


def _schema() -> Schema:
    return {
        "description": "`every 4`: a new copy after every 4th layer; `8 layers`: 8 new layers, "
        "evenly spread; `after [3, 9, 14]`: one after each of these layers. The new layers are "
        "zeroed unless `zero` is set.",
        "type": "string",
        "pattern": r"^\s*(every\s+[1-9]\d*(st|nd|rd|th)?(\s+layers?)?|[1-9]\d*\s+layers?|"
        rf"after\s+({_INDICES}|\[{_INDICES}\]))\s*$",
        "examples": ["every 4", "8 layers", "after [3, 9, 14]"],
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
        Flag(
            "after",
            "LAYER,...",
            "Insert a new, zeroed layer after each of these layers, such as 3,9,14.",
            _read_after,
            in_yaml="interleave: after [LAYER, ...]",
            repeatable=True,
        ),
    ),
    propose=_propose,
)
