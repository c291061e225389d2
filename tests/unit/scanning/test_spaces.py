"""The layouts of each space."""

from __future__ import annotations

import pytest

from mergekit_interleave.commands import inputs
from mergekit_interleave.directive.growth import Repeat
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.scanning.spaces import MOST_TIMES, SPACES, candidates


@pytest.mark.parametrize(
    ("space", "count"),
    [
        ("blocks", 465),
        ("ranges", 465),
        ("layers", 30 * 7),
        ("drops", 464),
        ("windows", 210),
        ("damped-blocks", 465),
        ("damped-ranges", 465),
        ("damped-layers", 30 * 7),
    ],
)
def test_counts(space: str, count: int) -> None:
    """A space of 30 layers has every block, range or layer once."""
    found = candidates([space], 30)
    assert len(found) == len({each.directive for each in found}) == count
    assert len({each.cell for each in found}) == count


@pytest.mark.parametrize("space", SPACES)
def test_directives(space: str) -> None:
    """Every layout is a directive with a growth line."""
    for each in candidates([space], 6):
        assert inputs.parse(inputs.Text(each.directive, "test"), {}).growth is not None
        assert each.space == space


def test_damped_spaces() -> None:
    """A damped space has the repeats of its space, each with the updates divided."""
    for each in candidates(["damped-blocks"], 6):
        growth = inputs.parse(inputs.Text(each.directive, "test"), {}).growth
        assert growth == Repeat(each.cell or (0, 0), as_block=True, damped=True)


def test_times() -> None:
    """A layer is repeated at most eight times."""
    assert {each.cell[1] for each in candidates(["layers"], 3) if each.cell} == {*range(2, 9)}
    assert MOST_TIMES == 8


def test_several_spaces() -> None:
    """Spaces are joined in the order in which they are named, each once."""
    found = candidates(["drops", "blocks", "drops"], 4)
    assert [each.space for each in found] == ["drops"] * 9 + ["blocks"] * 10


@pytest.mark.parametrize(("names", "depth"), [(["bogus"], 4), (["drops"], 1), (["windows"], 2)])
def test_no_layouts(names: list[str], depth: int) -> None:
    """An unknown space, and one without layouts for so few layers, are refused."""
    with pytest.raises(DirectiveError, match="--space"):
        candidates(names, depth)
