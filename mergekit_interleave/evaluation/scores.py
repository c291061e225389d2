"""Hold what one model scored on each item of a task. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MetricScores:
    """The values of one metric, of the items that have one.

    The score of the task is the weighted mean of the values or, if `is_log`, its exponential.

    Attributes:
        metric: The name of the metric, such as `acc`.
        filter: The name of the filter that made the answers, such as `none`.
        higher_is_better: Whether a higher score is better; None if the task does not say.
        is_log: Whether the values are logarithms, such as those of a perplexity.
        items: The numbers of the items, ascending.
        values: The value of each item.
        weights: The weight of each item, such as its number of words.
    """

    metric: str
    filter: str
    higher_is_better: bool | None
    is_log: bool
    items: tuple[int, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def key(self) -> str:
        """The name of the metric and of the filter, as lm-eval spells them."""
        return f"{self.metric},{self.filter}"

    @property
    def mean(self) -> float:
        """The weighted mean of the values."""
        total = math.fsum(v * w for v, w in zip(self.values, self.weights, strict=True))
        return total / math.fsum(self.weights)

    @property
    def score(self) -> float:
        """The score of the task, as lm-eval computes it."""
        return math.exp(min(self.mean, _LARGEST)) if self.is_log else self.mean


_LARGEST = 700.0
"""The largest number whose exponential does not overflow."""


@dataclass(frozen=True)
class Dataset:
    """The data set of a task.

    Attributes:
        path: Its id on the Hub.
        revision: Its commit or branch, if the task states one.
    """

    path: str
    revision: str | None = None


@dataclass(frozen=True)
class TaskScores:
    """What one model scored on a task.

    Attributes:
        task: The name of the task.
        version: Its version, as the task states it.
        num_fewshot: The number of examples before each question.
        dataset: Its data set on the Hub; None if that is not where the items come from.
        items: A digest of each item, with its prompt and the right answer.
        groups: The number of the group of each item; see `paired.Pairs`.
        metrics: The metrics.
    """

    task: str
    version: str
    num_fewshot: int
    dataset: Dataset | None
    items: tuple[str, ...]
    groups: tuple[int, ...]
    metrics: tuple[MetricScores, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class GroupMetric:
    """A metric of a group of tasks, which is a mean of those of its tasks.

    Attributes:
        group: The name of the group.
        version: Its version.
        tasks: The names of its tasks.
        metric: The name of the metric.
        filters: The names of the filters; None for those that there are.
        by_size: Whether each item counts alike, and not each task.
    """

    group: str
    version: str
    tasks: tuple[str, ...]
    metric: str
    filters: tuple[str, ...] | None
    by_size: bool


def from_dict(content: Mapping[str, Any]) -> TaskScores:
    """Return the scores of which `as_dict` made JSON values.

    Raises:
        KeyError, TypeError, ValueError: They are malformed.
    """
    dataset = content["dataset"]
    metrics = tuple(
        MetricScores(
            str(each["metric"]),
            str(each["filter"]),
            each["higher_is_better"],
            bool(each["is_log"]),
            tuple(map(int, each["items"])),
            tuple(map(float, each["values"])),
            tuple(map(float, each["weights"])),
        )
        for each in content["metrics"]
    )
    return TaskScores(
        str(content["task"]),
        str(content["version"]),
        int(content["num_fewshot"]),
        None if dataset is None else Dataset(str(dataset["path"]), dataset["revision"]),
        tuple(map(str, content["items"])),
        tuple(map(int, content["groups"])),
        metrics,
    )
