"""Scores of two models become comparisons, of tasks and of groups of tasks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.evaluation import comparison, scores
from mergekit_interleave.evaluation.comparison import Comparison, compared
from mergekit_interleave.evaluation.groups import groups_of
from mergekit_interleave.evaluation.scores import GroupMetric, MetricScores, TaskScores
from mergekit_interleave.output import evaluation_text


def metric(values: Any, weights: Any = None, **keys: Any) -> MetricScores:
    """Return the values of a metric of consecutive items."""
    count = len(values)
    known = {"metric": "acc", "filter": "none", "higher_is_better": True, "is_log": False, **keys}
    return MetricScores(
        **known,
        items=tuple(range(count)),
        values=tuple(map(float, values)),
        weights=tuple(map(float, np.ones(count) if weights is None else weights)),
    )


def task(name: str, *metrics: MetricScores) -> TaskScores:
    """Return the scores of a task of independent items."""
    count = len(metrics[0].items)
    items = tuple(f"{name} {number}" for number in range(count))
    return TaskScores(name, "1", 0, None, items, tuple(range(count)), metrics)


def one(base: MetricScores, grown: MetricScores) -> Comparison:
    """Compare two models on one metric of one task."""
    (found,) = compared({"t": task("t", base)}, {"t": task("t", grown)}, ())
    return found


def test_verdicts() -> None:
    """The verdict follows the direction that the task states, and only beyond chance."""
    base, more = np.zeros(40), np.ones(40)
    assert one(metric(base), metric(more)).verdict == evaluation_text.BETTER
    assert one(metric(more), metric(base)).verdict == evaluation_text.WORSE
    lower, unknown = {"higher_is_better": False}, {"higher_is_better": None}
    assert one(metric(base, **lower), metric(more, **lower)).verdict == evaluation_text.WORSE
    assert one(metric(base, **unknown), metric(more, **unknown)).verdict == (
        evaluation_text.DIFFERENT
    )
    few = [1, *base[1:]]
    assert one(metric(base), metric(few)).verdict == evaluation_text.CHANCE
    assert one(metric(few), metric(few)).verdict == evaluation_text.EQUAL


def test_perplexity() -> None:
    """A perplexity is the exponential of the mean, and its difference is that of logarithms."""
    generator = np.random.default_rng(0)
    words = generator.integers(1, 9, 50)
    base, grown = generator.normal(3, 1, (2, 50))
    keys = {"is_log": True, "higher_is_better": False, "weights": words}
    found = one(metric(base, **keys), metric(grown, **keys))
    assert found.base == pytest.approx(math.exp(np.average(base, weights=words)))
    assert found.grown == pytest.approx(math.exp(np.average(grown, weights=words)))
    assert found.difference == pytest.approx(math.log(found.grown / found.base))
    assert found.unit == comparison.PERCENT


def test_needed() -> None:
    """Half a difference needs four times the items; where no item differs, nothing is known."""
    generator = np.random.default_rng(0)
    base, grown = (generator.random((2, 400)) < 0.5).astype(float)
    found = one(metric(base), metric(grown))
    assert found.unit == comparison.POINTS
    deviation = (grown - base).std(ddof=1)
    expected = [((1.959964 + 0.841621) * deviation / size) ** 2 for size in (0.01, 0.02, 0.05)]
    assert found.needed == tuple(math.ceil(number) for number in expected)
    assert one(metric(base), metric(base)).needed == ()
    beyond = one(metric(100 * base), metric(100 * grown))
    assert beyond.unit == comparison.PERCENT
    assert one(metric(-base), metric(base - 1)).unit == comparison.PERCENT


@pytest.mark.parametrize("by_size", [True, False])
def test_groups(by_size: bool) -> None:
    """A group's score is the mean of items or of tasks, and its tasks are not tested again."""
    generator = np.random.default_rng(0)
    sides: list[dict[str, TaskScores]] = [
        {name: task(name, metric(generator.random(n) < 0.5)) for name, n in (("a", 30), ("b", 10))}
        for _ in range(2)
    ]
    group = GroupMetric("g", "2", ("a", "b"), "acc", None, by_size)
    rows = compared(sides[0], sides[1], [group])
    assert [(row.task, row.part_of) for row in rows] == [("g", None), ("a", "g"), ("b", "g")]
    means = [each["a"].metrics[0].mean for each in sides], [e["b"].metrics[0].mean for e in sides]
    weights = (30, 10) if by_size else (1, 1)
    expected = np.average(means, axis=0, weights=weights)
    assert (rows[0].base, rows[0].grown) == pytest.approx(tuple(expected))
    assert rows[0].difference == pytest.approx(expected[1] - expected[0])
    assert (rows[0].items, rows[0].version) == (40, "2")
    assert rows[0].corrected == rows[0].chance
    assert rows[1].corrected is rows[1].verdict is None


def test_the_correction() -> None:
    """With more results, the same difference may be chance."""
    generator = np.random.default_rng(0)
    grown = [1] * 6 + [0] * 30
    sides: list[dict[str, TaskScores]] = [{}, {}]
    for name in "abcdefgh":
        noise = (generator.random((2, 36)) < 0.5).astype(float)
        for side, values in zip(sides, noise, strict=True):
            side[name] = task(name, metric(values))
    sides[0]["a"], sides[1]["a"] = task("a", metric(np.zeros(36))), task("a", metric(grown))
    alone = compared({"a": sides[0]["a"]}, {"a": sides[1]["a"]}, ())[0]
    among = compared(sides[0], sides[1], ())[0]
    assert alone.chance == among.chance == pytest.approx(2**-5)
    assert (alone.verdict, among.verdict) == (evaluation_text.BETTER, evaluation_text.CHANCE)


def test_other_items() -> None:
    """Models that did not answer the same items are not compared."""
    base = task("t", metric([0, 1, 1]))
    with pytest.raises(RefusedError, match="t"):
        compared({"t": base}, {"t": replace(base, items=("x", "y", "z"))}, ())
    fewer = replace(base, metrics=(replace(base.metrics[0], items=(0, 2, 3)),))
    with pytest.raises(RefusedError, match="acc"):
        compared({"t": base}, {"t": fewer}, ())


def test_json() -> None:
    """Comparisons and scores are the same after a way through JSON."""
    base = replace(task("t", metric([0, 1, 1])), dataset=scores.Dataset("acme/choice", "main"))
    grown = replace(base, metrics=(metric([1, 1, 1]),))
    rows = compared({"t": base}, {"t": grown}, ())
    again = [Comparison.from_dict(json.loads(json.dumps(row.as_dict()))) for row in rows]
    assert again == rows
    assert scores.from_dict(json.loads(json.dumps(base.as_dict()))) == base


def test_passages() -> None:
    """Items that share a long text are one group, but not those that share an instruction."""
    texts = [f"{number:03}" * 80 for number in range(12)]
    shared = [{"id": str(i), "passage": texts[i // 3]} for i in range(36)]
    assert groups_of(shared) == tuple(i // 3 for i in range(36))
    alone = tuple(range(36))
    assert groups_of([{**item, "passage": texts[i % 3]} for i, item in enumerate(shared)]) == alone
    assert groups_of([{"passage": item["passage"][:50]} for item in shared]) == alone
    assert groups_of([{"passage": f"{i:03}" * 80} for i in range(36)]) == alone
    assert groups_of([]) == ()
