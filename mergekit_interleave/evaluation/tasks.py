"""Find and load tasks of lm-eval, and refuse those that cannot be compared item by item."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint.hub import is_hub_id
from mergekit_interleave.errors import (
    DirectiveError,
    InterleaveError,
    RefusedError,
    RequirementError,
    UnreachableError,
    nearest,
)
from mergekit_interleave.evaluation import groups, metrics
from mergekit_interleave.evaluation.offline import suite
from mergekit_interleave.evaluation.scores import Dataset, GroupMetric

WANTED = "lm_eval>=0.4.12"
"""The requirement of the extra `eval`."""

LEAST_ITEMS = 2
"""One item says nothing about the others."""


@dataclass(frozen=True)
class LoadedTask:
    """A task that is ready to run.

    Attributes:
        task: The task of lm-eval.
        documents: Its items.
        groups: The number of the group of each item.
        requests: The number of requests to a model.
        digest: A digest of all that a model is asked, and of how the answers are scored.
        dataset: Its data set on the Hub; None if that is not where the items come from.
    """

    task: Any
    documents: Sequence[Mapping[str, Any]]
    groups: tuple[int, ...]
    requests: int
    digest: str
    dataset: Dataset | None

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.task.task_name)

    @property
    def warnings(self) -> list[str]:
        """Warnings about metrics that cannot be compared, one sentence each."""
        return metrics.left_out(self.task)


@dataclass(frozen=True)
class Tasks:
    """The tasks of an evaluation.

    Attributes:
        manager: The `TaskManager` of lm-eval.
        loaded: The tasks, by name.
        group_metrics: The metrics of the groups among them.
        limit: The number of items of each task, or the share if it is below 1; None for all.
        num_fewshot: The number of examples before each question; None for that of each task.
    """

    manager: Any
    loaded: Mapping[str, LoadedTask]
    group_metrics: tuple[GroupMetric, ...]
    limit: float | None
    num_fewshot: int | None


def load(
    names: Sequence[str],
    include_paths: Sequence[Path],
    *,
    limit: float | None,
    num_fewshot: int | None,
) -> Tasks:
    """Load tasks, groups and tags by their names.

    Args:
        names: The names; `*` stands for any characters.
        include_paths: Directories with tasks that are not part of lm-eval.
        limit: See `Tasks`.
        num_fewshot: See `Tasks`.

    Raises:
        DirectiveError: There is no task of a name, or two names stand for the same task.
        RefusedError: A task cannot be run, or has no results of single items.
        RequirementError: A task needs a package that is not installed.
        UnreachableError: The data set of a task cannot be fetched.
    """
    manager, found = _found(names, include_paths)
    tasks: dict[str, Any] = {}
    sources: dict[str, str] = {}
    group_metrics: dict[str, list[GroupMetric]] = {}
    for name in found:
        with _load_errors(manager, name):
            loaded = manager.load([name])
        for group in loaded["groups"].values():
            group_metrics[group.name] = list(_group_metrics(group))
        for task_name, task in loaded["tasks"].items():
            if task_name in tasks:
                raise DirectiveError(
                    f"--tasks: {task_name} is named twice: by {sources[task_name]} and by {name}"
                )
            tasks[task_name], sources[task_name] = task, name
    ready = {}
    for name, task in tasks.items():
        _check(task)
        with _load_errors(manager, name):
            ready[name] = _ready(task, limit, num_fewshot)
    every = tuple(each for metric in group_metrics.values() for each in metric)
    return Tasks(manager, ready, every, limit, num_fewshot)


def _found(names: Sequence[str], include_paths: Sequence[Path]) -> tuple[Any, list[str]]:
    """Return a manager that knows the names, and the names without stars.

    Reading all 14,000 tasks of lm-eval takes seconds, so they are read only if they are needed.
    """
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - takes seconds to import

    paths = [str(path) for path in include_paths]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(map(manager.match_tasks, ([name] for name in names))):
        manager = TaskManager(include_path=paths)
    found: dict[str, None] = {}
    for name in names:
        matching: list[str] = manager.match_tasks([name])
        if not matching:
            known = f"like {name!r:.60}" if "*" in name else f"{name!r:.60}"
            close = nearest(name, [*suite.NAMES, *manager.all_tasks])
            raise DirectiveError(
                f"--tasks: lm-eval knows no task {known}",
                hint=f"did you mean {close}?" if close else "`lm_eval ls tasks` lists all tasks",
            )
        found |= dict.fromkeys(sorted(matching))
    return manager, [*found]


@contextmanager
def _load_errors(manager: Any, name: str) -> Iterator[None]:
    """Report any error of lm-eval and of the library datasets in one line that names the task."""
    try:
        yield
    except InterleaveError:
        raise
    except ImportError as error:
        package = error.name or str(error)
        raise RequirementError(
            f"task {name}: needs the package {package}", hint=f"pip install {package}"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        entry = manager.task_index.get(name)
        path = (entry.cfg or {}).get("dataset_path") if entry is not None else None
        if not _is_unreachable(error):
            raise RefusedError(f"task {name}: lm-eval cannot load it: {reason}") from error
        data = f" {path}" if path else ""
        raise UnreachableError(
            f"task {name}: its data set{data} cannot be fetched from the Hub: {reason}",
            hint="use --tasks offline, which needs no data set",
        ) from error


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, says that the Hub cannot be reached."""
    while error is not None:
        if isinstance(error, ConnectionError) or "Offline" in type(error).__name__:
            return True
        error = error.__cause__ or error.__context__
    return False


def _check(task: Any) -> None:
    """Check that a task can be run and compared.

    Raises:
        RefusedError: It cannot.
    """
    if getattr(task, "UNSAFE_CODE", False):
        raise RefusedError(f"task {task.task_name}: runs code that models write, which is unsafe")
    if getattr(task, "MULTIMODAL", False):
        raise RefusedError(f"task {task.task_name}: has images or sound, not only text")
    metrics.check_per_item(task)


def _ready(task: Any, limit: float | None, num_fewshot: int | None) -> LoadedTask:
    """Build the requests of a task, as lm-eval does before it runs them.

    Raises:
        RefusedError: There are too few items.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED  # noqa: PLC0415
    from lm_eval.evaluator_utils import get_sample_size  # noqa: PLC0415

    stated = task.get_config("num_fewshot")
    if stated is None or (num_fewshot is not None and stated != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    count = get_sample_size(task, limit)
    documents = [document for _, document in task.doc_iterator(limit=count)]
    if len(documents) < LEAST_ITEMS:
        raise RefusedError(f"task {task.task_name}: has too few items to compare: {len(documents)}")
    task.build_all_requests(limit=count)
    asked = [[each.request_type, each.doc_id, each.arguments] for each in task.instances]
    digest = hashlib.sha256(_text([asked, documents, _scoring(task)]).encode())
    return LoadedTask(
        task,
        documents,
        groups.groups_of(documents)
        if isinstance(documents[0], dict)
        else (*range(len(documents)),),
        len(asked),
        digest.hexdigest(),
        _dataset(task),
    )


def _scoring(task: Any) -> dict[str, Any]:
    """Return the config of a task without the places of its files."""
    config = dict(task.dump_config())
    metadata = config.get("metadata")
    if isinstance(metadata, dict):
        config["metadata"] = {k: v for k, v in metadata.items() if k != "config_source"}
    return {key: value for key, value in config.items() if key != "dataset_kwargs"}


def _text(content: object) -> str:
    """Return JSON in which no function has its address."""
    text = json.dumps(content, default=repr, sort_keys=True)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _dataset(task: Any) -> Dataset | None:
    path = task.get_config("dataset_path")
    if not isinstance(path, str) or "/" not in path or not is_hub_id(path) or Path(path).exists():
        return None
    revision = (task.get_config("dataset_kwargs") or {}).get("revision")
    return Dataset(path, revision if isinstance(revision, str) else None)


def _group_metrics(group: Any) -> Iterator[GroupMetric]:
    """Yield the metrics that a group aggregates as a mean."""
    names = tuple(task.task_name for task in group.get_all_tasks())
    for each in group.aggregate_metric_list or ():
        if each.aggregation == "mean":
            stated = [each.filter_list] if isinstance(each.filter_list, str) else each.filter_list
            filters = None if stated is None else tuple(stated)
            yield GroupMetric(
                group.name, group.version, names, each.metric, filters, bool(each.weight_by_size)
            )
