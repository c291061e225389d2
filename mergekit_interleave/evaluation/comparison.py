"""Compare the scores of two models on the same items. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from mergekit_interleave import _statistics
from mergekit_interleave._statistics import LEVEL
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.evaluation import paired
from mergekit_interleave.evaluation.paired import Pairs
from mergekit_interleave.evaluation.scores import Dataset, GroupMetric, MetricScores, TaskScores
from mergekit_interleave.output.evaluation_text import BETTER, CHANCE, DIFFERENT, EQUAL, WORSE

POINTS, PERCENT = "points", "percent"
"""The units of a difference that needs a number of items: percentage points of a share, or percent
of the score of the base."""

SIZES = (1, 2, 5)
"""The differences for which the number of items is given, in these units."""


@dataclass(frozen=True)
class Comparison:
    """The scores of two models on one metric of a task.

    Attributes:
        task: The name of the task or group.
        version: Its version.
        metric: The name of the metric.
        filter: The name of the filter that made the answers.
        num_fewshot: The number of examples before each question; None if it varies in a group.
        items: The number of items.
        groups: The number of groups of items that depend on each other; `items` if none do.
        differing: The number of items that have another value for each model.
        higher_is_better: Whether a higher score is better; None if the task does not say.
        is_log: Whether `difference` and `interval` are of the logarithm of the score.
        base: The score of the base.
        grown: The score of the grown model.
        difference: Grown minus base, in the mean of all items.
        interval: The 95 % interval of `difference`.
        chance: The chance of such a difference if only chance tells the models apart.
        corrected: The chance, corrected for the number of comparisons; None if this one is part of
            a group that is compared as a whole.
        unit: The unit of `needed`: `POINTS` or `PERCENT`.
        needed: The number of items that show a difference of 1, 2 and 5 such units; empty if no
            item differs, which says nothing about that.
        dataset: The data set of the task on the Hub, if its items come from one.
        part_of: The group that this task is part of; None if it is compared by itself.
    """

    task: str
    version: str
    metric: str
    filter: str
    num_fewshot: int | None
    items: int
    groups: int
    differing: int
    higher_is_better: bool | None
    is_log: bool
    base: float
    grown: float
    difference: float
    interval: tuple[float, float]
    chance: float
    corrected: float | None
    unit: str
    needed: tuple[int, ...]
    dataset: Dataset | None = None
    part_of: str | None = None

    @property
    def is_equal(self) -> bool:
        """Whether all items have the same value for both models."""
        return self.differing == 0

    @property
    def verdict(self) -> str | None:
        """What the corrected chance says, a constant of `evaluation_text`; None without one."""
        if self.is_equal:
            return EQUAL
        if self.corrected is None:
            return None
        if self.corrected >= LEVEL:
            return CHANCE
        if self.higher_is_better is None:
            return DIFFERENT
        # The values of a perplexity have the direction of the score.
        return BETTER if (self.difference > 0) == self.higher_is_better else WORSE

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        needed = dict(zip(map(str, SIZES), self.needed, strict=False))
        return {
            **asdict(self),
            "interval": list(self.interval),
            "verdict": self.verdict,
            "needed": needed,
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Comparison:
        """Return the comparison of which `as_dict` made JSON values.

        Raises:
            KeyError, TypeError, ValueError: They are malformed.
        """
        values = {each.name: row[each.name] for each in fields(cls)}
        low, high = map(float, row["interval"])
        dataset = None if row["dataset"] is None else Dataset(**row["dataset"])
        needed = tuple(row["needed"].values())
        return cls(**{**values, "interval": (low, high), "needed": needed, "dataset": dataset})


def compared(
    base: Mapping[str, TaskScores],
    grown: Mapping[str, TaskScores],
    group_metrics: Sequence[GroupMetric],
) -> list[Comparison]:
    """Compare the scores of two models, groups first.

    Args:
        base: The scores of the base, by task.
        grown: The scores of the grown model, by task.
        group_metrics: The metrics of groups.

    Raises:
        RefusedError: The models did not answer the same items.
    """
    for task, scores in base.items():
        if scores.items != grown[task].items:
            raise RefusedError(f"task {task}: the models were not given the same items")
    parts = {(task, each.metric): each.group for each in group_metrics for task in each.tasks}
    found = [row for each in group_metrics for row in _of_group(each, base, grown)]
    for task, scores in base.items():
        for one, other in _common(scores, grown[task]):
            groups = [scores.groups[item] for item in one.items]
            row = _comparison(one, other, groups, scores)
            found.append(replace(row, part_of=parts.get((task, one.metric))))
    return corrected(found)


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Correct the chances of comparisons for their number."""
    own = [place for place, each in enumerate(comparisons) if each.part_of is None]
    chances = paired.holm([comparisons[place].chance for place in own])
    known = dict(zip(own, chances, strict=True))
    return [replace(each, corrected=known.get(i)) for i, each in enumerate(comparisons)]


def _common(base: TaskScores, grown: TaskScores) -> Iterator[tuple[MetricScores, MetricScores]]:
    """Yield the metrics of two models on the same task.

    Raises:
        RefusedError: They have values of different items.
    """
    others = {each.key: each for each in grown.metrics}
    for one in base.metrics:
        other = others.get(one.key)
        if other is None or other.items != one.items:
            raise RefusedError(
                f"task {base.task}: {one.metric} has values of other items for each model"
            )
        yield one, other


def _comparison(
    base: MetricScores, grown: MetricScores, groups: Sequence[int], task: TaskScores
) -> Comparison:
    pairs = Pairs(
        np.array(base.values), np.array(grown.values), np.array(base.weights), np.array(groups)
    )
    if len(np.unique(pairs.groups)) < len({0, 1}):
        raise RefusedError(f"task {task.task}: {base.metric} has too few items to compare")
    found = paired.difference(pairs)
    is_share = not base.is_log and bool(
        ((pairs.base >= 0) & (pairs.base <= 1) & (pairs.grown >= 0) & (pairs.grown <= 1)).all()
    )
    return Comparison(
        task.task,
        task.version,
        base.metric,
        base.filter,
        task.num_fewshot,
        len(base.items),
        len(np.unique(pairs.groups)),
        int((pairs.base != pairs.grown).sum()),
        base.higher_is_better,
        base.is_log,
        base.score,
        grown.score,
        found.mean,
        found.interval,
        found.chance,
        None,
        POINTS if is_share else PERCENT,
        _needed(found.deviation, base, is_share=is_share),
        task.dataset,
    )


def _needed(deviation: float, base: MetricScores, *, is_share: bool) -> tuple[int, ...]:
    """Return the number of items that show each of the differences `SIZES`."""
    if base.is_log:
        sizes = [math.log1p(size / 100) for size in SIZES]
    else:
        sizes = [size / 100 * (1 if is_share else abs(base.score)) for size in SIZES]
    if not deviation or not all(sizes):
        return ()
    return tuple(_statistics.needed(deviation, size) for size in sizes)


def _of_group(
    metric: GroupMetric, base: Mapping[str, TaskScores], grown: Mapping[str, TaskScores]
) -> Iterator[Comparison]:
    """Yield the comparisons of a group: the items of all its tasks together, for each filter."""
    of_tasks = [
        (base[task], one, other)
        for task in metric.tasks
        for one, other in _common(base[task], grown[task])
        if one.metric == metric.metric and not one.is_log
    ]
    names = dict.fromkeys(one.filter for _, one, _ in of_tasks)
    for name in names if metric.filters is None else metric.filters:
        parts = [part for part in of_tasks if part[1].filter == name]
        if parts:
            yield _pooled(metric, parts)


def _pooled(
    metric: GroupMetric, parts: Sequence[tuple[TaskScores, MetricScores, MetricScores]]
) -> Comparison:
    """Compare the items of several tasks together.

    Each item counts alike or, if each task does, by the inverse of the number of its task's items.
    """
    first = parts[0][1]
    weights = [
        1.0 if metric.by_size else 1 / len(one.items) for _, one, _ in parts for _ in one.items
    ]
    groups = [
        place * _MANY + task.groups[item]
        for place, (task, one, _) in enumerate(parts)
        for item in one.items
    ]
    numbers = tuple(range(len(weights)))

    def joined(values: Sequence[MetricScores]) -> MetricScores:
        every = tuple(value for each in values for value in each.values)
        return replace(first, items=numbers, values=every, weights=tuple(weights))

    whole = replace(parts[0][0], task=metric.group, version=metric.version, dataset=None)
    found = _comparison(
        joined([one for _, one, _ in parts]), joined([other for *_, other in parts]), groups, whole
    )
    shots = {task.num_fewshot for task, *_ in parts}
    return found if len(shots) == 1 else replace(found, num_fewshot=None)


_MANY = 2**32
"""More than the number of items of any task."""
