"""Differences are drawn as a heat map."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.scanning import heat_map as heat_maps
from mergekit_interleave.scanning.heat_map import BLOCKS, DROPS, TIMES, Axes, Place, heat_map

NAMESPACE = "{http://www.w3.org/2000/svg}"


def parsed(text: str) -> ET.Element:
    """Parse a picture from its bytes."""
    return ET.fromstring(text.encode())  # noqa: S314 - our own output


def drawn(text: str) -> dict[tuple[int, int], str]:
    """Return the colour of each cell, by column and row."""
    found = {}
    for path in parsed(text).iter(f"{NAMESPACE}path"):
        if path.get("fill") != "none":
            for x, y in re.findall(r"M(\d+) (\d+)h[\d.]+v[\d.]+h-[\d.]+z", path.get("d", "")):
                found[int(x), int(y)] = path.get("fill", "")
    return found


def words(text: str) -> list[str]:
    """Return all texts of a picture."""
    return [element.text or "" for element in parsed(text).iter(f"{NAMESPACE}text")]


def draw(cells: dict[Place, float], layers: int, axes: Axes = BLOCKS) -> str:
    """Draw a map with a fixed title and legend."""
    return heat_map(cells, layers=layers, title="All blocks", legend=["nats"], axes=axes)


def triangle(layers: int) -> list[Place]:
    """Return all ranges of layers."""
    return [(i, j) for i in range(layers) for j in range(i + 1, layers + 1)]


def grey(colour: str) -> float:
    """Return the relative luminance that the Web Content Accessibility Guidelines define."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                        for c in channels)  # fmt: skip
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@given(
    st.dictionaries(st.sampled_from(triangle(9)), st.floats()),
    st.text(),
    st.lists(st.text(), max_size=3),
    st.sampled_from([BLOCKS, DROPS, TIMES]),
)
def test_any_values_and_words_make_a_valid_file(
    cells: dict[Place, float], title: str, legend: list[str], axes: Axes
) -> None:
    """A picture of any values and words has each cell once, and runs and loads nothing."""
    helps = next(iter(cells), None)
    text = heat_map(cells, layers=9, title=title, legend=legend, axes=axes, helps=helps)
    root = parsed(text)
    known = {"svg", "title", "desc", "g", "rect", "path", "text"}
    assert {element.tag.removeprefix(NAMESPACE) for element in root.iter()} <= known
    attributes = {name for element in root.iter() for name in element.keys()}  # noqa: SIM118
    assert not any(re.match("on|href|style|.*:", name) for name in attributes)
    assert len(drawn(text)) == sum(map(math.isfinite, cells.values()))


def test_hostile_words_are_text() -> None:
    """Markup in the words is shown as text, and characters that XML forbids are replaced."""
    title, legend = "</text><script>&\x00", "<b>&\x07 " + "x" * 10**4
    text = heat_map({(0, 1): 1.0}, layers=1, title=title, legend=[legend])
    assert words(text)[0] == "</text><script>&\N{REPLACEMENT CHARACTER}"
    assert "<b>&\N{REPLACEMENT CHARACTER}" in " ".join(words(text))
    assert max(map(len, words(text))) < 120


def test_lightness_rises_with_the_value() -> None:
    """Without colour, a better cell is lighter, and no difference is in the middle."""
    sizes = [0.0, *(2.0**k for k in range(6))]
    values = sorted({*sizes, *(-size for size in sizes)})
    colours = drawn(draw({(i, i + 1): value for i, value in enumerate(values)}, len(values)))
    shades = [grey(colours[i, i]) for i in range(len(values))]
    assert shades == sorted(shades)
    assert len(set(shades)) > len(values) / 2
    ramp = [*reversed(heat_maps._WORSE), heat_maps._ZERO, *heat_maps._BETTER]  # noqa: SLF001
    assert all(dark < light for dark, light in pairwise(map(grey, ramp)))
    assert colours[6, 6] == heat_maps._ZERO  # noqa: SLF001


def test_cells_are_placed_by_start_and_end() -> None:
    """The cell of a block is in the column of its first layer and the row of its end."""
    assert drawn(draw({(3, 7): 1.0}, 9)).keys() == {(3, 6)}
    assert drawn(draw({(3, 2): 1.0, (4, 8): 1.0}, 9, TIMES)).keys() == {(3, 0), (4, 6)}


@pytest.mark.parametrize("place", [(3, 3), (4, 3), (-1, 2), (0, 10)])
def test_a_cell_outside_of_the_map_is_an_error(place: Place) -> None:
    """A range that is empty or beyond the layers is refused."""
    with pytest.raises(ValueError, match="of a map of 9 layers"):
        draw({place: 1.0}, 9)


def test_an_outlier_leaves_the_other_colours_as_they_are() -> None:
    """One huge value changes no colour of the others, and the legend names it."""
    cells = {place: math.sin(i) for i, place in enumerate(triangle(30))}
    plain, spoiled = draw(cells, 30), draw({**cells, (0, 30): -1e9}, 30)
    before, after = drawn(plain), drawn(spoiled)
    assert {place for place in before if before[place] != after[place]} <= {(0, 29)}
    assert any("\N{MINUS SIGN}1,000,000,000 at 0:30" in line for line in words(spoiled))


def test_a_small_gain_among_large_losses_has_its_own_colour() -> None:
    """Gains of a hundredth of the usual loss are not drawn as no difference."""
    cells = dict.fromkeys(triangle(20), -300.0) | {(8, 11): 2.0, (9, 12): 3.0}
    found = drawn(draw(cells, 20))
    assert {found[8, 10], found[9, 11]} <= {*heat_maps._BETTER}  # noqa: SLF001


def test_the_legend_has_the_numbers_of_the_colours() -> None:
    """The numbers below the colours are round, and alike on both sides of 0."""
    text = draw({place: 0.1 * i for i, place in enumerate(triangle(12))}, 12)
    bounds = [word for word in words(text) if re.fullmatch("[+\N{MINUS SIGN}][\\d.,]+", word)]
    assert [word[1:] for word in bounds[:6]] == [word[1:] for word in reversed(bounds[6:])]
    assert all(word.strip("+\N{MINUS SIGN}0.,") in "125" for word in bounds)
    assert bounds[-1] == "+5"


def test_missing_broken_and_outlined_cells() -> None:
    """A missing cell stays empty, a broken one is crossed, one that helps is outlined."""
    cells = {(0, 1): math.nan, (1, 2): -math.inf, (2, 3): 1.0}
    text = heat_map(cells, layers=4, title="", legend=["nats"], helps=(2, 3))
    assert drawn(text).keys() == {(2, 2)}
    crosses = [p for p in parsed(text).iter(f"{NAMESPACE}path") if "l" in p.get("d", "")]
    assert [path.get("d", "").count("M") for path in crosses] == [2]
    assert any(line.startswith("Crossed: 2 ") for line in words(text))
    assert any(line.startswith("Outlined: 2:3 ") for line in words(text))
    assert not any(re.match("Crossed|Outlined", line) for line in words(draw({(0, 1): 1.0}, 4)))


def test_layouts_without_any_difference() -> None:
    """If all differences are 0, there is one colour and no number."""
    text = draw(dict.fromkeys(triangle(5), 0.0), 5)
    assert {*drawn(text).values()} == {heat_maps._ZERO}  # noqa: SLF001
    assert "no difference" in words(text)
    assert "nothing was measured yet" in words(draw({}, 5))


@pytest.mark.parametrize(("layers", "limit"), [(30, 30_000), (80, 100_000), (126, 250_000)])
def test_the_file_is_small(layers: int, limit: int) -> None:
    """All blocks of a deep model fit into a file of moderate size, in any order of the cells."""
    cells = {place: math.sin(i) * 100 for i, place in enumerate(triangle(layers))}
    text = draw(cells, layers)
    assert len(text.encode()) < limit
    assert text == draw(dict(reversed(cells.items())), layers)
