"""A layout as an SVG file: the picture on a model card.

It is shown by `<img>` on pages of either colour that say nothing of which, so it has no background
and asks for none: what stands on the page itself is of middling lightness, and cells bring
their own background. The pattern of a cell says its role without any colour.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output.layer_map import (
    COPY,
    ORIGINAL,
    ROLES,
    counts,
    layer_map,
    legible,
    letter,
    model_names,
    roles,
    shorten,
)

WIDTH = 760
_LEFT, _TOP = 44, 4


@dataclass(frozen=True)
class _Grid:
    """Where cells stand: `group` of them, then a gap of `gap`."""

    most: int
    per_row: int
    group: int
    gap: float
    step: float
    row: float
    width: float
    height: float
    corner: float
    fineness: float
    labelled: bool = False
    rows_by_label: int = 1

    def place(self, index: int) -> tuple[float, float]:
        """The upper left corner of a cell."""
        row, column = divmod(index, self.per_row)
        return _LEFT + column * self.step + column // self.group * self.gap, row * self.row


_GRIDS = (
    _Grid(240, 20, 5, 4, 35, 31, 32, 26, 5, 1, labelled=True),
    _Grid(1_000, 50, 10, 3, 14, 18, 12, 14, 2.5, 0.7),
    _Grid(10_000, 100, 10, 1.5, 7, 11, 6, 9, 0, 0.5, rows_by_label=5),
)
"""Cells with text, and two sizes without, for models too deep for it."""


@dataclass(frozen=True)
class _Colour:
    """The colour of a model or role.

    Attributes:
        fill: Of the cell of an original.
        ink: For text on it.
        line: For outlines, which must be seen on a white page and on a dark one.
    """

    fill: str
    ink: str
    line: str

    def mixed(self, share: float) -> str:
        """So much of the fill, and white for the rest."""
        parts = (int(self.fill[i : i + 2], 16) for i in (1, 3, 5))
        return "#" + "".join(f"{round(255 + (part - 255) * share):02x}" for part in parts)


_WHITE, _BLACK = "#ffffff", "#14181f"
_COLOURS = (
    _Colour("#4477aa", _WHITE, "#4477aa"),
    _Colour("#ee6677", _BLACK, "#e05566"),
    _Colour("#ccbb44", _BLACK, "#95872a"),
    _Colour("#228833", _WHITE, "#228833"),
    _Colour("#66ccee", _BLACK, "#2d90b4"),
    _Colour("#aa3377", _WHITE, "#b5407f"),
    _Colour("#bbbbbb", _BLACK, "#808080"),
    _Colour("#332288", _WHITE, "#6f60c4"),
)
"""Paul Tol's bright scheme, safe for the colour-blind, and an indigo of his muted one."""

_GREY = _Colour("#737a84", _WHITE, "#737a84")
"""Of all greys that which has most contrast, 4:1, to a white page and to a dark one."""


def picture(
    layout: Layout,
    identities: Collection[int] = (),
    names: Sequence[str] = (),
    title: str | None = None,
) -> str:
    """The layers as an SVG file, the same bytes for the same layout.

    A cell for each layer holds the index of its source, with several models their letter before
    it. There are 20 in a row. Beyond 240 layers the cells are smaller and hold nothing.

    Args:
        layout: The layers.
        identities: The indices of the new layers that pass their input on unchanged.
        names: What to call each of the layout's models, in their order; none, as it has them.
        title: A heading.
    """
    called = model_names(layout, names)
    grid = next((grid for grid in _GRIDS if len(layout) <= grid.most), _GRIDS[-1])
    top = float(_TOP)
    body: list[str] = []
    if title:
        said = shorten(legible(title), WIDTH - 6 - _LEFT, lambda text: _wide(text, 16))
        place = f'x="{_LEFT}" y="{_n(top + 16)}"'
        body.append(f'<text {place} font-size="16" font-weight="600">{escape(said)}</text>')
        top += 32
    body.append(f'<g transform="translate(0 {_n(top)})">')
    body += _cells(layout, identities, grid)
    body.append("</g>")
    top += -(-len(layout) // grid.per_row) * grid.row + 10
    legend, height = _legend(layout, identities, called, top)
    used = {_colour(i, role, len(called)) for i, role in _kinds(layout, identities)}
    if len(called) > 1:
        used.add(_GREY)
    size = f'width="{WIDTH}" height="{_n(height)}" viewBox="0 0 {WIDTH} {_n(height)}"'
    text = f'font-family="system-ui, sans-serif" fill="{_GREY.fill}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {text}>',
            f"<title>{escape(legible(title or 'Layers of the new model'))}</title>",
            f"<desc>{escape(_description(layout, identities, called))}</desc>",
            "<defs>",
            *(_hatching(colour) for colour in (*_COLOURS, _GREY) if colour in used),
            "</defs>",
            *body,
            *legend,
            "</svg>\n",
        ]
    )


def _kinds(layout: Layout, identities: Collection[int]) -> list[tuple[int, str]]:
    """The number of each layer's model, and its role."""
    models = {model: i for i, model in enumerate(layout.models)}
    return [
        (models[layer.model], role)
        for layer, role in zip(layout.layers, roles(layout, identities), strict=True)
    ]


def _colour(model: int, role: str, models: int) -> _Colour:
    """With one model only, colour is free to set the new layers apart."""
    if models == 1:
        return _COLOURS[0 if role == ORIGINAL else 1]
    return _COLOURS[model % len(_COLOURS)]


def _hatching(colour: _Colour) -> str:
    return (
        f'<pattern id="hatch-{colour.fill[1:]}" width="6" height="6" '
        'patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="6" height="6" fill="{colour.mixed(0.2)}"/>'
        f'<rect width="2.5" height="6" fill="{colour.mixed(0.5)}"/></pattern>'
    )


def _style(colour: _Colour, role: str, fineness: float = 1) -> tuple[str, str, float]:
    """The attributes of a cell, the colour of text on it, and how wide its outline is."""
    wide = {ORIGINAL: 1, COPY: 2}.get(role, 1.5) * fineness
    outline = f'stroke="{colour.line}" stroke-width="{_n(wide)}"'
    if role == ORIGINAL:
        return f'fill="{colour.fill}" {outline}', colour.ink, wide
    if role == COPY:
        return f'fill="url(#hatch-{colour.fill[1:]})" {outline}', _BLACK, wide
    dashes = f'stroke-dasharray="{_n(4 * fineness)} {_n(2.5 * fineness)}"'
    return f'fill="none" {outline} {dashes}', _GREY.fill, wide


def _cells(layout: Layout, identities: Collection[int], grid: _Grid) -> Iterator[str]:
    several = len(layout.models) > 1
    alike: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    for index, kind in enumerate(_kinds(layout, identities)):
        alike[kind].append(index)
    labels = range(0, len(layout), grid.per_row * grid.rows_by_label)
    yield '<g font-size="11" text-anchor="end">'
    for index in labels:
        y = grid.place(index)[1] + grid.height / 2 + 4
        yield f'<text x="{_LEFT - 10}" y="{_n(y)}">{index}</text>'
    yield "</g>"
    for model, role in sorted(alike, key=lambda kind: (kind[0], ROLES.index(kind[1]))):
        style, ink, line = _style(_colour(model, role, len(layout.models)), role, grid.fineness)
        yield f"<g {style}>"
        yield from _rectangles([grid.place(index) for index in alike[model, role]], grid, line)
        yield "</g>"
        if not grid.labelled:
            continue
        yield f'<g fill="{ink}" font-size="{_n(_FONT)}" font-weight="600" text-anchor="middle">'
        for index in alike[model, role]:
            x, y = grid.place(index)
            before = letter(model) if several else ""
            source = str(layout.layers[index].source)
            font = _FONTS.get(len(before + source), 7.5)
            size = "" if font == _FONT else f' font-size="{_n(font)}"'
            if before and role == ORIGINAL:  # on other cells, thin figures are hard to read
                source = f'<tspan font-weight="400">{source}</tspan>'
            x, y = x + grid.width / 2, y + grid.height / 2 + font * 0.355
            yield f'<text x="{_n(x)}" y="{_n(y)}"{size}>{before}{source}</text>'
        yield "</g>"


def _rectangles(places: Sequence[tuple[float, float]], grid: _Grid, line: float) -> Iterator[str]:
    """Cells whose outlines stay inside their places."""
    width, height = _n(grid.width - line), _n(grid.height - line)
    corners = [(_n(x + line / 2), _n(y + line / 2)) for x, y in places]
    if grid.corner:
        size = f'width="{width}" height="{height}" rx="{_n(grid.corner)}"'
        yield from (f'<rect x="{x}" y="{y}" {size}/>' for x, y in corners)
    else:  # thousands of them, in a quarter of the bytes
        yield f'<path d="{"".join(f"M{x} {y}h{width}v{height}h-{width}z" for x, y in corners)}"/>'


_FONT = 12.0
_FONTS = {1: _FONT, 2: _FONT, 3: _FONT, 4: 10.5, 5: 9.0}
"""By the number of characters, so that they fit into a cell in any font."""


_MOST_NAMES = 40
"""Models that the legend names."""


def _legend(
    layout: Layout, identities: Collection[int], called: Sequence[str], top: float
) -> tuple[list[str], float]:
    """What the cells mean, and where the picture ends below it."""
    several = len(called) > 1
    lines = ['<g font-size="13">']
    x = float(_LEFT)
    for role, words in counts(layout, identities).items():
        colour = _GREY if several else _colour(0, role, 1)
        lines += [_swatch(x, top, colour, role), _text(x + 32, top, words)]
        x += 32 + _wide(words) + 20
    numbered = len(layout) <= _GRIDS[0].most
    if several:
        caption = "A7 is layer 7 of model A" if numbered else ""
    else:
        caption = f"{'numbers are layers of' if numbered else 'from'} {''.join(called)}"
    room = WIDTH - 6 - x
    if _wide(caption) > room:
        top, x, room = top + 26, float(_LEFT), WIDTH - 6.0 - _LEFT
        lines.append(_text(x, top, shorten(caption, room, _wide)))
    elif caption:
        lines.append(_text(WIDTH - 6, top, caption, ' text-anchor="end"'))
    top += 26
    if several:
        in_columns = 1 if len(called) <= 3 else 2  # noqa: PLR2004 - a few long names
        across = (WIDTH - 6 - _LEFT) / in_columns
        shown = called[:_MOST_NAMES]
        per_column = -(-len(shown) // in_columns)
        for i, name in enumerate(shown):
            column, row = divmod(i, per_column)
            x, y = _LEFT + column * across, top + row * 24
            lines.append(_swatch(x, y, _colour(i, ORIGINAL, len(called)), ORIGINAL, letter(i)))
            lines.append(_text(x + 32, y, shorten(name, across - 44, _wide)))
        top += per_column * 24
        if len(called) > len(shown):
            lines.append(_text(_LEFT, top, f"and {len(called) - len(shown)} more models"))
            top += 24
    return [*lines, "</g>"], top


def _swatch(x: float, y: float, colour: _Colour, role: str, text: str = "") -> str:
    style, ink, line = _style(colour, role)
    size = f'width="{_n(24 - line)}" height="{_n(18 - line)}"'
    cell = f'<rect x="{_n(x + line / 2)}" y="{_n(y + line / 2)}" {size} rx="4" {style}/>'
    if text:
        cell += (
            f'<text x="{_n(x + 12)}" y="{_n(y + 13)}" fill="{ink}" font-size="11" '
            f'font-weight="600" text-anchor="middle">{text}</text>'
        )
    return cell


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{_n(x)}" y="{_n(y + 13.5)}"{attributes}>{escape(text)}</text>'


def _description(layout: Layout, identities: Collection[int], called: Sequence[str]) -> str:
    """The picture in words, for those who do not see it."""
    said = ", ".join(counts(layout, identities).values())
    brackets = ", new ones in brackets" if layout.new_layers else ""
    words = f"{len(layout)} layers: {said}. In order{brackets}: {layer_map(layout, identities)}."
    if len(called) == 1:
        return f"{words} From {shorten(called[0], 100, len)}."
    models = [f"{letter(i)} {shorten(name, 100, len)}" for i, name in enumerate(called)]
    more = f"; {len(models) - _MOST_NAMES} more" if len(models) > _MOST_NAMES else ""
    return f"{words} Models: {'; '.join(models[:_MOST_NAMES])}{more}."


def _wide(text: str, size: float = 13) -> float:
    """How wide a text is, on the safe side: fonts differ."""

    def em(char: str) -> float:
        if unicodedata.east_asian_width(char) in "WF":
            return 1.05
        if char in "mwMW@%":
            return 0.95
        return 0.72 if char.isupper() else 0.6

    return size * sum(em(char) for char in text)


def _n(number: float) -> str:
    """A number as short as can be."""
    return f"{number:.2f}".rstrip("0").rstrip(".")
