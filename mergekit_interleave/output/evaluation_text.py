"""Describe evaluation results for the card and for a terminal.

A result is a mapping, as interleave.json stores it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_interleave.output import weight_sample
from mergekit_interleave.output.layer_map import legible

Row: TypeAlias = Mapping[str, Any]

KEY = "evaluated"
"""The key of interleave.json that contains the results."""

EQUAL, BETTER, WORSE, DIFFERENT, CHANCE = "equal", "better", "worse", "different", "chance"
"""The verdicts: all items equal, a difference beyond chance in either direction or in one that the
task does not judge, and a difference that may be chance."""

BEYOND = (BETTER, WORSE, DIFFERENT)

_WORDS = {
    EQUAL: "equal on every item",
    BETTER: "**better**",
    WORSE: "**worse**",
    DIFFERENT: "**different**",
    CHANCE: "may be chance",
}

OF_LOGARITHM = "The difference of a perplexity is that of its natural logarithm: -0.01 is 1 % less."

_OF_VERDICTS = (
    "A verdict is better or worse if the chance of such a difference between equal models is below "
    "5 %, corrected for the number of results in this table by the method of Holm."
)


def of_weights(content: Mapping[str, Any], directory: Path) -> Mapping[str, Any] | None:
    """Return the results in an interleave.json, if they are those of a directory's weights.

    Args:
        content: The content of interleave.json.
        directory: The model.
    """
    found = content.get(KEY)
    if not isinstance(found, dict) or not weight_sample.are_those_of(found, directory):
        return None
    return found


def summary(rows: Sequence[Row]) -> str:
    """Say in one line which results differ beyond chance."""
    own = [row for row in rows if row["part_of"] is None]
    results = f"{len(own)} result{'' if len(own) == 1 else 's'}"
    if all(row["verdict"] == EQUAL for row in rows):
        return f"Equal: in {results}, every difference of every item is exactly 0."
    beyond = [row for row in own if row["verdict"] in BEYOND]
    if not beyond:
        return f"No difference beyond chance in {results}."
    found = ", ".join(f"{row['verdict']} in {row['task']} ({row['metric']})" for row in beyond)
    return f"Beyond chance in {len(beyond)} of {results}: {found}."


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the results as aligned lines of text."""
    head = ("items", "base", "grown", "difference", "95 % interval", "chance", "task", "verdict")
    table = [head]
    for row in rows:
        low, high = map(_signed(row), row["interval"])
        chance = "" if row["corrected"] is None else _percent(row["corrected"])
        table.append(
            (f"{row['items']:,}", _score(row["base"]), _score(row["grown"]),
             _signed(row)(row["difference"]), f"{low} to {high}", chance, _name(row),
             _verdict(row).replace("*", ""))
        )  # fmt: skip
    yield from _aligned(table, left=(6, 7))
    if any(row["is_log"] for row in rows):
        yield OF_LOGARITHM
    if any(row["groups"] < row["items"] for row in rows):
        yield "Items that share a passage count as one in the intervals."
    yield from _needed(rows)


def _needed(rows: Sequence[Row]) -> Iterator[str]:
    """Yield how many items show a difference of some sizes."""
    known = [row for row in rows if row["needed"]]
    if not known:
        return
    yield ""
    yield "Items with which 4 of 5 evaluations show a difference of this size:"
    sizes = [int(size) for size in known[0]["needed"]]
    table = [(*map(str, sizes), "unit", "task")]
    for row in known:
        numbers = tuple(f"{number:,}" for number in row["needed"].values())
        table.append((*numbers, row["unit"], _name(row)))
    yield from _aligned(table, left=(len(sizes), len(sizes) + 1))


def card(evaluated: Mapping[str, Any]) -> str:
    """Return the section of the card about the results, as Markdown without a heading."""
    rows: Sequence[Row] = evaluated["results"]
    table = ["| task | metric | items | base | this model | difference | verdict |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in rows:
        low, high = map(_signed(row), row["interval"])
        shots = "" if not row["num_fewshot"] else f", {row['num_fewshot']}-shot"
        cells = (
            f"{row['task']} (version {row['version']}{shots})",
            row["metric"] + ("" if row["filter"] == "none" else f", {row['filter']}"),
            f"{row['items']:,}",
            _score(row["base"]),
            _score(row["grown"]),
            f"{_signed(row)(row['difference'])} [{low}, {high}]",
            _verdict(row),
        )
        table.append(f"| {' | '.join(_plain(cell) for cell in cells)} |")
    tools = ", ".join(f"{name} {version}" for name, version in evaluated["tools"].items())
    against = f"{_plain(evaluated['against'])}, on the same items, in {evaluated['dtype']}"
    notes = [
        f"Measured with {tools} against {against}.",
        "The brackets are the 95 % interval of the difference.",
        _OF_VERDICTS,
    ]
    if any(row["is_log"] for row in rows):
        notes.append(OF_LOGARITHM)
    limits = {row["limit"] for row in rows} - {None}
    if limits:
        notes.append("Not all items of each task were used (`--limit`).")
    return "\n\n".join([_plain(summary(rows)), "\n".join(table), " ".join(notes)])


def _plain(text: str) -> str:
    return legible(text).replace("|", r"\|").replace("<", "_").replace("`", "_") if text else text


def _name(row: Row) -> str:
    name = f"{row['task']} {row['metric']}"
    return name if row["filter"] == "none" else f"{name}, {row['filter']}"


def _verdict(row: Row) -> str:
    verdict = row["verdict"]
    return f"part of {row['part_of']}" if verdict is None else _WORDS[verdict]


def _score(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"  # noqa: PLR2004


def _signed(row: Row) -> Any:
    """Return a format for differences, with as many decimals as the difference needs."""
    if row["verdict"] == EQUAL:
        return lambda _: "0"
    low, high = row["interval"]
    decimals = 4 if max(abs(row["difference"]), high - low) >= 0.001 else 6  # noqa: PLR2004
    return lambda value: f"{round(value, decimals) + 0.0:+,.{decimals}f}"


def _percent(chance: float) -> str:
    percent = 100 * chance
    return "< 0.1 %" if percent < 0.1 else f"{percent:.{1 if percent < 10 else 0}f} %"  # noqa: PLR2004


def _aligned(table: Sequence[Sequence[str]], left: Sequence[int]) -> Iterator[str]:
    """Yield aligned rows; numbers end in one column, and words of the columns `left` begin so."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
