"""Evaluation results in words, for a terminal and for the card."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_interleave.output import evaluation_text
from mergekit_interleave.output.evaluation_text import BETTER, CHANCE, EQUAL, WORSE

EVALUATED = {"against": "base", "dtype": "float32", "tools": {"lm_eval": "0.4.13"}}


def row(verdict: str | None = CHANCE, **keys: Any) -> dict[str, Any]:
    """Return a result."""
    return {
        "task": "arc_easy",
        "version": "1",
        "metric": "acc",
        "filter": "none",
        "num_fewshot": 0,
        "items": 1234,
        "groups": 1234,
        "is_log": False,
        "base": 0.25,
        "grown": 0.375,
        "difference": 0.125,
        "interval": [0.0625, 0.1875],
        "corrected": 0.03,
        "unit": "points",
        "needed": {"1": 6400, "2": 1600, "5": 256},
        "part_of": None,
        "verdict": verdict,
        "limit": None,
        **keys,
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(EQUAL)], "Equal: in 1 result, every difference of every item is exactly 0."),
        ([row(EQUAL), row()], "No difference beyond chance in 2 results."),
        ([row(BETTER), row()], "Beyond chance in 1 of 2 results: better in arc_easy (acc)."),
        (
            [row(WORSE, task="mmlu"), row(None, part_of="mmlu")],
            "Beyond chance in 1 of 1 result: worse in mmlu (acc).",
        ),
    ],
)
def test_summary(rows: list[dict[str, Any]], said: str) -> None:
    """One line says which results differ; those of parts of a group do not count."""
    assert evaluation_text.summary(rows) == said


def test_lines() -> None:
    """The table has the numbers of each result, and what a reader needs to understand them."""
    rows = [row(BETTER), row(None, part_of="group"), row(EQUAL, needed={}, filter="strict")]
    lines = [*evaluation_text.lines(rows)]
    assert [" ".join(line.split()) for line in lines[1:4]] == [
        "1,234 0.2500 0.3750 +0.1250 +0.0625 to +0.1875 3.0 % arc_easy acc better",
        "1,234 0.2500 0.3750 +0.1250 +0.0625 to +0.1875 3.0 % arc_easy acc part of group",
        "1,234 0.2500 0.3750 0 0 to 0 3.0 % arc_easy acc, strict equal on every item",
    ]
    assert " ".join(lines[-1].split()) == "6,400 1,600 256 points arc_easy acc"
    assert evaluation_text.OF_LOGARITHM not in lines
    assert evaluation_text.OF_LOGARITHM in [*evaluation_text.lines([row(is_log=True)])]
    assert any("passage" in line for line in evaluation_text.lines([row(groups=99)]))
    tiny = [*evaluation_text.lines([row(difference=1e-4, interval=[-1e-5, 3e-4])])]
    assert "+0.000100" in tiny[1]


def test_the_card() -> None:
    """The card has a row for each result, and names of others change nothing but their cell."""
    rows = [row(WORSE), row(task="a|b<script>`", limit=50)]
    text = evaluation_text.card({**EVALUATED, "results": rows})
    numbers = "1,234 | 0.2500 | 0.3750 | +0.1250 [+0.0625, +0.1875]"
    assert f"| arc_easy (version 1) | acc | {numbers} | **worse** |" in text
    assert "lm_eval 0.4.13" in text
    assert r"a\|b_script>_" in text
    assert "--limit" in text
