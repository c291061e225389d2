"""The layer map is drawn as SVG."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_layouts import MODEL, OTHER, layouts, models

from mergekit_interleave.directive.growth import Every, Repeat
from mergekit_interleave.directive.scale import Scale
from mergekit_interleave.layout.layout import Layout, Slice, expand
from mergekit_interleave.output import layer_map as layer_maps
from mergekit_interleave.output import svg

NAMESPACE = "{http://www.w3.org/2000/svg}"
RELEASE = Path(__file__).parents[2] / "fixtures" / "data" / "release-0.1.0"
WHITE, DARK = "#ffffff", "#0d1117"


def parsed(text: str) -> ET.Element:
    """Parse a picture from its bytes."""
    return ET.fromstring(text.encode())  # noqa: S314 - our own output


def tags(root: ET.Element, name: str) -> list[ET.Element]:
    """Return all elements with a tag."""
    return list(root.iter(NAMESPACE + name))


def cells(root: ET.Element) -> list[ET.Element]:
    """Return the group of row indices, followed by the groups of cells."""
    (found,) = (group for group in tags(root, "g") if "transform" in group.keys())  # noqa: SIM118
    return list(found)


def rectangles(groups: list[ET.Element]) -> list[tuple[float, ...]]:
    """Return left, top, width and height of each cell, whether rectangle or part of a path."""
    found: list[tuple[float, ...]] = []
    for group in groups:
        found += [
            tuple(float(rect.get(key, "")) for key in ("x", "y", "width", "height"))
            for rect in tags(group, "rect")
        ]
        for path in tags(group, "path"):
            parts = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z", path.get("d", ""))
            found += [tuple(map(float, part)) for part in parts]
    return found


def luminance(colour: str) -> float:
    """Return the relative luminance that the Web Content Accessibility Guidelines define."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                        for c in channels)  # fmt: skip
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio that the guidelines define."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@given(layouts(), st.data(), st.none() | st.text())
def test_any_names_make_a_valid_file(
    drawn: tuple[Layout, set[int]], data: st.DataObject, title: str | None
) -> None:
    """A picture with any names has only elements that load and run nothing."""
    layout, identities = drawn
    names = data.draw(st.lists(st.text(), min_size=len(layout.models), max_size=len(layout.models)))
    text = svg.picture(layout, identities, names, title)
    root = parsed(text)
    known = {"svg", "title", "desc", "defs", "pattern", "g", "rect", "path", "text", "tspan"}
    assert {element.tag.removeprefix(NAMESPACE) for element in root.iter()} <= known
    attributes = {name for element in root.iter() for name in element.keys()}  # noqa: SIM118
    assert not any(re.match("on|href|style|.*:", name) for name in attributes)
    ids = [element.get("id", "") for element in tags(root, "pattern")]
    used = {value[5:-1] for element in root.iter() for value in element.attrib.values()
            if value.startswith("url(#")}  # fmt: skip
    assert len(ids) == len(set(ids))
    assert used <= set(ids)


def test_hostile_names_are_text() -> None:
    """Markup in a name is shown as text, and characters that XML forbids are replaced."""
    name, title = "</text><script>&amp;\"'\x00\x1b\ud800\ufffe模", "<b>&\x07"
    layout = Layout((Slice(MODEL, 0, 1), Slice(OTHER, 0, 1)))
    root = parsed(svg.picture(layout, (), [name, "x" * 10**6], title))
    shown = [element.text or "" for element in tags(root, "text")]
    assert "</text><script>&amp;\"'����模" in shown
    assert shown[0] == tags(root, "title")[0].text == "<b>&�"
    assert max(map(len, shown)) < 200


@given(layouts(slices=30))
def test_cells_hold_the_sources_in_reading_order(drawn: tuple[Layout, set[int]]) -> None:
    """Cells show their sources in reading order, with a letter if there are several models."""
    layout, identities = drawn
    if len(layout) > 240:
        layout = Layout(layout.slices[:10])
    several = len(layout.models) > 1
    labels, *groups = cells(parsed(svg.picture(layout, identities)))
    words = [
        (float(text.get("y", "")), float(text.get("x", "")), text)
        for group in groups
        for text in tags(group, "text")
    ]
    corners = {(r.get("x"), r.get("y")) for group in groups for r in tags(group, "rect")}
    # Rows are 31 apart, and no font size moves a text by half of that.
    words.sort(key=lambda place: (place[0] // 31, place[1]))
    assert ["".join(text.itertext()) for _, _, text in words] == [
        (layer_maps.letter(layout.models.index(layer.model)) if several else "") + str(layer.source)
        for layer in layout.layers
    ]
    assert len(corners) == len(layout)
    assert [text.text for text in labels] == [str(i) for i in range(0, len(layout), 20)]


def test_roles_are_visible_without_colour() -> None:
    """Originals are solid, copies hatched and outlined, and zeroed layers dashed and empty."""
    drawn = cells(parsed(svg.picture(expand(Every(4), MODEL, 8), {4})))[1:]
    full, hatched, empty = (group for group in drawn if tags(group, "rect"))
    assert [len(group) for group in (full, hatched, empty)] == [8, 1, 1]
    assert re.fullmatch("#[0-9a-f]{6}", full.get("fill", ""))
    assert hatched.get("fill", "").startswith("url(#hatch-")
    assert float(hatched.get("stroke-width", "")) == 2 * float(full.get("stroke-width", ""))
    assert (empty.get("fill"), "stroke-dasharray" in empty.attrib) == ("none", True)
    assert not {"stroke-dasharray"} & {*full.attrib, *hatched.attrib}


def test_scaled_and_moved_layers_are_visible_without_colour() -> None:
    """A scaled layer is light with a full outline, and a moved one solid with a dotted one."""
    layout = Layout((Slice(MODEL, 0, 1, (Scale(0.5),)), Slice(MODEL, 2, 4), Slice(MODEL, 1, 2)))
    text = svg.picture(layout)
    drawn = cells(parsed(text))[1:]
    full, moved, light = (group for group in drawn if tags(group, "rect"))
    assert (moved.get("fill"), "stroke-dasharray" in moved.attrib) == (full.get("fill"), True)
    assert (light.get("fill") == full.get("fill"), "stroke-dasharray" in light.attrib) == (0, 0)
    assert all(f">{words}<" in text for words in ("2 original", "1 moved", "1 scaled"))


def test_a_legend_of_all_roles_fits() -> None:
    """All five roles of the deepest model fit into the width of the picture."""
    parts = [Slice(MODEL, 4000, 6000, (Scale(0.5),)), Slice(MODEL, 2000, 4000)]
    parts += [Slice(MODEL, 0, 2000), Slice(MODEL, 0, 4000)]
    text = svg.picture(Layout(tuple(parts)), range(6000, 8000))
    legend = [x for x in tags(parsed(text)[-1], "text") if (x.text or "").split()[0].isdigit()]
    assert len(legend) == 5
    assert float(legend[-1].get("x", "")) + 8 * len(legend[-1].text or "") <= svg.WIDTH


@pytest.mark.parametrize("depth", [1, 20, 120, 121, 500, 501, 5_000])
def test_nothing_is_outside_of_the_picture(depth: int) -> None:
    """The picture of a deep model is neither too tall nor too large."""
    text = svg.picture(expand(Repeat((0, depth)), MODEL, depth), title="x" * 1000)
    root = parsed(text)
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    places = rectangles(cells(root)[1:])
    assert len(places) == 2 * depth
    assert max(x + wide for x, _, wide, _ in places) <= width
    assert max(y + tall for _, y, _, tall in places) + 32 < height < 1300
    assert len(text) < 250_000


def test_120_layers_are_six_rows() -> None:
    """The picture of 120 layers has six rows and is less than 250 pixels high."""
    root = parsed(svg.picture(expand(Every(4), MODEL, 96)))
    assert len(cells(root)[0]) == 6
    assert float(root.get("height", "")) < 250


@pytest.mark.parametrize("colour", [*svg._COLOURS, svg.GREY])  # noqa: SLF001
def test_colours_are_visible_on_a_white_page_and_on_a_dark_one(colour: svg._Colour) -> None:
    """Outlines have a contrast of 3 to 1, and text and hatching 4.5 to 1."""
    assert min(contrast(colour.line, page) for page in (WHITE, DARK)) >= 3
    assert contrast(svg._BLACK, colour.mixed(0.5)) >= 4.5  # noqa: SLF001
    if colour is svg.GREY:  # the colour of text on the page
        assert min(contrast(colour.fill, page) for page in (WHITE, DARK)) >= 4.3
    else:
        assert contrast(colour.ink, colour.fill) >= 4.5


def test_models_next_to_each_other_differ_in_colour() -> None:
    """The colours repeat after eight models."""
    layout = Layout(tuple(Slice(model, 0, 1) for model in models(9)))
    groups = [group for group in cells(parsed(svg.picture(layout)))[1:] if tags(group, "rect")]
    fills = [group.get("fill") for group in groups]
    assert (len(set(fills[:8])), fills[8]) == (8, fills[0])


def test_the_legend_counts_and_names() -> None:
    """The legend names forty models and counts the rest."""
    text = svg.picture(expand(Every(4), MODEL, 32), {4, 9})
    assert all(f">{words}<" in text for words in ("32 original", "6 copies", "2 zeroed"))
    shown = [element.text or "" for element in tags(parsed(text), "text")]
    assert any("layers of org/model" in words for words in shown)
    layout = Layout(tuple(Slice(model, 0, 1) for model in models(50)))
    shown = [element.text or "" for element in tags(parsed(svg.picture(layout)), "text")]
    assert {"org/model-0", "org/model-39"} <= set(shown)
    assert any(re.search(r"\b10 more\b", words) for words in shown)
    assert "org/model-40" not in shown


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("title", [None, "A title"])
def test_the_legend_is_below_the_cells(count: int, title: str | None) -> None:
    """Legend lines do not overlap, long names are cut, and the title is above the cells."""
    layout = Layout(tuple(Slice(model, 0, 19) for model in models(count)))
    root = parsed(svg.picture(layout, (), [f"{i}{'n' * 500}" for i in range(count)], title))
    (drawn,) = (group for group in tags(root, "g") if "transform" in group.keys())  # noqa: SIM118
    shift = float(drawn.get("transform", "")[len("translate(0 ") : -1])
    bottom = shift + max(y + tall for _, y, _, tall in rectangles([drawn]))
    legend = root[-1]
    swatches = [(float(r.get("y", "")), float(r.get("x", ""))) for r in tags(legend, "rect")]
    words = [text for text in tags(legend, "text") if "font-size" not in text.attrib]
    places = {(float(text.get("y", "")), float(text.get("x", ""))) for text in words}
    assert bottom + 8 < min(swatches)[0]
    assert max(places)[0] + 8 < float(root.get("height", ""))
    assert len(places) == len(words)
    # An n is at least half as wide as the font size in every common sans-serif font.
    across = 358 if count > 3 else 716
    assert all(len(text.text or "") * 6.5 < across for text in words)
    if title is not None:
        assert 12 < float(tags(root, "text")[0].get("y", "")) < shift


def test_the_picture_has_a_description() -> None:
    """A picture has a title and a description for screen readers."""
    root = parsed(svg.picture(expand(Every(4), MODEL, 32), range(4, 40, 5), ["a base"]))
    assert root.get("role") == "img"
    assert "Layers" in (tags(root, "title")[0].text or "")
    words = description(root)
    for fact in ("40 layers", "32 original, 8 zeroed", "0-3 [4] 5-8 [9] … 35-38 [39]", "a base"):
        assert fact in words
    many = Layout(tuple(Slice(model, 0, 1) for model in models(50)))
    words = description(parsed(svg.picture(many)))
    assert re.search("; AN org/model-39; 10 more", words)
    assert "org/model-40" not in words
    layout = Layout((Slice(MODEL, 0, 1), Slice(OTHER, 0, 1)))
    words = description(parsed(svg.picture(layout)))
    for fact in ("2 layers", "2 original", " 0 1.", "A org/model; B org/other"):
        assert fact in words
    assert "copies" not in words
    assert "brackets" not in words


def description(root: ET.Element) -> str:
    """Return the description of a picture."""
    return tags(root, "desc")[0].text or ""


@given(layouts())
def test_the_same_layout_gives_the_same_bytes(drawn: tuple[Layout, set[int]]) -> None:
    """The picture does not depend on the order of the identities."""
    layout, identities = drawn
    again = Layout(tuple(layout.slices))
    backwards = sorted(identities, reverse=True)
    assert svg.picture(layout, identities) == svg.picture(again, backwards)


def test_a_picture_is_known_again(tmp_path: Path) -> None:
    """A picture may be replaced, with any title, and one of release 0.1."""
    file = tmp_path / "x.svg"
    for title in (None, "a <b>\n" * 900):
        layout = expand(Every(4), MODEL, 8)
        file.write_text(svg.picture(layout, title=title), encoding="utf-8")
        svg.check_file(file)
    svg.check_file(RELEASE / "layers.svg")


def test_the_numbers_are_explained() -> None:
    """The legend says what the numbers are; its example is a cell of the picture."""
    one = svg.picture(expand(Every(4), MODEL, 8), names=("base",))
    assert "left: new index; in cells: layers of base" in one
    layout = Layout((Slice(MODEL, 0, 6), Slice(OTHER, 3, 8)))
    assert "left: new index; B7: layer 7 of B" in svg.picture(layout)
    many = svg.picture(Layout((Slice(MODEL, 0, 300), Slice(OTHER, 3, 8))))
    assert "left: new index<" in many
