"""Parse and write `zero` and `scale`, which edit the tensors of layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from mergekit_interleave.directive import yaml_io
from mergekit_interleave.errors import DirectiveError, check_keys

if TYPE_CHECKING:
    from fractions import Fraction

AUTO = "auto"
NONE = "none"
NORMS = "norms"
GAINS = "gains"
"""An alias of `norms`, as release 0.1.0 wrote it."""

Zero: TypeAlias = "str | tuple[str, ...]"
"""`auto`, `none`, `norms`, or the name filters of the tensors to zero."""

COPIES, FIRST, LAST, ALL = APPLY_TO = ("copies", "first", "last", "all")
"""Which of several equal layers `zero` and `scale` apply to: every copy, the first copy, the last
copy, or every copy and the original."""


@dataclass(frozen=True)
class Scale:
    """A factor for the tensors whose name contains `filter`, or for all if it is None.

    Attributes:
        value: The factor.
        filter: A part of the names of the tensors.
        fixed: The number that the factor leaves unchanged. The gain of a norm that multiplies by
            1 + weight is halved with the factor 1/2 and the fixed number -1.
    """

    value: float
    filter: str | None = None
    fixed: float = 0.0

    def matches(self, tensor: str) -> bool:
        """Whether the factor applies to a tensor, which means that its name contains the filter."""
        return self.filter is None or self.filter in tensor


Scales: TypeAlias = tuple[Scale, ...]
"""A list of scales; if several match a tensor, the first applies."""


def match_of(tensor: str, scales: Scales) -> Scale | None:
    """Return the scale that applies to a tensor, or None if none matches it."""
    return next((scale for scale in scales if scale.matches(tensor)), None)


def scale_of(tensor: str, scales: Scales) -> float | None:
    """Return the factor of a tensor, or None if no scale matches it."""
    scale = match_of(tensor, scales)
    return None if scale is None else scale.value


def names_zero(scales: Scales, part: str) -> bool:
    """Whether scales zero the tensors whose names contain this part, judging by names alone."""
    return any(
        scale.value == 0 and scale.filter and (scale.filter in part or part in scale.filter)
        for scale in scales
    )


KEEP = Scale(1.0)
"""The scale that ends a list and keeps all other tensors unchanged."""


def zeroed_scales(names: Iterable[str]) -> Scales:
    """Return the scales that zero the named tensors of a layer and keep all others unchanged."""
    zeroed = tuple(Scale(0.0, name) for name in names)
    return (*zeroed, KEEP) if zeroed else ()


_OTHERS = "*"
"""The key for all other tensors in a mapping, as in mergekit."""


def parse_zero(value: object, where: str) -> Zero:
    """Read `auto`, `none`, `norms` (or `gains`), or names: a YAML list, or text with commas.

    Raises:
        DirectiveError: The value has none of these forms.
    """
    words = {AUTO: AUTO, NONE: NONE, NORMS: NORMS, GAINS: NORMS}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    names = value.strip("[] ").split(",") if isinstance(value, str) else value
    if isinstance(names, list) and names and all(isinstance(n, str) and n.strip() for n in names):
        stripped = tuple(name.strip() for name in names)
        for word in words:
            if word in stripped:
                raise DirectiveError(f"{where}: `{word}` cannot be combined with names")
        if len(set(stripped)) < len(stripped):
            raise DirectiveError(f"{where}: a name is given twice")
        return stripped
    raise DirectiveError(
        f"{where}: expected `auto`, `none` or a list of names, found {value!r:.200}",
        hint="for example `zero: [o_proj, down_proj]`, or `zero: none` for plain copies",
    )


def zero_document(zero: Zero) -> object:
    """Return the value of `zero` as YAML."""
    return list(zero) if isinstance(zero, tuple) else zero


def parse_scale(value: object, where: str) -> Scales:
    """Read the factors: one for all tensors, or one for each name.

    A mapping keeps all other tensors unchanged, unless it has the key `*`. A list is mergekit's
    own form and is used unchanged.

    Raises:
        DirectiveError: The value has none of these forms.
    """
    if isinstance(value, list):
        return _listed(value, where)
    if not isinstance(value, Mapping):
        return (Scale(parse_factor(value, where)),)
    if not value:
        raise DirectiveError(f"{where}: expected names and factors", hint=_EXAMPLE)
    if {"value", "filter"} & value.keys():
        raise DirectiveError(
            f"{where}: a mapping with `filter` and `value` must be an entry of a list",
            hint=_EXAMPLE,
        )
    scales = []
    for name, factor in value.items():
        if not isinstance(name, str) or not name.strip():
            raise DirectiveError(f"{where}: expected a name, found {name!r:.80}", hint=_EXAMPLE)
        scales.append(
            Scale(parse_factor(factor, f"{where}.{name}"), None if name == _OTHERS else name)
        )
    if None in [scale.filter for scale in scales[:-1]]:
        raise DirectiveError(f"{where}: `*` stands for all other names, so it must be the last key")
    return tuple(scales) if scales[-1].filter is None else (*scales, KEEP)


_EXAMPLE = "for example `scale: {q_proj: 0.84, k_proj: sqrt(1/2)}`"


def _listed(value: list[object], where: str) -> Scales:
    scales = []
    for i, entry in enumerate(value):
        place = f"{where}[{i}]"
        if not isinstance(entry, Mapping):
            raise DirectiveError(f"{place}: expected `{{filter: ..., value: ...}}`", hint=_EXAMPLE)
        check_keys(entry, ("filter", "value"), place)
        name = entry.get("filter")
        if name is not None and not isinstance(name, str):
            raise DirectiveError(f"{place}.filter: expected a name, found {name!r:.80}")
        factor = parse_factor(entry.get("value"), f"{place}.value")
        scales.append(Scale(factor, None if name == _OTHERS else name))
    if not scales:
        raise DirectiveError(f"{where}: expected names and factors", hint=_EXAMPLE)
    return tuple(scales)


def parse_scale_flag(text: str, where: str) -> Scales:
    """Read `--scale`: a factor, `q_proj=0.84,k_proj=sqrt(1/2)`, or YAML.

    Raises:
        DirectiveError: The value has none of these forms.
    """
    if yaml_io.is_structured(text):
        return parse_scale(yaml_io.read(text, where), where)
    if "=" not in text:
        return parse_scale(text, where)
    pairs = [entry.partition("=") for entry in text.split(",")]
    names = [name.strip() for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise DirectiveError(f"{where}: a name is given twice")
    return parse_scale({name.strip(): factor.strip() for name, _, factor in pairs}, where)


def check_disjoint(zero: Zero | None, scale: Scales, where: str = "") -> None:
    """Check that no name is both zeroed and scaled.

    Raises:
        DirectiveError: A name is both zeroed and scaled.
    """
    zeroed = zero if isinstance(zero, tuple) else ()
    for entry in scale:
        if entry.filter in zeroed:
            raise DirectiveError(
                f"{where}`zero` and `scale` both name {entry.filter}",
                hint="remove it from one of them",
            )


def scale_document(scales: Scales) -> object:
    """Return the shortest form that `parse_scale` reads back as the same scales."""
    if len(scales) == 1 and scales[0].filter is None:
        return _factor_document(scales[0].value)
    *named, last = scales
    names = [scale.filter for scale in named]
    if named and last.filter is None and all(map(_is_name, names)) and len({*names}) == len(names):
        mapping: dict[str, object] = {
            str(scale.filter): _factor_document(scale.value) for scale in named
        }
        return mapping if last == KEEP else {**mapping, _OTHERS: _factor_document(last.value)}
    return [
        {"value": scale.value} if scale.filter is None else
        {"filter": scale.filter, "value": scale.value}
        for scale in scales
    ]  # fmt: skip


def _is_name(name: str | None) -> bool:
    return name is not None and bool(name.strip()) and name != _OTHERS


_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def parse_factor(value: object, where: str) -> float:
    """Read a factor: a number, a fraction `1/3`, or a root `sqrt(1/2)`.

    Raises:
        DirectiveError: The value has none of these forms, or is not finite.
    """
    factor: float | Fraction | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        factor = value
    elif isinstance(value, str) and len(value) < _LONGEST:
        factor = _evaluated(value.replace(" ", ""))
    try:
        if factor is not None and math.isfinite(factor):
            return float(factor)
    except OverflowError:
        pass
    raise DirectiveError(
        f"{where}: expected a number, found {value!r:.80}",
        hint="for example 0.5, 1/3 or sqrt(1/2)",
    )


_LONGEST = 100


def _evaluated(text: str) -> float | Fraction | None:
    root = re.fullmatch(r"sqrt\((.+)\)", text)
    if root and _closes(root[1]):
        inner = _evaluated(root[1])
        return None if inner is None or inner < 0 or not math.isfinite(inner) else math.sqrt(inner)
    over, slash, under = text.rpartition("/")
    if slash and "sqrt" in text and _closes(over) and _closes(under):
        pair = _evaluated(over), _evaluated(under)
        return None if pair[0] is None or not pair[1] else float(pair[0]) / float(pair[1])
    if re.fullmatch(_NUMBER, text):
        number = float(text)
        vanished = number == 0 and re.search(r"[1-9]", text.lower().partition("e")[0])
        return None if vanished else number
    quotient = re.fullmatch(rf"({_NUMBER})/({_NUMBER})", text)
    if quotient is None or len(text) > _LONGEST or re.search(r"[eE]", text):
        return None
    from fractions import Fraction  # noqa: PLC0415 - few factors need it

    numerator, denominator = Fraction(quotient[1]), Fraction(quotient[2])
    return None if denominator == 0 else numerator / denominator


def _closes(text: str) -> bool:
    """Whether the brackets of a text are balanced."""
    depth = 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth < 0:
            return False
    return depth == 0


@cache
def _short() -> dict[float, str]:
    """Return the usual text of each fraction of small numbers and of its root, by value."""
    from fractions import Fraction  # noqa: PLC0415

    fractions = {Fraction(p, q) for q in range(2, 10) for p in range(1, q)}
    roots = {math.sqrt(part): f"sqrt({part})" for part in fractions}
    return roots | {float(part): str(part) for part in fractions}


_EXACT = 2**53


def _factor_document(value: float) -> object:
    """Return a factor as a person would write it, without loss of precision."""
    if value.is_integer() and abs(value) < _EXACT and (value or math.copysign(1, value) > 0):
        return int(value)
    short = _short().get(value)
    return short if short and len(short) < len(repr(value)) else value
