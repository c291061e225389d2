"""The tree of paths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.scanning.paths import Node, Path, Step, covering, groups, size, tree

PATHS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), max_size=12)


def passed(nodes: Mapping[Step, Node], before: Path = ()) -> Iterator[tuple[int, Path]]:
    """Yield each path of a tree with its number."""
    for step, node in nodes.items():
        path = (*before, step)
        yield from ((number, path) for number in node.ends)
        yield from passed(node.children, path)


@given(PATHS)
def test_a_tree_has_its_paths(lists: list[list[int]]) -> None:
    """Every path is in the tree once, under its number."""
    paths = {number: tuple(map(Step, steps)) for number, steps in enumerate(lists)}
    assert dict(passed(tree(paths))) == paths


@given(PATHS)
def test_the_size(lists: list[list[int]]) -> None:
    """The size is the number of different beginnings."""
    paths = {number: tuple(map(Step, steps)) for number, steps in enumerate(lists)}
    starts = {path[:end] for path in paths.values() for end in range(1, len(path) + 1)}
    assert size(tree(paths)) == len(starts)


def test_blocks_of_thirty_layers() -> None:
    """All blocks of 30 layers need the known number of layer evaluations, and the base 30."""
    base = tuple(Step(index) for index in range(30))
    blocks = [base[:j] + base[i:] for i in range(30) for j in range(i + 1, 31)]
    assert size(tree(dict(enumerate([base, *blocks])))) == 9455 + 30


@given(PATHS)
def test_covering(lists: list[list[int]]) -> None:
    """Each step that is repeated, or moved by some layers modulo 12, is so in a chosen path."""
    paths = {number: tuple(map(Step, steps)) for number, steps in enumerate(lists)}
    chosen = covering(paths)

    def shown(numbers: Iterable[int]) -> set[tuple[Step, bool, bool, int]]:
        return {
            (step, step in paths[number][:index], index != step.source, (index - step.source) % 12)
            for number in numbers
            for index, step in enumerate(paths[number])
        }

    assert shown(chosen) == shown(paths)


def test_few_cover_all_blocks() -> None:
    """Few of the 465 blocks of 30 layers show all layers repeated, and moved modulo 12."""
    base = tuple(Step(index) for index in range(30))
    blocks = [base[:j] + base[i:] for i in range(30) for j in range(i + 1, 31)]
    assert len(covering(dict(enumerate(blocks)))) <= 28


def test_groups() -> None:
    """Groups have every number once, in order."""
    assert [list(group) for group in groups(5, 2)] == [[0, 1], [2, 3], [4]]
