"""The layers and modules that are to be trained."""

from __future__ import annotations

import pytest
from hypothesis import given
from random_layouts import MODEL, OTHER, layouts

from mergekit_interleave.architectures.family import family_of
from mergekit_interleave.directive.scale import Scale, zeroed_scales
from mergekit_interleave.errors import DirectiveError, InterleaveError, LayoutError, RefusedError
from mergekit_interleave.layout.layout import Layout, Slice
from mergekit_interleave.training import selection

LLAMA = family_of("llama")
ZEROED = zeroed_scales(["o_proj", "down_proj"])
EXPANDED = Layout((Slice(MODEL, 0, 4), Slice(MODEL, 3, 4, ZEROED), Slice(MODEL, 4, 8)))
STACKED = Layout((Slice(MODEL, 0, 6), Slice(MODEL, 2, 8)))
PRUNED = Layout((Slice(MODEL, 0, 3), Slice(MODEL, 5, 8)))
SCALED = Layout((Slice(MODEL, 0, 8, (Scale(0.5),)),))
FRANKENMERGE = Layout((Slice(MODEL, 0, 4), Slice(OTHER, 4, 8)))


@pytest.mark.parametrize(
    ("layout", "words", "expected"),
    [
        (EXPANDED, "new", [4]),
        (STACKED, "new", [6, 7, 8, 9]),
        (STACKED, "seams", [5, 6]),
        (PRUNED, "seams", [2, 3]),
        (FRANKENMERGE, "seams", [3, 4]),
        (EXPANDED, "2:4", [2, 3]),
        (EXPANDED, "-2:end", [7, 8]),
        (EXPANDED, "0:1, new,8:9", [0, 4, 8]),
        (STACKED, "new,seams", [5, 6, 7, 8, 9]),
    ],
)
def test_layers(layout: Layout, words: str, expected: list[int]) -> None:
    """Words and ranges select layers of the new model, in order and without repetition."""
    assert [*selection.select(layout, LLAMA, words)] == expected


@pytest.mark.parametrize(
    ("layout", "words", "kind", "hint"),
    [
        (EXPANDED, "seams", RefusedError, "--layers new"),
        (PRUNED, "new", RefusedError, "--layers seams"),
        (FRANKENMERGE, "new", RefusedError, "--layers seams"),
        (SCALED, "new", RefusedError, "--layers 0:8"),
        (EXPANDED, "seam", DirectiveError, "seams"),
        (EXPANDED, "3", DirectiveError, "--layers 8:9"),
        (EXPANDED, "", DirectiveError, "--layers 8:9"),
        (EXPANDED, "5:3", DirectiveError, "3:5"),
        (EXPANDED, "4:99", LayoutError, "[0, 9]"),
    ],
)
def test_layers_that_do_not_exist(
    layout: Layout, words: str, kind: type[InterleaveError], hint: str
) -> None:
    """The hint names what the model has."""
    with pytest.raises(kind) as caught:
        selection.select(layout, LLAMA, words)
    assert hint in (caught.value.hint or "")


@given(layouts())
def test_the_hint_of_a_refusal_works(drawn: tuple[Layout, set[int]]) -> None:
    """What a refusal suggests selects layers."""
    layout, _ = drawn
    for word in (selection.NEW, selection.SEAMS):
        try:
            chosen = selection.select(layout, LLAMA, word)
        except RefusedError as error:
            other = (error.hint or "").rpartition("--layers ")[2]
            chosen = selection.select(layout, LLAMA, other)
        assert chosen


@given(layouts())
def test_seams_of_an_unknown_family(drawn: tuple[Layout, set[int]]) -> None:
    """The identities of an unknown family are judged as those of Llama, and are no seams."""
    layout, _ = drawn
    start = Layout((*layout.slices, Slice(MODEL, 90, 91), Slice(MODEL, 95, 96)))
    both = [selection.select(start, family, "seams,0:1") for family in (LLAMA, None)]
    assert both[0] == both[1]
