"""Ranges of layers, whose bounds may depend on the depth of the model.

A bound is a layer index, a count from the end (`-4`), a fraction of the depth (`50%`, rounded to
the nearest layer) or `end`. Ranges are half-open.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeAlias

from mergekit_interleave.errors import DirectiveError, LayoutError

if TYPE_CHECKING:
    from fractions import Fraction

Bound: TypeAlias = "int | str"
"""An index, negative if it counts from the end, or text such as `end` or `50%`."""

Range: TypeAlias = tuple[Bound, Bound]
"""A half-open range."""

END = "end"

BOUND = r"-?\d{1,18}|\d{1,3}(?:\.\d{1,9})?%|end"
"""A bound as text."""

RANGE = rf"(?:{BOUND}):(?:{BOUND})"
"""A range as text."""

_EXAMPLES = "a layer index, a count from the end such as -4, 50% or end"


def is_relative(bound: Bound) -> bool:
    """Whether a bound depends on the depth."""
    return isinstance(bound, str) or bound < 0


def parse_bound(value: object, where: str) -> Bound:
    """Read a bound.

    Raises:
        DirectiveError: The value is not a bound.
    """
    text = str(value).strip()
    if not isinstance(value, str | int) or isinstance(value, bool) or not _is_bound(text):
        raise DirectiveError(f"{where}: expected {_EXAMPLES}, found {value!r:.80}")
    return text if text == END or text.endswith("%") else int(text)


def _is_bound(text: str) -> bool:
    if not re.fullmatch(BOUND, text):
        return False
    return not text.endswith("%") or _share(text) <= 1


def _share(bound: str) -> Fraction:
    """Return the fraction of the depth for a bound such as 33.3%, without rounding."""
    from fractions import Fraction  # noqa: PLC0415 - few ranges need it, and it slows down start-up

    return Fraction(bound[:-1]) / 100


def is_range(value: object) -> bool:
    """Whether a value has the form of a range: a list, or text with a colon."""
    return isinstance(value, list) or (isinstance(value, str) and ":" in value)


def parse_range(value: object, where: str) -> Range:
    """Read a range: `[8, 24]`, or the text `8:24`.

    Raises:
        DirectiveError: The value is not a range, or the range is empty for every depth.
    """
    entries = value.split(":") if isinstance(value, str) else value
    if not isinstance(entries, list) or len(entries) != 2:  # noqa: PLR2004 - start and stop
        raise DirectiveError(f"{where}: expected a range [START, STOP], found {value!r:.200}")
    start, stop = (parse_bound(bound, where) for bound in entries)
    (start_base, start_offset), (stop_base, stop_offset) = _place(start), _place(stop)
    if start_base == stop_base and start_offset >= stop_offset:
        if start_offset == stop_offset:
            raise DirectiveError(f"{where}: {show((start, stop))} is empty", hint=_one(start))
        right = f"{stop}:{start}" if isinstance(value, str) else show((stop, start))
        raise DirectiveError(f"{where}: {show((start, stop))} is reversed", hint=f"write {right}")
    if start in (END, "100%"):
        raise DirectiveError(f"{where}: {show((start, stop))} is empty", hint=_one(END))
    return start, stop


def _place(bound: Bound) -> tuple[str, Fraction | int]:
    """Return the reference point of a bound and its offset.

    Bounds with the same reference point can be compared by their offsets.
    """
    if isinstance(bound, int):
        return ("start" if bound >= 0 else "end"), bound
    return ("end", 0) if bound == END else ("part", _share(bound))


def _one(bound: Bound) -> str:
    """Return the hint for an empty range: the range of the one layer at its start."""
    if not isinstance(bound, int) or bound == -1:
        return "ranges are half-open: [-1, end] is the last layer"
    return f"ranges are half-open: [{bound}, {bound + 1}] is layer {bound} alone"


def show(written: Range) -> str:
    """Return a range as text, in the form of a list."""
    return f"[{written[0]}, {written[1]}]"


def resolve(written: Range, depth: int | None, model: object) -> tuple[int, int]:
    """Compute the layer indices of a range.

    Args:
        written: The range.
        depth: The number of layers of the model, or None if it is unknown.
        model: The model, to be named in errors.

    Raises:
        LayoutError: The model has no such layers, or its depth is needed but unknown.
    """
    start, stop = (_at(bound, depth, written, model) for bound in written)
    if depth is None:
        return start, stop
    has = f"{model}, which has {depth} layers"
    all_of_it = f"the model has layers 0 to {depth - 1}, which is the range [0, {depth}]"
    if stop > depth:
        raise LayoutError(f"{show(written)} ends past the last layer of {has}", hint=all_of_it)
    if start < 0:
        raise LayoutError(f"{show(written)} starts before the first layer of {has}", hint=all_of_it)
    if start >= stop:
        right = _one(start) if start == stop else f"write {show((stop, start))}"
        raise LayoutError(f"{show(written)} contains no layer of {has}", hint=right)
    return start, stop


def _at(bound: Bound, depth: int | None, written: Range, model: object) -> int:
    if isinstance(bound, int) and bound >= 0:
        return bound
    if depth is None:
        raise unknown_depth(model, f"{show(written)} depends on it")
    if bound == END:
        return depth
    if isinstance(bound, int):
        return depth + bound
    return int((2 * depth * _share(str(bound)) + 1) // 2)


def unknown_depth(model: object, why: str) -> LayoutError:
    """Return the error for a depth that is needed but unknown."""
    return LayoutError(
        f"the number of layers of {model} is not known, and {why}", hint="state it with --layers N"
    )
