"""What a model is for, and which class loads it, by the class that config.json names.

The facts are in `data/tasks.json`; a test derives them again from transformers' own tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_interleave.architectures import family as families


@dataclass(frozen=True)
class Task:
    """What a model is for.

    Attributes:
        tag: The Hub's `pipeline_tag`; None where it cannot be told.
        load: The class of transformers that loads it.
    """

    tag: str | None = None
    load: str = "AutoModelForCausalLM"


def task_of(config: Mapping[str, Any]) -> Task:
    """The task of a model, by its config.json."""
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


@cache
def _tasks() -> dict[str, dict[str, Any]]:
    file = Path(__file__).parent / "data" / "tasks.json"
    tasks: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return tasks
