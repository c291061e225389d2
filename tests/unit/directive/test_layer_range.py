"""Layer ranges with bounds that may depend on the depth."""

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
def test_ranges_of_32_layers(written: object, indices: tuple[int, int]) -> None:
    """A range is resolved to indices for a model with 32 layers."""
    assert resolve(parse_range(written, "x"), 32, "m") == indices


def test_a_fraction_is_rounded_to_the_nearest_layer() -> None:
    """Halves are rounded up, without binary rounding errors."""
    assert [resolve(("0%", "50%"), depth, "m")[1] for depth in (31, 32, 33)] == [16, 16, 17]
    assert resolve(("0%", "66.7%"), 30, "m") == (0, 20)


@given(st.integers(1, 200), st.data())
def test_bounds_from_either_end_are_the_same_layers(depth: int, data: st.DataObject) -> None:
    """Bounds counted from the end give the same layers as bounds counted from the start."""
    start = data.draw(st.integers(0, depth - 1))
    stop = data.draw(st.integers(start + 1, depth))
    last = stop - depth or "end"
    assert resolve(parse_range([start - depth, last], "x"), depth, "m") == (start, stop)
    assert resolve(parse_range([start, stop], "x"), depth, "m") == (start, stop)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ([8, 8], r"\[8, 8\]"),
        ([9, 8], r"\[9, 8\]"),
        ([-4, -8], r"\[-4, -8\]"),
        ([1], r"\[START, STOP\].*\[1\]"),
        ("8-24", r"\[START, STOP\].*'8-24'"),
        ("8:", "50% or end.*''"),
        ([True, 4], "50% or end.*True"),
        ([0, 1.5], r"50% or end.*1\.5"),
        ([0, "101%"], "50% or end.*'101%'"),
        ([0, "fin"], "50% or end.*'fin'"),
        ([0, "9" * 40], "50% or end.*'9{40}'"),
    ],
)
def test_invalid_ranges(written: object, reason: str) -> None:
    """A range that is invalid for any model is refused."""
    with pytest.raises(DirectiveError, match=f"^x: .*{reason}"):
        parse_range(written, "x")


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ([0, 33], r"\[0, 33\] .*last layer"),
        ([-40, "end"], r"\[-40, end\] .*first layer"),
        ([16, "50%"], r"\[16, 50%\] .*no layer"),
        ([-4, 8], r"\[-4, 8\] .*no layer"),
        ([-40, -36], r"\[-40, -36\] .*first layer"),
    ],
)
def test_a_range_that_does_not_fit(written: object, reason: str) -> None:
    """The error for a range outside the model names the range, the model and its depth."""
    with pytest.raises(LayoutError, match=rf"{reason} of m\b.* 32\b"):
        resolve(parse_range(written, "x"), 32, "m")


@pytest.mark.parametrize("written", [[0, "end"], [-1, 8], ["50%", 8]])
def test_an_unknown_depth(written: object) -> None:
    """An unknown depth is an error only if the range depends on it."""
    with pytest.raises(LayoutError, match=r"layers of m\b") as error:
        resolve(parse_range(written, "x"), None, "m")
    assert "--layers N" in str(error.value.hint)
    assert resolve((8, 24), None, "m") == (8, 24)


def test_a_range_is_shown_as_it_is_written() -> None:
    """A range is shown as a list of its bounds."""
    assert show(parse_range("-4:end", "x")) == "[-4, end]"
