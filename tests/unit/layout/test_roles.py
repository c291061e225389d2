"""The roles of layers, and the seams of a layout."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_layouts import MODEL, OTHER, layouts

from mergekit_interleave.directive.scale import Scale, zeroed_scales
from mergekit_interleave.layout import roles
from mergekit_interleave.layout.layout import Layout, Slice

HALF, ZEROED = (Scale(0.5),), zeroed_scales(["o_proj", "down_proj"])


@pytest.mark.parametrize(
    ("slices", "identities", "expected"),
    [
        ([(0, 4)], (), "oooo"),
        ([(0, 2), (1, 2, ZEROED), (2, 4)], (2,), "oozoo"),
        ([(0, 2), (1, 2, ZEROED), (2, 4)], (), "oocoo"),
        ([(0, 2), (2, 4, HALF)], (), "ooss"),
        ([(0, 2, HALF), (0, 2, HALF), (2, 4)], (), "ssccoo"),
        ([(0, 2, HALF), (0, 4)], (), "ccoooo"),
        ([(0, 3), (3, 4, ZEROED)], (3,), "oooz"),
        ([(0, 3), (3, 4, ZEROED)], (), "ooos"),
        ([(0, 1), (2, 3), (1, 2), (3, 4)], (), "omoo"),
        ([(7, 8), (0, 7)], (), "mooooooo"),
        ([(0, 2), (4, 6), (2, 8)], (), "oommooccoo"),
    ],
)
def test_roles(slices: list[tuple[int, int]], identities: tuple[int, ...], expected: str) -> None:
    """Scaled, moved, copied and zeroed layers have different roles."""
    layout = Layout(tuple(Slice(MODEL, *each) for each in slices))
    assert "".join(role[0] for role in roles.roles(layout, identities)) == expected


@given(layouts())
def test_every_source_layer_has_one_original(drawn: tuple[Layout, set[int]]) -> None:
    """Each source layer has one occurrence that is no copy; what is new is a copy or has zeros."""
    layout, identities = drawn
    kept = Counter((x.model, x.source) for x in layout.layers if not x.is_copy)
    assert kept == Counter({(x.model, x.source) for x in layout.layers})
    for layer, role in zip(layout.layers, roles.roles(layout, identities), strict=True):
        assert (role == roles.ZEROED) == (layer.index in identities)
        assert layer.new or role in (roles.ORIGINAL, roles.MOVED, roles.SCALED)
        assert not layer.new or role in (roles.COPY, roles.ZEROED) or layer.edit.zeroes


@given(st.permutations(range(7)))
def test_as_few_layers_as_possible_are_moved(order: list[int]) -> None:
    """The layers that are not moved are the most that stand in their order."""
    layout = Layout(tuple(Slice(MODEL, source, source + 1) for source in order))
    found = roles.roles(layout)
    kept = [source for source, role in zip(order, found, strict=True) if role == roles.ORIGINAL]
    assert kept == sorted(kept)
    longer = combinations(order, min(len(kept) + 1, 7))
    assert len(kept) == 7 or not any([*each] == sorted(each) for each in longer)


@pytest.mark.parametrize(
    ("slices", "identities", "expected"),
    [
        ([(0, 8)], (), []),
        ([(0, 4), (4, 8)], (), []),
        ([(0, 6), (2, 8)], (), [5, 6]),
        ([(0, 3), (5, 8)], (), [2, 3]),
        ([(0, 2), (1, 2, ZEROED), (2, 4)], (2,), []),
        ([(0, 2), (1, 2, ZEROED), (2, 4)], (), [1, 2]),
        ([(0, 2), (1, 2), (1, 2), (2, 4)], (), [1, 2, 3]),
        ([(0, 2), (0, 2, ZEROED), (3, 5)], (2, 3), [1, 4]),
    ],
)
def test_seams(
    slices: list[tuple[int, int]], identities: tuple[int, ...], expected: list[int]
) -> None:
    """The layers at both sides of a seam are found, and an identity is no seam."""
    layout = Layout(tuple(Slice(MODEL, *each) for each in slices))
    assert roles.seam_layers(layout, identities) == expected


def test_two_models_meet_at_a_seam() -> None:
    """A layer of another model is at a seam, even if the source indices continue."""
    assert roles.seams(Layout((Slice(MODEL, 0, 2), Slice(OTHER, 2, 4)))) == [(1, 2)]


@given(layouts())
def test_seams_part_the_layout_into_stretches_of_its_models(
    drawn: tuple[Layout, set[int]],
) -> None:
    """Between two seams, the layers that compute are consecutive layers of one model."""
    layout, identities = drawn
    at = {before for before, _ in roles.seams(layout, identities)}
    rest = [layer for layer in layout.layers if layer.index not in identities]
    for before, after in pairwise(rest):
        follows = before.model == after.model and before.source + 1 == after.source
        assert follows == (before.index not in at)
    sides = {index for seam in roles.seams(layout, identities) for index in seam}
    assert roles.seam_layers(layout, identities) == sorted(sides)
    assert not sides & identities


def test_ranges() -> None:
    """Consecutive indices are written as a range."""
    assert roles.ranges([3, 8, 9, 10, 12]) == "3, 8-10, 12"
    assert roles.ranges([]) == ""
