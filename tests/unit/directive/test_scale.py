"""`zero` and `scale` are read, and the scales of a tensor follow from them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.directive.directive import from_flags
from mergekit_interleave.directive.scale import (
    KEEP,
    NORMS,
    Scale,
    parse_factor,
    parse_scale,
    parse_scale_flag,
    parse_zero,
    scale_document,
    scale_of,
    zeroed_scales,
)
from mergekit_interleave.errors import DirectiveError

FACTORS = st.floats(allow_nan=False, allow_infinity=False)
SCALES = st.lists(
    st.builds(Scale, FACTORS, st.none() | st.sampled_from(["q_proj", "a b", "null", "1", "*x"])),
    min_size=1,
    max_size=4,
).map(tuple)


@pytest.mark.parametrize(
    ("written", "factor"),
    [
        (0.5, 0.5),
        (1, 1.0),
        ("0.8408964153", 0.8408964153),
        ("1e-3", 0.001),
        ("-.5", -0.5),
        ("1/3", 1 / 3),
        ("sqrt(1/2)", math.sqrt(0.5)),
        ("sqrt( 0.5 )", math.sqrt(0.5)),
        ("sqrt(sqrt(1/2))", math.sqrt(math.sqrt(0.5))),
        ("0.1/0.3", 1 / 3),
        ("1/sqrt(2)", 1 / math.sqrt(2)),
        ("sqrt(2)/2", math.sqrt(2) / 2),
        ("sqrt(1/sqrt(4))", math.sqrt(0.5)),
    ],
)
def test_factors(written: object, factor: float) -> None:
    """Factors are exact."""
    assert parse_factor(written, "x") == factor


@pytest.mark.parametrize(
    "written",
    [True, None, "half", "1/0", "sqrt(-1)", "sqrt(", "1e999", float("inf"), float("nan"), [1], "",
     "sqrt(" * 2000, "2**9", "1e9999999/3", "sqrt(1/0)", 10**400, "nan", "__import__('os')"],
)  # fmt: skip
def test_invalid_factors(written: object) -> None:
    """An invalid factor is refused at once, without evaluating code."""
    with pytest.raises(DirectiveError, match=r"^x: .*number"):
        parse_factor(written, "x")


def test_other_tensors_stay_as_they_are() -> None:
    """Unnamed tensors are not scaled, except through `*`, and mergekit's form is kept."""
    assert parse_scale({"q_proj": 0.5}, "x") == (Scale(0.5, "q_proj"), KEEP)
    assert parse_scale({"q_proj": 0.5, "*": 2}, "x") == (Scale(0.5, "q_proj"), Scale(2.0))
    assert parse_scale(0.5, "x") == (Scale(0.5),)
    own = [{"filter": "q_proj", "value": 0.5}]
    assert parse_scale(own, "x") == (Scale(0.5, "q_proj"),)
    assert scale_of("k_proj", parse_scale(own, "x")) is None


@pytest.mark.parametrize(
    "written",
    [{}, [], {"*": 1, "a": 2}, {1: 2}, {"a": "b"}, [1], [{"valu": 1}], [{"filter": 1, "value": 1}]],
)
def test_invalid_scales(written: object) -> None:
    """An invalid scale is refused, and the error names its key."""
    with pytest.raises(DirectiveError, match=r"^x"):
        parse_scale(written, "x")


def test_the_flag() -> None:
    """The flag has the same meaning as the mapping."""
    mapping = parse_scale({"q_proj": 0.5, "k_proj": "sqrt(1/2)"}, "x")
    assert parse_scale_flag("q_proj=0.5, k_proj=sqrt(1/2)", "x") == mapping
    assert parse_scale_flag("{q_proj: 0.5, k_proj: sqrt(1/2)}", "x") == mapping
    assert parse_scale_flag("1/2", "x") == (Scale(0.5),)
    for wrong in ("q_proj=", "=1", "a=1,a=2", "", "a=1,b"):
        with pytest.raises(DirectiveError, match=r"^x\b"):
            parse_scale_flag(wrong, "x")


@pytest.mark.parametrize("written", ["gains", "norms", " Norms "])
def test_gains_is_an_alias_of_norms(written: str) -> None:
    """`gains` is read as `norms` and written as `norms`."""
    assert parse_zero(written, "x") == NORMS
    assert from_flags(zero=written).to_document() == {"zero": "norms"}


@given(SCALES)
def test_written_and_read_again(scales: tuple[Scale, ...]) -> None:
    """A scale that is written and read again is exactly the same."""
    again = parse_scale(scale_document(scales), "x")
    assert again == scales
    assert [math.copysign(1, s.value) for s in again] == [math.copysign(1, s.value) for s in scales]


def test_the_shortest_form_is_written() -> None:
    """Exact roots and fractions are written as such, and whole numbers without a point."""
    assert scale_document(
        parse_scale({"a": math.sqrt(0.5), "b": 1.0, "c": 0.7, "d": 1 / 3}, "x")
    ) == {
        "a": "sqrt(1/2)",
        "b": 1,
        "c": 0.7,
        "d": "1/3",
    }
    assert scale_document(zeroed_scales(["o_proj"])) == {"o_proj": 0}
