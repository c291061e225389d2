"""The verdict on many layouts is said in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest

from mergekit_interleave.scanning.analysis import Analysis, Finding, Split, analyse
from mergekit_interleave.scanning.verdict import ITEM, TEXT, Measured, report, verdict

LAYOUTS = ["repeat: 8:14@block", "repeat: 3:5@block", "drop: 4"]
SPLIT = Split(np.arange(0, 20, 2), np.arange(1, 20, 2))


def finding(
    held_out: float = 0.8,
    interval: tuple[float, float] = (0.2, 1.4),
    *,
    layout: int = 0,
    selected: float = 1.25,
    needed: int | None = 30,
) -> Finding:
    """Return a finding, by default of the first layout and a gain."""
    return Finding(layout, selected, held_out, interval, needed)


def analysis(*findings: Finding, chance: float = 0.004, helps: bool = False) -> Analysis:
    """Return an analysis, by default without a layout that helps."""
    return Analysis(SPLIT, len(LAYOUTS), findings, chance, findings[0] if helps else None)


def measured(kinds: Sequence[str] = (TEXT,), tokens: int = 16, **more: object) -> Measured:
    """Return 20 sequences of these kinds in turn."""
    return Measured(LAYOUTS, [tokens] * 20, [*kinds] * (20 // len(kinds)), **more)  # type: ignore[arg-type]


def test_a_layout_that_helps_a_text() -> None:
    """The verdict has the directive, the exact change of perplexity, and the interval."""
    line = verdict(analysis(finding(), helps=True), measured())
    lower = 100 * (1 - math.exp(-0.8 * 10 / 160))
    assert line.startswith("`repeat: 8:14@block` helps")
    assert f"perplexity of held-out text is {lower:.1f} % lower" in line
    assert "+0.80 nats per window, 95 % interval +0.20 to +1.40" in line


def test_perplexity_counts_the_tokens_of_the_held_out_part() -> None:
    """Tokens of sequences that selected the layout do not count."""
    uneven = Measured(LAYOUTS, [1000, 16] * 10, [TEXT] * 20)
    best = analysis(finding(), helps=True)
    assert verdict(best, uneven) == verdict(best, measured())


@pytest.mark.parametrize(
    ("difference", "words"),
    [(0.1, "10.5 % more likely"), (1.5, "4.48 times as likely")],
)
def test_a_layout_that_helps_items(difference: float, words: str) -> None:
    """For items, the verdict says how much more likely the right answers are."""
    best = finding(difference, (0.05, 2))
    line = verdict(analysis(best, helps=True), measured([ITEM]))
    assert words in line
    assert "nats per item" in line


def test_texts_and_items_together() -> None:
    """Perplexity is not said of items, and both kinds are called sequences."""
    line = verdict(analysis(finding(), helps=True), measured([TEXT, ITEM]))
    assert "nats per sequence" in line
    assert "perplexity" not in line


@pytest.mark.parametrize(
    ("found", "chance", "reasons"),
    [
        (finding(), 0.234, ["luck (a chance of 23.4 %)"]),
        (finding(0.1, (-0.3, 0.5)), 0.01, ["may not help", "-0.30 to +0.50"]),
        (finding(-0.4, (-0.6, -0.2)), 1.0, ["luck (a chance of 100 %)", "worse", "-0.60 to -0.20"]),
        (finding(0, (0, 0), selected=0, needed=None), 1.0, ["the same as the base"]),
        (finding(-0.1, (-0.2, 0), selected=-0.1), 1.0, ["not better than the base"]),
    ],
)
def test_nothing_helps(found: Finding, chance: float, reasons: list[str]) -> None:
    """The verdict names the best layout, and only the reasons that hold."""
    line = verdict(analysis(found, chance=chance), measured())
    certain = " for certain" if found.interval[0] > 0 else ""
    assert line.startswith(f"Nothing helps{certain}: the best of 3 layouts, `repeat: 8:14@block`, ")
    assert all(reason in line for reason in reasons)
    others = [word for word in ("luck", "may not", "worse", "not better")
              if not any(word in reason for reason in reasons)]  # fmt: skip
    assert not any(word in line for word in others)


def test_the_table_is_aligned_with_names_last() -> None:
    """Numbers are aligned at the right, and a long directive stays whole."""
    long = "interleave: " + ", ".join(f"{i}:{i + 9}" for i in range(90))
    found = [finding(), finding(-12.5, (-20.25, -1), layout=1), finding(layout=2)]
    lines = [*report(analysis(*found), Measured([long, *LAYOUTS[1:]], [16] * 20, [TEXT] * 20))]
    start = next(i for i, line in enumerate(lines) if line.endswith("  layout"))
    header, *rows = lines[start : start + 4]
    column = header.index("layout")
    assert [row[column:] for row in rows] == [long, *LAYOUTS[1:]]
    assert all(row[column - 1] == " " for row in rows)
    assert {len(row[:column].rstrip()) for row in rows} == {column - 2}
    assert rows[1].split()[:5] == ["+1.25", "-12.50", "-20.25", "to", "-1.00"]


def test_small_differences_have_enough_decimals() -> None:
    """An end of the interval that is not 0 is not shown as 0, and nothing is shown as -0."""
    line = verdict(analysis(finding(0.004, (0.0003, 0.008)), helps=True), measured())
    assert "+0.00030 to +0.00800" in line
    text = "\n".join(report(analysis(finding(selected=-1e-9)), measured()))
    assert "-0.00 " not in text


def test_the_number_of_sequences_that_are_needed() -> None:
    """Half of a difference takes four times as many; the total counts both parts."""
    (line,) = (x for x in report(analysis(finding()), measured()) if "to see" in x.lower())
    assert re.findall(r"[\d,]+(?= held-out windows| in all)", line) == ["30", "60", "120", "240"]
    lines = report(analysis(finding(0.0, (0, 0), needed=None)), measured())
    assert not any("to see" in line.lower() for line in lines)


def test_the_chance_is_said_with_the_number_of_layouts() -> None:
    """The report has the corrected chance, and what it was corrected for."""
    (line,) = (x for x in report(analysis(finding()), measured()) if x.startswith("Luck"))
    assert "3 layouts" in line
    assert "0.4 %" in line


def test_broken_layouts_are_named() -> None:
    """Layouts with scores that are not finite are named; the verdict is said without them."""
    differences = np.full((3, 20), np.nan)
    everything = measured(broken=[0, 1, 2])
    lines = [*report(analyse(differences, seed=0), everything)]
    assert lines[0].startswith("Nothing helps")
    assert all(f"`{name}`" in lines[-1] for name in LAYOUTS)
    many = Measured(["drop: 1"] * 90, [1] * 20, [ITEM] * 20, broken=range(90))
    assert [*report(analyse(np.full((90, 20), np.inf), seed=0), many)][-1].endswith("85 more.")


def test_an_analysis_of_numbers_is_reported() -> None:
    """A planted gain is named, and noise is not."""
    noise = np.random.default_rng(0).normal(size=(3, 20)) / 10
    gain = noise + np.array([[0], [5], [0]])
    assert verdict(analyse(gain, seed=0), measured()).startswith("`repeat: 3:5@block` helps")
    assert verdict(analyse(-gain, seed=0), measured()).startswith("Nothing helps")
