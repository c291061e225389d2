"""The growth line `drop: [23, 28]`: the model without some of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mergekit_interleave.directive.growth.base import (
    Flag,
    Growth,
    Line,
    Named,
    Schema,
    any_of,
    not_empty,
    ref,
)
from mergekit_interleave.directive.layer_range import Range, is_range, parse_range, resolve
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import LayoutError

if TYPE_CHECKING:
    from mergekit_interleave.directive.growth.explained import Pattern

KEY = "drop"


@dataclass(frozen=True)
class Drop(Growth):
    """The model without the layers of some ranges, which may overlap."""

    dropped: tuple[Range, ...]

    def ranges(self, depth: int, model: ModelRef) -> Iterator[tuple[int, int]]:
        """Return the ranges of layers that are not dropped."""
        dropped = sorted(resolve(part, depth, model) for part in self.dropped)
        position = 0
        kept_ranges: list[tuple[int, int]] = []
        for start, stop in [*dropped, (depth, depth)]:
            kept_ranges += not_empty(position, start)
            position = max(position, stop)
        if not kept_ranges:
            raise LayoutError(f"{KEY}: no layer would be left")
        return iter(kept_ranges)

    def to_document(self, called: Callable[[ModelRef], object]) -> dict[str, object]:
        """Return the range, or the list of several ranges, under the key."""
        del called
        ranges: list[object] = [list(part) for part in self.dropped]
        return {KEY: ranges[0] if len(ranges) == 1 else ranges}


def _read(value: object, where: str, named: Named) -> Growth:
    del named
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, list) and value and all(map(is_range, value)):
        return Drop(tuple(parse_range(part, f"{where}[{i}]") for i, part in enumerate(value)))
    return Drop((parse_range(value, where),))


def _propose(pattern: Pattern) -> Iterator[Growth]:
    ends = [(0, 0), *pattern.joined, (pattern.depth, pattern.depth)]
    gaps = [(a[1], b[0]) for a, b in pairwise(ends) if a[1] != b[0]]
    if gaps and all(start < stop for start, stop in gaps):
        yield Drop(tuple(gaps))


def _schema() -> Schema:
    return {
        "description": "Leave out the layers of one or more ranges.",
        **any_of(ref("range"), {"type": "array", "items": ref("range"), "minItems": 1}),
        "examples": [[23, 28]],
    }


LINE = Line(
    KEY,
    _read,
    _schema,
    flags=(Flag("drop", "RANGE,...", "Leave out layers, such as 23:28.", repeatable=True),),
    propose=_propose,
)
