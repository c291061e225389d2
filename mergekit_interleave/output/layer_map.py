"""Draw a layout as a line of text, and as a picture for a terminal; `svg` draws it as a file."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.layout import roles as roles_of_layers
from mergekit_interleave.layout.layout import Layout, joined
from mergekit_interleave.layout.roles import COPY, MOVED, ORIGINAL, ROLES, SCALED, ZEROED, roles

Span: TypeAlias = tuple[str, str]
"""A text and its `rich` style; an empty string means no style."""

Line: TypeAlias = tuple[Span, ...]


@dataclass(frozen=True)
class Run:
    """A range of layers of the same role, copied from a range of layers of one model.

    Ranges are half-open. `roles` lists the roles. Either all layers are new or none is.
    """

    start: int
    stop: int
    model: ModelRef
    source: int
    role: str
    new: bool


def runs(layout: Layout, identities: Collection[int] = ()) -> Iterator[Run]:
    """Split the layers into the longest possible runs.

    Args:
        layout: The layers.
        identities: The indices of the new layers that pass their input on unchanged.
    """
    neighbours = groupby(
        zip(layout.layers, roles(layout, identities), strict=True),
        key=lambda pair: (pair[0].model, pair[1], pair[0].index - pair[0].source, pair[0].new),
    )
    for (model, role, shift, new), group in neighbours:
        layers = [layer for layer, _ in group]
        first, last = layers[0].index, layers[-1].index
        yield Run(first, last + 1, model, first - shift, role, new)


def counts(layout: Layout, identities: Collection[int] = ()) -> dict[str, str]:
    """Count the layers of each role that occurs, as text: `32 original`, `8 zeroed`."""
    found = Counter(roles(layout, identities))
    plural = {COPY: "copies"}
    return {
        role: f"{found[role]} {role if found[role] == 1 else plural.get(role, role)}"
        for role in ROLES
        if found[role]
    }


def others(layout: Layout, identities: Collection[int] = ()) -> str:
    """Count the layers that are changed but no copies, as text: `, 80 scaled`; empty if none."""
    found = counts(layout, identities)
    return "".join(f", {found[role]}" for role in (SCALED, MOVED) if role in found)


def seam_layers(layout: Layout, identities: Collection[int] = ()) -> str:
    """Write the number of seams and the layers at both sides: `1, at layers 23-24`."""
    found = roles_of_layers.seams(layout, identities)
    layers = roles_of_layers.seam_layers(layout, identities)
    shown = roles_of_layers.ranges(layers).split(", ")
    if len(shown) > _MOST_SOURCES:
        shown[_MOST_SOURCES - 2 : -1] = ["…"]
    return f"{len(found)}, at layers {', '.join(shown)}" if found else ""


# The layers on one line of text.

_REPEATS, _LONGEST_PATTERN = 4, 8
"""The minimum number of repeats that are abridged, and the maximum number of runs in a pattern."""

_PIECES, _FIRST, _LAST = 32, 16, 8
"""The maximum number of pieces of a map, and the pieces at each end of a map that is cut."""


def layer_map(layout: Layout, identities: Collection[int] = ()) -> str:
    """Write the layers on one line, with the new ones in brackets: `0-3 [4] 5-8 [9]`.

    If the lengths and roles of consecutive runs repeat four times or more, only the first two and
    the last repeat are shown: `0-3 [4] 5-8 [9] … 35-38 [39]`. If the map is still long, only its
    beginning and its end are shown, with the number of layers between them.

    Args:
        layout: The layers.
        identities: The indices of the new layers that pass their input on unchanged.
    """
    found = list(runs(layout, identities))
    texts = [_indices(run) for run in found]
    shown: list[str] = []
    at = 0
    for start, stop in _repetitive(found):
        shown += [*texts[at:start], "…"]
        at = stop
    shown += texts[at:]
    if len(shown) > _PIECES:
        skipped = found[-_LAST].start - found[_FIRST].start
        shown = [*texts[:_FIRST], f"… ({skipped} layers) …", *texts[-_LAST:]]
    return " ".join(shown)


def sources(layout: Layout) -> str:
    """Write the source layers on one line: `0-23 8-31`; for several models `A 0-23, B 8-31`.

    A mean of two layers is written `4+5`.
    """
    several = len(layout.models) > 1
    letters = {model: f"{letter(i)} " if several else "" for i, model in enumerate(layout.models)}
    shown: list[str] = []
    for mean_with, alike in groupby(layout.slices, key=lambda part: part.mean_with):
        for part in joined(list(alike)):
            mean = "" if mean_with is None else f"+{mean_with}"
            one = str(part.start) if len(part) == 1 else f"{part.start}-{part.stop - 1}"
            shown.append(letters[part.model] + one + mean)
    if len(shown) > _MOST_SOURCES:
        shown[_MOST_SOURCES - 2 : -1] = ["…"]
    return (", " if several else " ").join(shown)


_MOST_SOURCES = 12
"""The maximum number of ranges that `sources` writes."""


def _indices(run: Run) -> str:
    last = run.stop - 1
    indices = str(last) if run.start == last else f"{run.start}-{last}"
    return f"[{indices}]" if run.new else indices


def _repetitive(found: Sequence[Run]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of runs to leave out: in each series of repeats, from the third on."""
    keys = [(run.stop - run.start, run.role, run.new) for run in found]
    reach = {period: _reach(keys, period) for period in range(1, _LONGEST_PATTERN + 1)}
    at = 0
    while at < len(keys):
        repeats = {period: ahead[at] // period + 1 for period, ahead in reach.items()}
        # Take the pattern that leaves out the most runs, and of these the shortest one. An
        # ellipsis that replaces a single run saves nothing.
        period = max(repeats, key=lambda p: ((repeats[p] - 3) * p, -p))
        if repeats[period] >= _REPEATS and (repeats[period] - 3) * period > 1:
            stop = at + repeats[period] * period
            yield at + 2 * period, stop - period
            at = stop
        else:
            at += 1


def _reach(keys: Sequence[object], period: int) -> list[int]:
    """Count, at each position, the consecutive keys that equal the key one period later."""
    ahead = [0] * (len(keys) + 1)
    for i in range(len(keys) - period - 1, -1, -1):
        ahead[i] = ahead[i + 1] + 1 if keys[i] == keys[i + period] else 0
    return ahead


# The layers as a picture for a terminal.

NARROWEST = 20
"""The minimum width of a strip: an index and a group of ten must fit."""

MOST_LAYERS = 1_000
"""The maximum number of layers that a strip shows; it cuts the middle of a longer layout."""

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_GLYPHS = {ORIGINAL: "█", MOVED: "▞", SCALED: "▓", COPY: "▒", ZEROED: "░"}
_ASCII_GLYPHS = {ORIGINAL: "#", MOVED: "^", SCALED: "%", COPY: "+", ZEROED: "."}
_ROLE_STYLES = {ORIGINAL: "blue", MOVED: "magenta", SCALED: "cyan", COPY: "yellow", ZEROED: "green"}
_SYMBOLS = {MOVED: "↕", SCALED: "×", ZEROED: "·"}  # noqa: RUF001 - not the letter x
"""The roles that have one character for all models, whose colours then differ."""

_MODEL_STYLES = (
    "bright_blue", "yellow", "green", "magenta", "cyan", "red", "bright_black", "bright_magenta",
)  # fmt: skip


def strip(
    layout: Layout,
    identities: Collection[int] = (),
    *,
    names: Sequence[str] = (),
    width: int = 80,
    ascii_only: bool = False,
) -> list[Line]:
    """Draw the layers for a terminal, one character for each, with a legend below.

    The character shows the role, and the model if there are several; colour repeats it. Layers
    are in groups of ten, and each line begins with the index of its first layer.

    Args:
        layout: The layers.
        identities: The indices of the new layers that pass their input on unchanged.
        names: The name of each model of the layout; a single model's name is not shown.
        width: The number of columns, at least `NARROWEST`.
        ascii_only: Whether to use only ASCII characters.
    """
    width = max(width, NARROWEST)
    models = {model: i for i, model in enumerate(layout.models)}
    several = len(models) > 1
    glyphs = [
        _model_glyph(models[layer.model], role, ascii_only=ascii_only)
        if several
        else _role_glyph(role, ascii_only=ascii_only)
        for layer, role in zip(layout.layers, roles(layout, identities), strict=True)
    ]
    counted = counts(layout, identities)
    entries: list[Line] = []
    for role, words in counted.items():
        glyph, style = _role_glyph(role, ascii_only=ascii_only)
        if several:
            some = [_model_glyph(i, role, ascii_only=ascii_only)[0] for i in range(len(models))]
            glyph, style = "".join(dict.fromkeys(some[:3])), ""
        entries.append(((glyph, style), (f" {words}", "")))
    lines = [*_rows(glyphs, width, "..." if ascii_only else "…"), (), *_wrap(entries, width)]
    if several:
        lines += _model_lines(model_names(layout, names), width, ascii_only=ascii_only)
    return lines


def _role_glyph(role: str, *, ascii_only: bool) -> Span:
    return (_ASCII_GLYPHS if ascii_only else _GLYPHS)[role], _ROLE_STYLES[role]


def _model_glyph(model: int, role: str, *, ascii_only: bool) -> Span:
    """Return a letter, in lower case for a copy; models beyond the 26th share a symbol."""
    style = _MODEL_STYLES[model % len(_MODEL_STYLES)] if model < len(_LETTERS) else ""
    if role in _SYMBOLS:
        return (_ASCII_GLYPHS if ascii_only else _SYMBOLS)[role], style
    if model >= len(_LETTERS):
        return "*" if role == ORIGINAL else "+", style
    return _LETTERS[model] if role == ORIGINAL else _LETTERS[model].lower(), style


def _rows(glyphs: Sequence[Span], width: int, ellipsis: str) -> Iterator[Line]:
    count = len(glyphs)
    indent = len(str(count))
    fitting = (width - indent) // 11  # a space and ten characters
    per_row = 10 * max(groups for groups in (1, 2, 5, 10) if groups <= fitting)
    starts = list(range(0, count, per_row))
    skipped: range | None = None
    if count > MOST_LAYERS:
        half = MOST_LAYERS // 2
        skipped = range(half, (count - half) // per_row * per_row)
        starts = [start for start in starts if start not in skipped]
    for start in starts:
        if skipped and start == skipped.stop:
            yield ((f"{ellipsis} {len(skipped)} more layers", "dim"),)
        row = glyphs[start : start + per_row]
        spans: list[Span] = [(f"{start:>{indent}}", "dim")]
        for group in range(0, len(row), 10):
            spans.append((" ", ""))
            for style, alike in groupby(row[group : group + 10], key=lambda glyph: glyph[1]):
                spans.append(("".join(text for text, _ in alike), style))
        yield tuple(spans)


def _wrap(entries: Iterable[Line], width: int) -> Iterator[Line]:
    """Put entries side by side, two spaces apart, on as many lines as needed."""
    line: list[Span] = []
    for entry in entries:
        needed = sum(columns(text) for text, _ in (*line, *entry))
        if line and needed + 2 > width:
            yield tuple(line)
            line = []
        line += [*([("  ", "")] if line else []), *entry]
    yield tuple(line)


def _model_lines(names: Sequence[str], width: int, *, ascii_only: bool) -> Iterator[Line]:
    ellipsis = "..." if ascii_only else "…"
    for i, name in enumerate(names[: len(_LETTERS)]):
        shown = name.encode("ascii", "replace").decode() if ascii_only else name
        yield (
            _model_glyph(i, ORIGINAL, ascii_only=ascii_only),
            (f" {shorten(shown, width - 2, columns, ellipsis)}", ""),
        )
    if len(names) > len(_LETTERS):
        yield ((f"* {len(names) - len(_LETTERS)} more models", ""),)


# The names of models, for all pictures.


def model_names(layout: Layout, names: Sequence[str] = ()) -> list[str]:
    """Return the names of the models in a picture, in printable characters.

    Args:
        layout: The layers.
        names: The name of each model; if empty, the names in the layout are used.

    Raises:
        ValueError: The number of names is not the number of models.
    """
    shown = list(names) or [str(model) for model in layout.models]
    if len(shown) != len(layout.models):
        raise ValueError(f"{len(shown)} names for {len(layout.models)} models")
    return [legible(name) for name in shown]


def letter(model: int) -> str:
    """Return the letter of a model: A to Z, then AA, AB and so on."""
    before, last = divmod(model, len(_LETTERS))
    return (letter(before - 1) if before else "") + _LETTERS[last]


def legible(text: str) -> str:
    """Replace characters that are not printable, such as control characters and surrogates.

    They could move a terminal's cursor or reverse the text, and XML forbids many of them.
    """
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def columns(text: str) -> int:
    """Return the maximum number of terminal columns that a text takes."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def shorten(text: str, room: float, measure: Callable[[str], float], ellipsis: str = "…") -> str:
    """Cut a text at its end if it is wider than `room`."""
    if measure(text[:_LONGEST_NAME]) <= room and len(text) <= _LONGEST_NAME:
        return text
    room -= measure(ellipsis)
    kept = 0
    for char in text[:_LONGEST_NAME]:
        room -= measure(char)
        if room < 0:
            break
        kept += 1
    return f"{text[:kept].rstrip()}{ellipsis}"


_LONGEST_NAME = 1_000
"""The number of characters of a name that are measured; no line is longer."""
