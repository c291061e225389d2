"""The layer map and the strip for terminals."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_layouts import MODEL, OTHER, layouts, models
from rich.cells import cell_len

from mergekit_interleave.directive.growth import (
    After,
    Append,
    Every,
    Growth,
    Repeat,
    Spread,
    Windows,
    stack_of,
)
from mergekit_interleave.directive.scale import Scale, zeroed_scales
from mergekit_interleave.layout import roles
from mergekit_interleave.layout.layout import Edit, Layout, Slice, expand
from mergekit_interleave.output import layer_map as layer_maps


def test_brackets_hold_the_new_layers() -> None:
    """New layers are in brackets, with the indices of the new model."""
    layout = expand(Every(4), MODEL, 10, lambda _: Edit(zeroed_scales(["o_proj"])))
    assert layer_maps.layer_map(layout) == "0-3 [4] 5-8 [9] 10-11"


@pytest.mark.parametrize(
    ("growth", "depth", "words"),
    [
        (Every(4), 12, "0-3 [4] 5-8 [9] 10-13 [14]"),
        (Every(4), 16, "0-3 [4] 5-8 [9] … 15-18 [19]"),
        (Every(4), 34, "0-3 [4] 5-8 [9] … 35-38 [39] 40-41"),
        (Spread(3), 8, "0-1 [2] 3-5 [6] 7-9 [10]"),
        (Spread(6), 21, "0-2 [3] 4-7 [8] 9-11 [12] 13-16 [17] 18-20 [21] 22-25 [26]"),
        (After((3, 9, 14)), 16, "0-3 [4] 5-10 [11] 12-16 [17] 18"),
        (Append(4), 32, "0-31 [32] [33] [34] [35]"),
        (Append(5), 32, "0-31 [32] [33] … [36]"),
        (Repeat((8, 24)), 32, "0-8 [9] 10 [11] 12 … [37] 38 [39] 40-47"),
        (Repeat((8, 24), 3, as_block=True), 32, "0-23 [24-39] [40-55] 56-63"),
        (stack_of([(0, 23), (29, 32)]), 32, "0-22 23-25"),
        (Windows(20, 10), 80,
         "0-19 [20-29] 30-39 [40-49] 50-59 … [120-129] 130-139"),
    ],
)  # fmt: skip
def test_a_pattern_of_four_repeats_is_shown_three_times(
    growth: Growth, depth: int, words: str
) -> None:
    """A repeated pattern is shown as its first two repeats and the last."""
    assert layer_maps.layer_map(expand(growth, MODEL, depth)) == words


def test_a_pattern_is_at_most_eight_runs() -> None:
    """A pattern of more than eight runs is not abbreviated."""
    words = layer_maps.layer_map(expand(Spread(20), MODEL, 65)).split(" … ")
    assert words == [
        "0-2 [3] 4-6 [7] 8-10 [11] 12-15 [16] 17-19 [20] 21-23 [24] 25-27 [28] 29-32 [33]",
        "68-70 [71] 72-74 [75] 76-78 [79] 80-83 [84]",
    ]
    lengths = [1, 2, 3, 4, 5, 6, 7, 8, 9] * 4
    layout = Layout(tuple(Slice(MODEL, 100 * i, 100 * i + n) for i, n in enumerate(lengths)))
    assert "layers)" in layer_maps.layer_map(layout)


def test_another_role_is_another_pattern() -> None:
    """A pattern ends where copies become zeroed layers, although both are in brackets."""
    words = "0-3 [4] 5-8 [9] … 15-18 [19] 20-23 [24] 25-28 [29] … 35-38 [39]"
    assert layer_maps.layer_map(expand(Every(4), MODEL, 32), {4, 9, 14, 19}) == words


def test_a_map_without_a_pattern_counts_omitted_layers() -> None:
    """A map without a pattern shows the number of omitted layers."""
    lengths = [1 + i * i % 11 * (i % 7) for i in range(60)]
    layout = Layout(tuple(Slice(MODEL, 100 * i, 100 * i + n) for i, n in enumerate(lengths)))
    before, skipped, after = re.split(r" … \((\d+) layers\) … ", layer_maps.layer_map(layout))
    last = int(re.split(r"[- ]", before)[-1])
    assert int(re.split(r"[- ]", after)[0]) - last - 1 == int(skipped)


@given(layouts(slices=80))
def test_a_map_is_short_and_true(drawn: tuple[Layout, set[int]]) -> None:
    """A map shows only existing runs, in order, from the first to the last."""
    layout, identities = drawn
    text = layer_maps.layer_map(layout, identities)
    assert len(text) < 400
    shown = re.sub(r"\(\d+ layers\)|…", "", text).split()
    runs = [
        (f"{run.start}-{run.stop - 1}" if run.stop - run.start > 1 else str(run.start), run.new)
        for run in layer_maps.runs(layout, identities)
    ]
    every = [f"[{words}]" if new else words for words, new in runs]
    places = [every.index(words) for words in shown]
    assert places == sorted(set(places))
    assert (places[0], places[-1]) == (0, len(every) - 1)
    assert ("…" in text) == (len(shown) < len(every))


def test_runs_have_sources_and_roles() -> None:
    """Consecutive layers of one role and one source range are one run."""
    runs = list(layer_maps.runs(expand(Repeat((1, 3)), MODEL, 4)))
    assert [(r.start, r.stop, r.source, r.role) for r in runs] == [
        (0, 2, 0, "original"),
        (2, 3, 1, "copy"),
        (3, 4, 2, "original"),
        (4, 5, 2, "copy"),
        (5, 6, 3, "original"),
    ]


def test_a_strip_and_a_map_of_scaled_and_moved_layers() -> None:
    """Scaled and moved layers have their own characters and words, and no brackets."""
    layout = Layout((Slice(MODEL, 0, 2, (Scale(0.5),)), Slice(MODEL, 4, 6), Slice(MODEL, 2, 4)))
    assert plain(layer_maps.strip(layout)) == [
        "0 ▓▓▞▞██",
        "",
        "█ 2 original  ▞ 2 moved  ▓ 2 scaled",
    ]
    assert layer_maps.layer_map(layout) == "0-1 2-3 4-5"
    assert layer_maps.others(layout) == ", 2 scaled, 2 moved"
    assert layer_maps.seam_layers(layout) == "2, at layers 1-4"
    lost = Layout((Slice(MODEL, 0, 2), Slice(MODEL, 2, 3, (Scale(0.0, "o_proj"),))))
    assert layer_maps.layer_map(lost) == "0-1 [2]"
    assert (layer_maps.others(lost), layer_maps.others(lost, {2})) == (", 1 scaled", "")


def test_another_model_starts_another_run() -> None:
    """A layer of another model starts a run, even if the source indices continue."""
    runs = list(layer_maps.runs(Layout((Slice(MODEL, 0, 2), Slice(OTHER, 2, 4)))))
    assert [run.model for run in runs] == [MODEL, OTHER]


def plain(lines: list[layer_maps.Line]) -> list[str]:
    """Return the lines without styles."""
    return ["".join(text for text, _ in line) for line in lines]


def styles(lines: list[layer_maps.Line]) -> dict[str, set[str]]:
    """Return the styles of each character in the rows."""
    found: dict[str, set[str]] = {}
    for line in lines[: lines.index(())]:
        for text, style in line[1:]:
            for char in text:
                found.setdefault(char, set()).add(style)
    return found


def test_a_strip_shows_roles_without_colour() -> None:
    """Each role has its own character, and the legend lists the roles that occur."""
    layout = expand(Every(4), MODEL, 8)
    assert plain(layer_maps.strip(layout, {4})) == [
        " 0 ████░████▒",
        "",
        "█ 8 original  ▒ 1 copy  ░ 1 zeroed",
    ]
    assert plain(layer_maps.strip(layout, {4}, ascii_only=True)) == [
        " 0 ####.####+",
        "",
        "# 8 original  + 1 copy  . 1 zeroed",
    ]
    assert plain(layer_maps.strip(layout))[-1] == "█ 8 original  ▒ 2 copies"


def test_a_strip_of_several_models_has_their_letters() -> None:
    """A copy has its model's letter in lower case, and a zeroed layer has its model's colour."""
    zeroed = zeroed_scales(["o_proj"])
    layout = Layout((Slice(MODEL, 0, 9), Slice(OTHER, 6, 9), Slice(MODEL, 7, 9),
                     Slice(OTHER, 8, 9, zeroed)))  # fmt: skip
    lines = layer_maps.strip(layout, {14}, names=["first", "second"])
    assert plain(lines) == [
        " 0 AAAAAAAAAB BBaa·",
        "",
        "AB 12 original  ab 2 copies  · 1 zeroed",
        "A first",
        "B second",
    ]
    found = styles(lines)
    assert found["A"] == found["a"] != found["B"] == found["·"]


def test_a_strip_of_one_model_has_a_colour_for_each_role() -> None:
    """Three roles have three styles."""
    found = styles(layer_maps.strip(expand(Every(4), MODEL, 8), {4}))
    found.pop(" ")
    assert len({style for both in found.values() for style in both}) == len(found) == 3


def test_a_deep_strip_is_readable_at_80_columns() -> None:
    """The rows of a strip begin at round numbers."""
    rows = plain(layer_maps.strip(expand(Every(4), MODEL, 96), width=80))[:3]
    assert [row.split()[0] for row in rows] == ["0", "50", "100"]
    assert rows[0] == "  0" + " ████▒████▒" * 5


def test_a_strip_of_forty_models_has_letters_for_some() -> None:
    """Models beyond the 26 letters share a sign, and the legend counts them."""
    layout = Layout(tuple(Slice(model, 0, 1) for model in models(40)))
    lines = plain(layer_maps.strip(layout))
    assert lines[0] == " 0 ABCDEFGHIJ KLMNOPQRST UVWXYZ**** **********"
    assert lines[-2:] == ["Z org/model-25", "* 14 more models"]


def test_a_strip_of_ten_thousand_layers_counts_omitted_layers() -> None:
    """The strip shows the number of omitted layers."""
    for width in (20, 80, 300):
        lines = plain(layer_maps.strip(expand(Every(1), MODEL, 5000), width=width))
        rows = lines[: lines.index("")]
        (omitted,) = (row for row in rows if row.startswith("…"))
        drawn = sum(len(re.findall("[█▒]", row)) for row in rows)
        assert drawn + int(omitted.split()[1]) == 10_000
        after = rows[rows.index(omitted) + 1]
        assert int(after.split()[0]) == 500 + int(omitted.split()[1])


@given(layouts(), st.integers(0, 130), st.data())
def test_no_line_of_a_strip_is_too_long(
    drawn: tuple[Layout, set[int]], width: int, data: st.DataObject
) -> None:
    """No line is longer than the width, whatever the names of the models are."""
    layout, identities = drawn
    names = data.draw(st.lists(st.text(), min_size=len(layout.models), max_size=len(layout.models)))
    for ascii_only in (False, True):
        lines = plain(
            layer_maps.strip(layout, identities, names=names, width=width, ascii_only=ascii_only)
        )
        assert max(map(cell_len, lines)) <= max(width, layer_maps.NARROWEST)
        assert all(line.isprintable() for line in lines)
        assert not ascii_only or all(line.isascii() for line in lines)


@given(layouts(), st.integers(0, 130))
def test_a_strip_has_a_character_for_each_layer(drawn: tuple[Layout, set[int]], width: int) -> None:
    """A row begins with the index of its first layer and has each layer's role in order."""
    layout, identities = drawn
    lines = plain(layer_maps.strip(layout, identities, width=width))
    seen = ""
    for line in lines[: lines.index("")]:
        index, *groups = line.split()
        assert int(index) == len(seen)
        assert all(len(group) == 10 for group in groups[:-1])
        seen += "".join(groups)
    of_role = {
        roles.ORIGINAL: "[A-Z█*]",
        roles.MOVED: "[↕▞]",
        roles.SCALED: "[×▓]",  # noqa: RUF001 - not the letter x
        roles.COPY: "[a-z▒+]",
        roles.ZEROED: "[·░]",
    }
    pattern = "".join(of_role[role] for role in roles.roles(layout, identities))
    assert re.fullmatch(pattern, seen)


def test_names_contain_no_control_characters() -> None:
    """Unprintable characters are replaced, and long names are cut."""
    layout = Layout((Slice(MODEL, 0, 1), Slice(OTHER, 0, 1)))
    names = ["\x1b[31mred\u202e\n", "x" * 10**6]
    lines = plain(layer_maps.strip(layout, names=names, width=30))
    assert lines[-2:] == ["A �[31mred��", f"B {'x' * 27}…"]


def test_the_number_of_names_is_that_of_models() -> None:
    """Too few names are an error, because a name could get another model's letter."""
    with pytest.raises(ValueError, match="1 names for 2 models"):
        layer_maps.strip(Layout((Slice(MODEL, 0, 1), Slice(OTHER, 0, 1))), names=["one"])


def test_letters_continue_after_z() -> None:
    """Letters continue as in a spreadsheet, without repetition."""
    letters = [layer_maps.letter(i) for i in range(1000)]
    assert letters[:2] == ["A", "B"]
    assert letters[24:29] == ["Y", "Z", "AA", "AB", "AC"]
    assert letters[701:703] == ["ZZ", "AAA"]
    assert len(set(letters)) == 1000


def test_both_layers_of_a_mean() -> None:
    """The sources of a new layer that is a mean are both layers, and join no range."""
    layout = Layout((Slice(MODEL, 0, 4), Slice(MODEL, 3, 4, mean_with=4), Slice(MODEL, 4, 6)))
    assert layer_maps.sources(layout) == "0-3 3+4 4-5"
