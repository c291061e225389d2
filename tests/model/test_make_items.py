"""The items of the example have answers that are right, and depend only on the seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import tokenizer

from mergekit_interleave.evaluation.offline import reasoning
from mergekit_interleave.scanning import sequences

pytest.importorskip("reasoning_gym")
EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_script(tmp_path: Path) -> None:
    """Two processes with the same seed write the same items, which a scan can read."""
    files = [tmp_path / "one.jsonl", tmp_path / "other.jsonl"]
    for number, file in enumerate(files):
        words = [EXAMPLES / "make_items.py", file, "--count", "60", "--seed", "3"]
        environment = {**os.environ, "PYTHONHASHSEED": str(number)}
        subprocess.run([sys.executable, *words], check=True, env=environment)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(sequences.of_items(tokenizer(64), files[0].read_text(), "items")) == 60


def test_items() -> None:
    """Each kind has its share of items that differ, and another seed makes others."""
    items, _ = reasoning.make(180, seed=0)
    prompts = {item["prompt"] for item in items}
    assert len(prompts) == 180
    for kind in reasoning.KINDS:
        assert [item["kind"] for item in items].count(kind.name) == 20
    for item in items:
        assert item["answer"] in item.get("choices", [item["answer"]])
        assert json.loads(json.dumps(item)) == item
    others, _ = reasoning.make(180, seed=1)
    assert len(prompts & {item["prompt"] for item in others}) < 40


@pytest.mark.parametrize(
    ("solve", "question", "answer"),
    [
        (reasoning.solve_expression, "Solve: 15 - 43 - 75 =", "-103"),
        (reasoning.solve_expression, "Solve the following: 12 * 12. Give the result.", "144"),
        (reasoning.solve_equation, "Find e in the equation: 9 - 15*e = -186", "13"),
        (reasoning.solve_equation, "Solve for e: 2*e = 3", None),
        (reasoning.solve_primes, "How many prime numbers are between 1 and 10?", "4"),
        (reasoning.solve_date, "What day of the week was October 28, 2022?", "Friday"),
        (reasoning.solve_date, "Is 1900 a leap year?", "No"),
        (
            reasoning.solve_kinship,
            "Ann has 4 sisters and 1 brothers. How many sisters does Ann's brother have?",
            "5",
        ),
        (
            reasoning.solve_kinship,
            "Ann has 4 sisters and 1 brothers. How many brothers does Ann's sister have?",
            None,
        ),
        (
            reasoning.solve_syllogism,
            "1. All cats are dogs 2. All dogs are ants. Does it follow: All cats are ants?",
            "Yes",
        ),
        (
            reasoning.solve_syllogism,
            "1. All cats are dogs 2. Some dogs are ants. Does it follow: Some cats are ants?",
            "No",
        ),
        (
            reasoning.solve_syllogism,
            "1. All cats are dogs 2. No dogs are ants. Does it follow: Some cats are not ants?",
            "Yes",
        ),
    ],
)
def test_solutions(solve: object, question: str, answer: str | None) -> None:
    """Each kind of question is solved without the answer of reasoning-gym."""
    assert callable(solve)
    assert solve(question) == answer


def test_wrong_syllogisms_are_left_out() -> None:
    """This fails when reasoning-gym no longer calls invalid syllogisms valid."""
    _, wrong = reasoning.make(450, seed=0)
    assert set(wrong) == {"syllogism"}
