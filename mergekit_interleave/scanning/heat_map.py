"""Draw the differences of many layouts as an SVG file, one cell a layout.

The lightness of a cell rises with its value, so that the picture has the same meaning without
colour. As in `output.svg`, there is no background, and text is legible on light and dark pages.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import TypeAlias
from xml.sax.saxutils import escape

from mergekit_interleave.output.layer_map import legible, shorten
from mergekit_interleave.output.svg import GREY, WIDTH, brief, text_width

Place: TypeAlias = tuple[int, int]
"""The numbers of a cell: across, and down."""


@dataclass(frozen=True)
class Axes:
    """What the numbers of a cell are.

    Attributes:
        across: The first number in words; it is below the number of layers.
        down: The second number in words.
        cell: A cell in words, with two places for the numbers.
        ranges: Whether the numbers are the start and the end of a range of layers.
    """

    across: str
    down: str
    cell: str = "{}:{}"
    ranges: bool = True


BLOCKS = Axes("first layer of the block", "end of the block: the layer after its last one")
DROPS = Axes("first layer left out", "end of what is left out: the next layer that is kept")
TIMES = Axes("layer", "number of times that it runs", "layer {}, {} times", ranges=False)
WINDOWS = Axes(
    "layers in a window",
    "layers from the start of a window to the next",
    "windows of {} layers, every {} layers",
    ranges=False,
)

_BETTER = ("#a99275", "#c79c60", "#e4a645", "#eeba48", "#f6cd4b", "#ffe14d")
_WORSE = ("#667a9a", "#4a6b9d", "#2f5a9d", "#274a8e", "#203a7f", "#1a2a70")
_ZERO = "#85888e"
"""The colours by size. Their lightness in OKLab rises in equal steps from worst to best."""

_LADDERS = ((1, 2, 5), (1, 3), (1,))
"""The leading digits of the bounds of colours, from the narrowest range of sizes to the widest."""

_TOP_SHARE, _LEAST_SHARE = 0.9, 0.1
"""The shares of differences that are smaller than the largest bound, and than the smallest."""

_NEGLIGIBLE = 1e-3
"""The size of differences, relative to the largest bound, that need no colour."""

_LEFT, _RIGHT, _FONT = 44, 6, 13
_COLUMNS = 96
"""The number of characters of a line of text, which fit in any font."""

_LARGEST_CELL, _LEAST_WITH_GAPS = 20, 10
_SWATCH = 40


@dataclass(frozen=True)
class _Grid:
    """The columns and rows, and the size of a cell."""

    across: range
    down: range
    cell: float

    @property
    def width(self) -> float:
        return len(self.across) * self.cell

    @property
    def height(self) -> float:
        return len(self.down) * self.cell

    def unit(self, place: Place) -> Place:
        """Return the column and the row of a cell."""
        return place[0] - self.across.start, place[1] - self.down.start


@dataclass
class _Drawing:
    """The lines of a picture, and the place below what was drawn."""

    lines: list[str] = field(default_factory=list)
    bottom: float = 4.0

    def heading(self, words: str) -> None:
        """Draw a heading, shortened at the edge of the picture, and move below it."""
        words = shorten(legible(words), WIDTH - _RIGHT - _LEFT, lambda text: text_width(text, 16))
        place = f'x="{_LEFT}" y="{brief(self.bottom + 18)}"'
        self.lines.append(f'<text {place} font-size="16" font-weight="600">{escape(words)}</text>')
        self.bottom += 30

    def text(self, words: str) -> None:
        """Draw a sentence on as many lines as it needs, and move below it."""
        for line in wrap(legible(words), _COLUMNS):
            place = f'x="{_LEFT}" y="{brief(self.bottom + 14)}"'
            self.lines.append(f"<text {place}>{escape(line)}</text>")
            self.bottom += 20


def heat_map(  # noqa: PLR0913 - what is drawn, and the words around it
    cells: Mapping[Place, float],
    *,
    layers: int,
    title: str,
    legend: Sequence[str],
    axes: Axes = BLOCKS,
    helps: Place | None = None,
) -> str:
    """Draw differences; the same values give the same bytes.

    Args:
        cells: The difference for each pair of numbers: start and end of a range, or layer and
            times. A value that is not finite is drawn as broken; a missing cell stays empty.
        layers: The number of layers of the base.
        title: A heading.
        legend: Lines of text; the first says what the values are, with their unit.
        axes: What the two numbers are.
        helps: The cell to outline: the layout that helps.

    Raises:
        ValueError: A cell is outside of the map.
    """
    grid = _grid(cells, layers, axes)
    finite = {place: value for place, value in cells.items() if math.isfinite(value)}
    bounds = _bounds(finite.values())
    drawn = _Drawing()
    drawn.heading(title)
    _draw_axes(drawn, grid, axes)
    drawn.lines.append(
        f'<g transform="translate({_LEFT} {brief(drawn.bottom)}) scale({brief(grid.cell)})">'
    )
    drawn.lines += _cells(finite, bounds, grid)
    drawn.lines += _marks(grid, axes, [p for p in cells if p not in finite], helps)
    drawn.lines.append("</g>")
    drawn.bottom += grid.height + 12
    _draw_legend(drawn, legend, bounds, finite.values())
    extremes = _extremes(finite, axes)
    for words in (extremes, *_keys(cells, finite, helps, axes), *legend[1:]):
        drawn.text(words)
    size = f'width="{WIDTH}" height="{brief(drawn.bottom)}"'
    view = f'viewBox="0 0 {WIDTH} {brief(drawn.bottom)}"'
    text = f'font-family="system-ui, sans-serif" font-size="{_FONT}" fill="{GREY.fill}"'
    described = legible(", ".join([f"{len(cells):,} cells", *legend[:1]]) + f". {extremes}")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view} role="img" {text}>',
            f"<title>{escape(legible(title))}</title>",
            f"<desc>{escape(described)}</desc>",
            *drawn.lines,
            "</svg>\n",
        ]
    )


def _grid(cells: Collection[Place], layers: int, axes: Axes) -> _Grid:
    seconds = [second for _, second in cells] or [1]
    down = range(1, layers + 1) if axes.ranges else range(min(seconds), max(seconds) + 1)
    grid = _Grid(range(layers), down, min(_LARGEST_CELL, (WIDTH - _LEFT - _RIGHT) / layers))
    for across, second in cells:
        if across not in grid.across or second not in down or (axes.ranges and second <= across):
            raise ValueError(f"cell ({across}, {second}) of a map of {layers} layers")
    return grid


# Sizes and their colours.


def _bounds(values: Iterable[float]) -> tuple[float, ...]:
    """Return round sizes at which colours change, smallest first; none if all values are 0.

    They are the same for better and worse. The largest follows from a quantile, so that a single
    outlier does not matter. The ladder is the narrowest that also shows small differences and
    typical gains.
    """
    known = [value for value in values if value]
    if not known:
        return ()
    sizes = sorted(map(abs, known))
    top = sizes[int(_TOP_SHARE * (len(sizes) - 1))]
    gains = sorted(value for value in known if value >= top * _NEGLIGIBLE)
    least = sizes[int(_LEAST_SHARE * (len(sizes) - 1))]
    if gains:
        least = min(least, gains[len(gains) // 2])
    for digits in _LADDERS:
        found = _ladder(top, digits)
        if found[0] <= least:
            break
    return found


def _ladder(top: float, digits: Sequence[int]) -> tuple[float, ...]:
    """Return the largest round numbers that are at most `top`, smallest first."""
    exponent = math.floor(math.log10(top))
    rungs = [
        float(f"{digit}e{power}")
        for power in range(exponent - len(_BETTER), exponent + 2)
        for digit in digits
    ]
    return tuple([rung for rung in rungs if rung <= top][-len(_BETTER) :])


def _colour(value: float, bounds: Sequence[float]) -> str:
    size = bisect_right(bounds, abs(value))
    if not size:
        return _ZERO
    return (_BETTER if value > 0 else _WORSE)[size - 1]


# The map.


def _cells(finite: Mapping[Place, float], bounds: Sequence[float], grid: _Grid) -> Iterator[str]:
    """Draw all cells of a colour as one path, in units of a cell."""
    alike: defaultdict[str, list[Place]] = defaultdict(list)
    for place, value in sorted(finite.items()):
        alike[_colour(value, bounds)].append(grid.unit(place))
    side = brief(1 - (1 / grid.cell if grid.cell >= _LEAST_WITH_GAPS else 0))
    edges = "" if grid.cell >= _LEAST_WITH_GAPS else ' shape-rendering="crispEdges"'
    for colour in (*reversed(_WORSE), _ZERO, *_BETTER):
        if colour in alike:
            squares = "".join(f"M{x} {y}h{side}v{side}h-{side}z" for x, y in alike[colour])
            yield f'<path fill="{colour}"{edges} d="{squares}"/>'


def _marks(
    grid: _Grid, axes: Axes, broken: Collection[Place], helps: Place | None
) -> Iterator[str]:
    """Draw the frame of the map, crosses of broken layouts, and the outline of one that helps."""
    thin = f'fill="none" stroke="{GREY.fill}" stroke-width="{brief(1 / grid.cell)}"'
    columns, rows = len(grid.across), len(grid.down)
    steps = "".join("h1v1" for _ in range(columns)) if axes.ranges else f"h{columns}v{rows}"
    yield f'<path {thin} d="M0 0{steps}H0z"/>'
    if broken:
        crosses = map(grid.unit, sorted(broken))
        lines = "".join(f"M{x}.2 {y}.2l.5.5m0-.5l-.5.5" for x, y in crosses)
        yield f'<path {thin} d="{lines}"/>'
    if helps is not None:
        x, y = grid.unit(helps)
        for colour, width in (("#ffffff", 5), ("#14181f", 2.5)):
            line = f'fill="none" stroke="{colour}" stroke-width="{brief(width / grid.cell)}"'
            yield f'<rect x="{x}" y="{y}" width="1" height="1" {line}/>'


def _draw_axes(drawn: _Drawing, grid: _Grid, axes: Axes) -> None:
    """Draw the words and numbers above the map and at its left."""
    drawn.text(f"across: {axes.across}")
    drawn.text(f"down: {axes.down}")
    drawn.bottom += 26
    top = drawn.bottom
    drawn.lines.append('<g font-size="11" text-anchor="middle">')
    for column, number in _ticks(grid.across, grid.cell):
        x = _LEFT + (column + 0.5) * grid.cell
        drawn.lines.append(f'<text x="{brief(x)}" y="{brief(top - 6)}">{number}</text>')
    drawn.lines.append('</g>\n<g font-size="11" text-anchor="end">')
    for row, number in _ticks(grid.down, grid.cell):
        y = top + (row + 0.5) * grid.cell + 4
        drawn.lines.append(f'<text x="{_LEFT - 8}" y="{brief(y)}">{number}</text>')
    drawn.lines.append("</g>")


def _ticks(numbers: range, cell: float) -> Iterator[tuple[int, int]]:
    """Yield the index and value of the numbers to write: multiples of a round number."""
    step = next(
        (step for step in (1, 2, 5, 10, 20, 50) if step * cell >= text_width("0000", 11)), 100
    )
    for index, number in enumerate(numbers):
        if number % step == 0:
            yield index, number


# The legend.


def _draw_legend(
    drawn: _Drawing, legend: Sequence[str], bounds: Sequence[float], values: Collection[float]
) -> None:
    """Draw what the values are, the colours in order, and the numbers at which they change."""
    if legend:
        drawn.text(legend[0])
        drawn.bottom += 4
    count = len(bounds)
    colours = [*_WORSE[:count][::-1], _ZERO, *_BETTER[:count]]
    top = brief(drawn.bottom)
    for i, colour in enumerate(colours):
        size = f'width="{_SWATCH - 1}" height="16"'
        place = f'x="{_LEFT + i * _SWATCH}" y="{top}"'
        drawn.lines.append(f'<rect {place} {size} fill="{colour}"/>')
    drawn.bottom += 30 if bounds else 16
    ends = [*(-bound for bound in reversed(bounds)), *bounds]
    drawn.lines.append('<g font-size="11" text-anchor="middle">')
    for i, bound in enumerate(ends):
        place = f'x="{brief(_LEFT + (i + 1) * _SWATCH - 0.5)}" y="{brief(drawn.bottom)}"'
        drawn.lines.append(f"<text {place}>{_signed(bound)}</text>")
    drawn.lines.append("</g>")
    middle, right = _LEFT + len(colours) * _SWATCH / 2, _LEFT + len(colours) * _SWATCH
    y = brief(drawn.bottom + 18)
    for x, anchor, words in _ends(middle, right, bounds, values):
        drawn.lines.append(f'<text x="{brief(x)}" y="{y}" text-anchor="{anchor}">{words}</text>')
    drawn.bottom += 26


def _ends(
    middle: float, right: float, bounds: Sequence[float], values: Collection[float]
) -> Iterator[tuple[float, str, str]]:
    """Yield the words below the colours, with their place."""
    if not bounds:
        yield _LEFT, "start", "no difference" if values else "nothing was measured yet"
        return
    yield _LEFT, "start", "worse than the base"
    yield middle, "middle", "about the same"
    yield right, "end", "better than the base"


def _extremes(finite: Mapping[Place, float], axes: Axes) -> str:
    """Say the lowest and the highest value, since the outer colours have no limit."""
    if not any(finite.values()):
        return ""
    low, high = min(finite, key=finite.__getitem__), max(finite, key=finite.__getitem__)
    words = [f"{_signed(finite[p])} at {_name(p, axes)}" for p in (low, high)]
    return f"The outer colours have no limit. Lowest: {words[0]}; highest: {words[1]}."


def _keys(
    cells: Collection[Place], finite: Collection[Place], helps: Place | None, axes: Axes
) -> Iterator[str]:
    """Yield what the marks mean."""
    if helps is not None:
        yield f"Outlined: {_name(helps, axes)} helps, also on the sequences that did not select it."
    if len(finite) < len(cells):
        yield f"Crossed: {len(cells) - len(finite):,} whose scores are not finite numbers."


def _name(place: Place, axes: Axes) -> str:
    return axes.cell.format(*place)


def _signed(value: float) -> str:
    sign = "+" if value > 0 else "\N{MINUS SIGN}" if value < 0 else ""
    digits = ".3g" if abs(value) < 999.5 else ",.0f"  # noqa: PLR2004 - rounds to 1000
    return f"{sign}{abs(value):{digits}}"
