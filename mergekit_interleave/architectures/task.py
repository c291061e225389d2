"""Look up the task of a model and the class that loads it, by the class in its config.json.

The facts are in `data/tasks.json`; a test compares them with the tables of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

from mergekit_interleave.architectures import family as families


class _Loaded(TypedDict):
    tag: str
    load: str


class TaskEntry(_Loaded, total=False):
    """The task of one kind of model class. The name of the entry is the suffix of the class names.

    The first entry that matches applies.

    Attributes:
        tag: The `pipeline_tag` of the Hub.
        load: The transformers class that loads such models.
        composite: Whether the entry matches composites only.
    """

    composite: bool


@dataclass(frozen=True)
class Task:
    """The task of a model.

    Attributes:
        tag: The `pipeline_tag` of the Hub; None if config.json does not determine it.
        load: The transformers class that loads the model.
    """

    tag: str | None = None
    load: str = "AutoModelForCausalLM"


def task_of(config: Mapping[str, Any]) -> Task:
    """Return the task of a model, according to its config.json."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str):
        return Task()
    family = families.family_of_config(config)
    composite = family is not None and family.composite
    for suffix, task in _tasks().items():
        if name.endswith(suffix) and (composite or not task.get("composite")):
            return Task(task["tag"], task["load"])
    return Task()


DATA = Path(__file__).parent / "data" / "tasks.json"


@cache
def _tasks() -> dict[str, TaskEntry]:
    tasks: dict[str, TaskEntry] = json.loads(DATA.read_text(encoding="utf-8"))
    return tasks
