"""Turn what lm-eval records of each item into values of which the score is a mean.

lm-eval aggregates the values of a metric by a function. Where that is a mean, or a perplexity, the
difference of two models is one, too. F1 of a whole data set, BLEU and others are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.evaluation.scores import MetricScores


class _Form(NamedTuple):
    """How the values of a metric are stored and aggregated.

    Attributes:
        is_weighted: Whether a value is a pair of a log-likelihood and a weight.
        is_log: Whether the score is the exponential of the mean.
        factor: The factor that turns a stored number into a value.
    """

    is_weighted: bool
    is_log: bool
    factor: float


def _form(aggregation: object) -> _Form | None:
    """Return the form of what a function aggregates, or None if the result is no mean."""
    from lm_eval.api import metrics  # noqa: PLC0415 - takes seconds to import

    forms = {
        metrics.mean: _Form(is_weighted=False, is_log=False, factor=1),
        metrics.perplexity: _Form(is_weighted=False, is_log=True, factor=-1),
        metrics.weighted_perplexity: _Form(is_weighted=True, is_log=True, factor=-1),
        metrics.bits_per_byte: _Form(is_weighted=True, is_log=False, factor=-1 / math.log(2)),
    }
    return next((form for known, form in forms.items() if known is aggregation), None)


def check_per_item(task: Any) -> None:
    """Check that a task has a metric with a value of each item.

    Args:
        task: A task of lm-eval.

    Raises:
        RefusedError: It has none.
    """
    aggregations: Mapping[str, object] = task.aggregation()
    if aggregations and not any(map(_form, aggregations.values())):
        raise _no_values(task.task_name, aggregations)


def left_out(task: Any) -> list[str]:
    """Return a warning for each metric of a task that has no value of each item.

    Args:
        task: A task of lm-eval.
    """
    return [
        f"task {task.task_name}: {metric} is left out, because it is computed of all items together"
        for metric, aggregation in task.aggregation().items()
        if _form(aggregation) is None
    ]


def _no_values(name: str, metrics: Iterable[str]) -> RefusedError:
    return RefusedError(
        f"task {name}: {' and '.join(metrics)} is computed of all items together, so there is no "
        "result for each item to compare"
    )


def metrics_of(task: Any, samples: Sequence[Mapping[str, Any]]) -> tuple[MetricScores, ...]:
    """Return the values of each metric that has a value of each item.

    Args:
        task: A task of lm-eval.
        samples: What it records, one entry for each item and filter.

    Raises:
        RefusedError: No metric has such values, or one of them is no finite number.
    """
    recorded: dict[tuple[str, str], list[tuple[int, Any]]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            entry = (int(sample["doc_id"]), sample[metric])
            recorded.setdefault((metric, sample["filter"]), []).append(entry)
    found = []
    for (metric, name), entries in recorded.items():
        form = _form_of(task, metric, entries)
        if form is not None:
            found.append(_scores(task, metric, name, form, sorted(entries, key=_number)))
    if not found:
        raise _no_values(task.task_name, dict.fromkeys(metric for metric, _ in recorded))
    return tuple(found)


def _number(entry: tuple[int, Any]) -> int:
    return entry[0]


def _form_of(task: Any, metric: str, entries: Sequence[tuple[int, Any]]) -> _Form | None:
    """Return the form of a metric; lm-eval takes the mean if a task states no function."""
    stated: Callable[..., Any] | None = task.aggregation().get(metric)
    form = _Form(is_weighted=False, is_log=False, factor=1) if stated is None else _form(stated)
    if form is None or form.is_weighted:
        return form
    return form if all(isinstance(value, Real | np.bool_) for _, value in entries) else None


def _scores(
    task: Any, metric: str, name: str, form: _Form, entries: Sequence[tuple[int, Any]]
) -> MetricScores:
    pairs = [value if form.is_weighted else (value, 1) for _, value in entries]
    values = tuple(form.factor * float(total) / float(weight) for total, weight in pairs)
    broken = sum(not math.isfinite(value) for value in values)
    if broken:
        raise RefusedError(
            f"task {task.task_name}: {metric} is not a finite number for {broken:,} of "
            f"{len(values):,} items"
        )
    return MetricScores(
        metric,
        name,
        task.higher_is_better().get(metric),
        form.is_log,
        tuple(map(_number, entries)),
        values,
        tuple(float(weight) for _, weight in pairs),
    )
