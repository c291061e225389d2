"""List the layouts of a space: families of directives that repeat or leave out layers of one model.

A layout is written as a directive, so `run` takes it as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.growth import Repeat
from mergekit_interleave.directive.growth.repeat import DAMPED
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.scanning import heat_map
from mergekit_interleave.scanning.heat_map import Axes

MOST_TIMES = 8
"""How often the space `layers` repeats a layer at most."""

BLOCKS, FILE = "blocks", "file"
"""The space that is measured if none is named, and that of layouts that a file lists."""


@dataclass(frozen=True)
class Candidate:
    """A layout to measure.

    Attributes:
        directive: Its directive, in one line.
        space: The space that it belongs to.
        cell: Its place in the map of the space: the first layer of a block and the one after its
            last, or a layer and its number of occurrences. None if no space has it.
    """

    directive: str
    space: str
    cell: tuple[int, int] | None = None


def _ranges(depth: int) -> Iterator[tuple[int, int]]:
    """Yield all contiguous ranges of layers, as start and stop."""
    return ((i, j) for i in range(depth) for j in range(i + 1, depth + 1))


def _blocks(depth: int) -> Iterator[Candidate]:
    for i, j in _ranges(depth):
        yield Candidate(f"repeat: {i}:{j}@block", BLOCKS, (i, j))


def _interwoven(depth: int) -> Iterator[Candidate]:
    for i, j in _ranges(depth):
        yield Candidate(f"repeat: {i}:{j}", "ranges", (i, j))


def _layers(depth: int) -> Iterator[Candidate]:
    for i in range(depth):
        for times in range(2, MOST_TIMES + 1):
            yield Candidate(f"repeat: {i}:{i + 1}x{times}", "layers", (i, times))


def _damped(
    layouts: Callable[[int], Iterator[Candidate]],
) -> Callable[[int], Iterator[Candidate]]:
    """Return the function that lists the repeats of a space with their updates divided."""

    def damped(depth: int) -> Iterator[Candidate]:
        for each in layouts(depth):
            growth = directives.parse(each.directive, "").growth
            if not isinstance(growth, Repeat):
                raise TypeError("only repeats can be damped")
            document = replace(growth, damped=True).to_document(str)
            name = f"{DAMPED}-{each.space}"
            yield Candidate(yaml_io.write_inline(document), name, each.cell)

    return damped


def _drops(depth: int) -> Iterator[Candidate]:
    for i, j in _ranges(depth):
        if j - i < depth:
            yield Candidate(f"drop: {i}:{j}", "drops", (i, j))


def _windows(depth: int) -> Iterator[Candidate]:
    """Yield windows that overlap by at most half, so that the model at most doubles."""
    for size in range(2, depth):
        for stride in range((size + 1) // 2, size):
            yield Candidate(f"windows: {size}:{stride}", "windows", (size, stride))


@dataclass(frozen=True)
class Space:
    """A family of layouts.

    Attributes:
        layouts: Lists its layouts for a number of layers.
        axes: What the numbers of a cell are.
    """

    layouts: Callable[[int], Iterator[Candidate]]
    axes: Axes


SPACES: Mapping[str, Space] = {
    BLOCKS: Space(_blocks, heat_map.BLOCKS),
    "ranges": Space(_interwoven, heat_map.BLOCKS),
    "layers": Space(_layers, heat_map.TIMES),
    f"{DAMPED}-{BLOCKS}": Space(_damped(_blocks), heat_map.BLOCKS),
    f"{DAMPED}-ranges": Space(_damped(_interwoven), heat_map.BLOCKS),
    f"{DAMPED}-layers": Space(_damped(_layers), heat_map.TIMES),
    "drops": Space(_drops, heat_map.DROPS),
    "windows": Space(_windows, heat_map.WINDOWS),
}
"""The spaces by name."""


def candidates(names: Sequence[str], depth: int) -> list[Candidate]:
    """List the layouts of spaces.

    Args:
        names: The names of the spaces.
        depth: The number of layers of the model.

    Raises:
        DirectiveError: There is no such space, or it has no layouts for this depth.
    """
    found: list[Candidate] = []
    for name in dict.fromkeys(names):
        if name not in SPACES:
            raise DirectiveError(
                f"--space: {name!r:.60} is not a space", hint=f"use {', '.join(SPACES)}"
            )
        own = list(SPACES[name].layouts(depth))
        if not own:
            raise DirectiveError(f"--space: {name} has no layouts of {depth} layers")
        found += own
    return found
