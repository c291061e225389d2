"""Draw a layout as an SVG file: the picture of a model card.

An `<img>` cannot detect whether its page is light or dark. The picture therefore has no background:
text and outlines have medium lightness, and cells have their own background. The pattern of a cell
shows its role without colour.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from mergekit_interleave.errors import DirectiveError, OutputError
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.layout.roles import COPY, MOVED, ORIGINAL, ROLES, SCALED, ZEROED, roles
from mergekit_interleave.output.layer_map import (
    counts,
    layer_map,
    legible,
    letter,
    model_names,
    shorten,
)

WIDTH = 760
_LEFT, _TOP = 44, 4


@dataclass(frozen=True)
class _Grid:
    """The positions and sizes of the cells.

    Attributes:
        per_row: The number of cells in a row.
        group: The number of cells after which there is a gap.
        gap: The width of that gap.
        step: The distance between the left edges of neighbouring cells.
        row: The distance between the upper edges of neighbouring rows.
        width: The width of a cell.
        height: The height of a cell.
        stroke: The factor for the widths of outlines.
    """

    per_row: int
    group: int
    gap: float
    step: float
    row: float
    width: float
    height: float
    stroke: float

    def place(self, index: int) -> tuple[float, float]:
        """Return the upper left corner of a cell."""
        row, column = divmod(index, self.per_row)
        return _LEFT + column * self.step + column // self.group * self.gap, row * self.row


_LABELLED = _Grid(20, 5, 4, 35, 31, 32, 26, 1)
_SMALL = _Grid(100, 10, 1.5, 7, 12, 6, 10, 0.5)
"""The cells with text, and those without, for more than `_MOST_LABELLED` layers."""

_MOST_LABELLED = 240
"""The maximum number of layers whose cells contain text."""


@dataclass(frozen=True)
class _Colour:
    """The colour of a model or role.

    Attributes:
        fill: The fill of an original's cell.
        ink: The colour of text on the fill.
        line: The colour of outlines, visible on a white page and on a dark one.
    """

    fill: str
    ink: str
    line: str

    def mixed(self, share: float) -> str:
        """Return the colour with this share of the fill, mixed with white."""
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
"""Paul Tol's bright scheme, which is colour-blind safe, and indigo from his muted scheme."""

GREY = _Colour("#737a84", _WHITE, "#737a84")
"""The grey with the highest contrast, 4:1, against both a white page and a dark one."""


def picture(
    layout: Layout,
    identities: Collection[int] = (),
    names: Sequence[str] = (),
    title: str | None = None,
) -> str:
    """Draw the layers; the same layout gives the same bytes.

    The cell of a layer shows the index of its source layer, preceded by the letter of its model if
    there are several; that of a mean shows both, as `4+5`. A row has 20 cells. With more than 240
    layers, a row has 100 small cells without text.

    Args:
        layout: The layers.
        identities: The indices of the new layers that pass their input on unchanged.
        names: The name of each model of the layout; if empty, the names in the layout are used.
        title: A heading.
    """
    names = model_names(layout, names)
    grid = _LABELLED if len(layout) <= _MOST_LABELLED else _SMALL
    top = float(_TOP)
    body: list[str] = []
    if title:
        heading = shorten(legible(title), WIDTH - 6 - _LEFT, lambda text: text_width(text, 16))
        place = f'x="{_LEFT}" y="{brief(top + 16)}"'
        body.append(f'<text {place} font-size="16" font-weight="600">{escape(heading)}</text>')
        top += 32
    body.append(f'<g transform="translate(0 {brief(top)})">')
    body += _cells(layout, identities, grid)
    body.append("</g>")
    top += -(-len(layout) // grid.per_row) * grid.row + 10
    legend, height = _legend(layout, identities, names, top)
    used = {_colour(i, role, len(names)) for i, role in _kinds(layout, identities)}
    if len(names) > 1:
        used.add(GREY)
    size = f'width="{WIDTH}" height="{brief(height)}" viewBox="0 0 {WIDTH} {brief(height)}"'
    text = f'font-family="system-ui, sans-serif" fill="{GREY.fill}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {text}>',
            f"<title>{escape(legible(title or 'Layers of the new model'))}</title>",
            f"<desc>{escape(_description(layout, identities, names))}</desc>",
            "<defs>",
            *(_hatching(colour) for colour in (*_COLOURS, GREY) if colour in used),
            "</defs>",
            *body,
            *legend,
            "</svg>\n",
        ]
    )


_LONGEST_HEAD = 1 << 16
_HEAD = re.compile(
    r'<svg xmlns="[^"]*" width="760" [^>]*role="img"[^>]*>\n<title>[^\n]*</title>\n'
    r"<desc>\d+ layers: "
)


def check_file(file: Path) -> None:
    """Check that a picture may be written to a file: it is missing, empty, or such a picture.

    Raises:
        DirectiveError: Its name says that it is no SVG.
        OutputError: It exists and is something else.
    """
    if file.suffix.lower() not in ("", ".svg"):
        raise DirectiveError(
            f"--svg: {str(file)!r} ends in {file.suffix}, and the picture is an SVG",
            hint=f"--svg {file.with_suffix('.svg')}",
        )
    if not file.is_file() or file.stat().st_size == 0:
        return
    with file.open("rb") as opened:
        start = opened.read(_LONGEST_HEAD).decode(errors="replace")
    if _HEAD.match(start) is None:
        raise OutputError(
            f"{file}: exists, and is not a picture of this program",
            hint="name another file, or remove this one",
        )


def _kinds(layout: Layout, identities: Collection[int]) -> list[tuple[int, str]]:
    """Return, for each layer, the index of its model and its role."""
    models = {model: i for i, model in enumerate(layout.models)}
    return [
        (models[layer.model], role)
        for layer, role in zip(layout.layers, roles(layout, identities), strict=True)
    ]


def _colour(model: int, role: str, models: int) -> _Colour:
    """Return a colour that shows the model or, with a single model, whether a layer is new."""
    if models == 1:
        return _COLOURS[1 if role in (COPY, ZEROED) else 0]
    return _COLOURS[model % len(_COLOURS)]


def _hatching(colour: _Colour) -> str:
    return (
        f'<pattern id="hatch-{colour.fill[1:]}" width="6" height="6" '
        'patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="6" height="6" fill="{colour.mixed(0.2)}"/>'
        f'<rect width="2.5" height="6" fill="{colour.mixed(0.5)}"/></pattern>'
    )


def _style(colour: _Colour, role: str, stroke: float = 1) -> tuple[str, str, float]:
    """Return the attributes of a cell, the colour of its text, and the width of its outline."""
    wide = {ORIGINAL: 1, COPY: 2}.get(role, 1.5) * stroke
    outline = f'stroke="{colour.line}" stroke-width="{brief(wide)}"'
    if role == ORIGINAL:
        return f'fill="{colour.fill}" {outline}', colour.ink, wide
    if role == COPY:
        return f'fill="url(#hatch-{colour.fill[1:]})" {outline}', _BLACK, wide
    if role == SCALED:
        return f'fill="{colour.mixed(0.35)}" {outline}', _BLACK, wide
    if role == MOVED:
        inner = f'stroke="{colour.ink}" stroke-width="{brief(wide)}"'
        dots = f'stroke-dasharray="{brief(2 * stroke)}"'
        return f'fill="{colour.fill}" {inner} {dots}', colour.ink, wide
    dashes = f'stroke-dasharray="{brief(4 * stroke)} {brief(2.5 * stroke)}"'
    return f'fill="none" {outline} {dashes}', GREY.fill, wide


def _cells(layout: Layout, identities: Collection[int], grid: _Grid) -> Iterator[str]:
    several = len(layout.models) > 1
    alike: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    for index, kind in enumerate(_kinds(layout, identities)):
        alike[kind].append(index)
    yield '<g font-size="11" text-anchor="end">'
    for index in range(0, len(layout), grid.per_row):
        y = grid.place(index)[1] + grid.height / 2 + 4
        yield f'<text x="{_LEFT - 10}" y="{brief(y)}">{index}</text>'
    yield "</g>"
    for model, role in sorted(alike, key=lambda kind: (kind[0], ROLES.index(kind[1]))):
        style, ink, line = _style(_colour(model, role, len(layout.models)), role, grid.stroke)
        yield f"<g {style}>"
        yield from _rectangles([grid.place(index) for index in alike[model, role]], grid, line)
        yield "</g>"
        if grid is not _LABELLED:
            continue
        yield f'<g fill="{ink}" font-size="{brief(_FONT)}" font-weight="600" text-anchor="middle">'
        for index in alike[model, role]:
            x, y = grid.place(index)
            before = letter(model) if several else ""
            layer = layout.layers[index]
            source = str(layer.source) + (f"+{layer.mean_with}" if layer.mean_with else "")
            font = _FONTS.get(len(before + source), 7.5)
            size = "" if font == _FONT else f' font-size="{brief(font)}"'
            if before and role == ORIGINAL:  # thin digits are hard to read on other cells
                source = f'<tspan font-weight="400">{source}</tspan>'
            x, y = x + grid.width / 2, y + grid.height / 2 + font * 0.355
            yield f'<text x="{brief(x)}" y="{brief(y)}"{size}>{before}{source}</text>'
        yield "</g>"


def _rectangles(places: Sequence[tuple[float, float]], grid: _Grid, line: float) -> Iterator[str]:
    """Draw cells whose outlines stay within their places."""
    width, height = brief(grid.width - line), brief(grid.height - line)
    corners = [(brief(x + line / 2), brief(y + line / 2)) for x, y in places]
    if grid is _LABELLED:
        size = f'width="{width}" height="{height}" rx="5"'
        yield from (f'<rect x="{x}" y="{y}" {size}/>' for x, y in corners)
    else:  # one path takes a quarter of the bytes
        yield f'<path d="{"".join(f"M{x} {y}h{width}v{height}h-{width}z" for x, y in corners)}"/>'


_FONT = 12.0
_FONTS = {1: _FONT, 2: _FONT, 3: _FONT, 4: 10.5, 5: 9.0}
"""The font size for each number of characters, so that they fit into a cell in any font."""

_MOST_NAMES = 40
"""The maximum number of models that the legend names."""


def _legend(
    layout: Layout, identities: Collection[int], names: Sequence[str], top: float
) -> tuple[list[str], float]:
    """Return the legend, and the height of the picture."""
    several = len(names) > 1
    lines = ['<g font-size="13">']
    x = float(_LEFT)
    for role, words in counts(layout, identities).items():
        colour = GREY if several else _colour(0, role, 1)
        lines += [_swatch(x, top, colour, role), _text(x + 32, top, words)]
        x += 32 + text_width(words) + 20
    caption = _caption(layout, names)
    room = WIDTH - 6 - x
    if text_width(caption) > room:
        top, x, room = top + 26, float(_LEFT), WIDTH - 6.0 - _LEFT
        lines.append(_text(x, top, shorten(caption, room, text_width)))
    elif caption:
        lines.append(_text(WIDTH - 6, top, caption, ' text-anchor="end"'))
    top += 26
    if several:
        in_columns = 1 if len(names) <= 3 else 2  # noqa: PLR2004 - a few long names
        across = (WIDTH - 6 - _LEFT) / in_columns
        shown = names[:_MOST_NAMES]
        per_column = -(-len(shown) // in_columns)
        for i, name in enumerate(shown):
            column, row = divmod(i, per_column)
            x, y = _LEFT + column * across, top + row * 24
            lines.append(_swatch(x, y, _colour(i, ORIGINAL, len(names)), ORIGINAL, letter(i)))
            lines.append(_text(x + 32, y, shorten(name, across - 44, text_width)))
        top += per_column * 24
        if len(names) > len(shown):
            lines.append(_text(_LEFT, top, f"and {len(names) - len(shown)} more models"))
            top += 24
    return [*lines, "</g>"], top


def _caption(layout: Layout, names: Sequence[str]) -> str:
    """Say what the numbers at the left and in the cells are, by the last cell if models differ."""
    last, numbered = layout.layers[-1], len(layout) <= _MOST_LABELLED
    if len(names) == 1:
        cells = f"{'in cells: layers of' if numbered else 'from'} {''.join(names)}"
    else:
        model = letter(layout.models.index(last.model))
        cells = f"{model}{last.source}: layer {last.source} of {model}" if numbered else ""
    return "; ".join(filter(None, ("left: new index", cells)))


def _swatch(x: float, y: float, colour: _Colour, role: str, text: str = "") -> str:
    style, ink, line = _style(colour, role)
    size = f'width="{brief(24 - line)}" height="{brief(18 - line)}"'
    cell = f'<rect x="{brief(x + line / 2)}" y="{brief(y + line / 2)}" {size} rx="4" {style}/>'
    if text:
        cell += (
            f'<text x="{brief(x + 12)}" y="{brief(y + 13)}" fill="{ink}" font-size="11" '
            f'font-weight="600" text-anchor="middle">{text}</text>'
        )
    return cell


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{brief(x)}" y="{brief(y + 13.5)}"{attributes}>{escape(text)}</text>'


def _description(layout: Layout, identities: Collection[int], names: Sequence[str]) -> str:
    """Describe the picture in words, for screen readers."""
    numbers = ", ".join(counts(layout, identities).values())
    brackets = ", new ones in brackets" if layout.new_layers else ""
    words = f"{len(layout)} layers: {numbers}. In order{brackets}: {layer_map(layout, identities)}."
    if len(names) == 1:
        return f"{words} From {shorten(names[0], 100, len)}."
    models = [f"{letter(i)} {shorten(name, 100, len)}" for i, name in enumerate(names)]
    more = f"; {len(models) - _MOST_NAMES} more" if len(models) > _MOST_NAMES else ""
    return f"{words} Models: {'; '.join(models[:_MOST_NAMES])}{more}."


def text_width(text: str, size: float = 13) -> float:
    """Estimate the maximum width of a text, since fonts differ."""

    def em(char: str) -> float:
        if unicodedata.east_asian_width(char) in "WF":
            return 1.05
        if char in "mwMW@%":
            return 0.95
        return 0.72 if char.isupper() else 0.6

    return size * sum(em(char) for char in text)


def brief(number: float) -> str:
    """Format a number as briefly as possible."""
    return f"{number:.2f}".rstrip("0").rstrip(".")
