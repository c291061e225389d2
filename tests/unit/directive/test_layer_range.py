"""Ranges whose ends may depend on the depth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.directive.layer_range import parse_range, resolve, show
from mergekit_interleave.errors import DirectiveError, LayoutError


@pytest.mark.parametrize(
    ("written", "indices"),
    [
        ([8, 24], (8, 24)),
        ("8:24", (8, 24)),
        ([24, "end"], (24, 32)),
        ("24:end", (24, 32)),
        ([-4, "end"], (28, 32)),
        ("-8:-4", (24, 28)),
        ([0, -1], (0, 31)),
        (["25%", "75%"], (8, 24)),
        ("50%:100%", (16, 32)),
        ("0:33.3%", (0, 11)),
        ("4:50%", (4, 16)),
    ],
)
def test_what_a_range_means(written: object, indices: tuple[int, int]) -> None:
    """On 32 layers."""
    assert resolve(parse_range(written, "x"), 32, "m") == indices


def test_a_fraction_is_rounded_to_the_nearest_layer() -> None:
    """Halves are rounded up, without binary rounding errors."""
    assert [resolve(("0%", "50%"), depth, "m")[1] for depth in (31, 32, 33)] == [16, 16, 17]
    assert resolve(("0%", "66.7%"), 30, "m") == (0, 20)


@given(st.integers(1, 200), st.data())
def test_bounds_from_either_end_are_the_same_layers(depth: int, data: st.DataObject) -> None:
    """`[a, b]` and `[a - depth, b - depth]`, or `end` for the last."""
    start = data.draw(st.integers(0, depth - 1))
    stop = data.draw(st.integers(start + 1, depth))
    last = stop - depth or "end"
    assert resolve(parse_range([start - depth, last], "x"), depth, "m") == (start, stop)
    assert resolve(parse_range([start, stop], "x"), depth, "m") == (start, stop)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ([8, 8], "is empty"),
        ([9, 8], "is reversed"),
        ([-4, -8], "is reversed"),
        ([1], "expected a range"),
        ("8-24", "expected a range"),
        ("8:", "^x: expected"),
        ([True, 4], "^x: expected"),
        ([0, 1.5], "^x: expected"),
        ([0, "101%"], "^x: expected"),
        ([0, "fin"], "^x: expected"),
        ([0, "9" * 40], "^x: expected"),
    ],
)
def test_no_range(written: object, reason: str) -> None:
    """Errors that do not depend on the model."""
    with pytest.raises(DirectiveError, match=reason):
        parse_range(written, "x")


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ([0, 33], "ends past .* m, which has 32 layers"),
        ([-40, "end"], "starts before"),
        ([16, "50%"], "contains no layer"),
        ([-4, 8], "contains no layer"),
        ([-40, -36], "starts before"),
    ],
)
def test_a_range_that_does_not_fit(written: object, reason: str) -> None:
    """Errors for a given depth."""
    with pytest.raises(LayoutError, match=reason):
        resolve(parse_range(written, "x"), 32, "m")


@pytest.mark.parametrize("written", [[0, "end"], [-1, 8], ["50%", 8]])
def test_a_depth_that_is_not_known(written: object) -> None:
    """It is required only where the range depends on it."""
    with pytest.raises(LayoutError, match="layers of m is not known") as error:
        resolve(parse_range(written, "x"), None, "m")
    assert "--layers N" in str(error.value.hint)
    assert resolve((8, 24), None, "m") == (8, 24)


def test_a_range_is_shown_as_it_is_written() -> None:
    """In a list."""
    assert show(parse_range("-4:end", "x")) == "[-4, end]"
