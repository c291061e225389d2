"""Join the layers of many layouts to a tree, so that a common beginning is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mergekit_interleave.layout.layout import Edit, Layout


class Step(NamedTuple):
    """A layer that a layout passes: a source layer, with an edit of its weights.

    Attributes:
        source: The index of the source layer.
        edit: What is zeroed or scaled; None if nothing is.
    """

    source: int
    edit: Edit | None = None


Path = tuple[Step, ...]

PERIOD = 12
"""A multiple of the periods of all patterns of layers that are in use, such as 2, 3, 4 and 6."""


def path_of(layout: Layout) -> Path:
    """Return the steps of a layout of one model."""
    return tuple(Step(layer.source, layer.edit or None) for layer in layout.layers)


@dataclass(eq=False)
class Node:
    """A step of one or more paths, after a common beginning.

    Attributes:
        step: The step.
        children: The steps that follow.
        ends: The numbers of the paths that end here.
    """

    step: Step
    children: dict[Step, Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)


def tree(paths: Mapping[int, Path]) -> dict[Step, Node]:
    """Join paths to a tree; return its first steps.

    Args:
        paths: The paths by number. None is empty.
    """
    first: dict[Step, Node] = {}
    for number, path in paths.items():
        level, node = first, None
        for step in path:
            node = level.setdefault(step, Node(step))
            level = node.children
        if node is None:
            raise ValueError("an empty path")
        node.ends.append(number)
    return first


def size(nodes: Mapping[Step, Node]) -> int:
    """Return the number of steps of a tree, which is the number of layers to compute."""
    waiting, total = list(nodes.values()), 0
    while waiting:
        node = waiting.pop()
        total += 1
        waiting += node.children.values()
    return total


def covering(paths: Mapping[int, Path]) -> list[int]:
    """Return the numbers of few paths that show each step as all the paths together do.

    What shows a step: it is the first of its kind in the path or a repeat, and how far it is moved,
    in layers modulo `PERIOD`; not to be moved at all is a case of its own. So a layer that computes
    with its index, in any pattern with a period that divides `PERIOD`, or with whether it was
    applied before, computes something else in at least one of the paths.
    """
    shown = {number: {*_shown(path)} for number, path in paths.items()}
    missing = set().union(*shown.values())
    found = []
    while missing:
        best = max(shown, key=lambda number: len(shown[number] & missing))
        found.append(best)
        missing -= shown[best]
    return sorted(found)


def _shown(path: Path) -> Iterator[tuple[Step, bool, int]]:
    passed: set[int] = set()
    for index, step in enumerate(path):
        moved = index - step.source
        yield step, step.source in passed, moved and 1 + moved % PERIOD
        passed.add(step.source)


def groups(count: int, most: int) -> Iterator[range]:
    """Yield ranges of at most `most` numbers below `count`, in order."""
    for start in range(0, count, most):
        yield range(start, min(start + most, count))
