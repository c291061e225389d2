"""Write evaluation results in the form that the Hub reads from `.eval_results/`.

The Hub shows a result of a data set that it knows as a benchmark, so only tasks whose items come
from a data set of the Hub have a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergekit_interleave._files import replace_file
from mergekit_interleave.errors import OutputError
from mergekit_interleave.output.evaluation_text import Row

FOLDER = ".eval_results"


def texts(rows: Sequence[Row], tools: Mapping[str, str]) -> dict[str, str]:
    """Return the text of each file, by its path in the model's directory.

    The Hub shows one result of a file, so each metric of a task has its own; the first has the name
    of the task.

    Args:
        rows: The results.
        tools: The versions of the tools that measured them.
    """
    found: dict[str, str] = {}
    for row in rows:
        if row["dataset"] is not None:
            name = _path(row["task"])
            name = _path(row["task"], row["metric"], row["filter"]) if name in found else name
            found[name] = _text(row, tools)
    return found


def _path(*names: str) -> str:
    """Return the path of a file; the names come from a file of somebody."""
    plain = (re.sub(r"[^\w-]+", "-", name, flags=re.ASCII) for name in names if name != "none")
    return f"{FOLDER}/{'_'.join(plain)}.yaml"


def _text(row: Row, tools: Mapping[str, str]) -> str:
    from huggingface_hub import (  # noqa: PLC0415 - slow to import
        EvalResultEntry,
        eval_result_entries_to_yaml,
    )

    entry = EvalResultEntry(
        dataset_id=row["dataset"]["path"],
        task_id=row["task"],
        value=row["grown"],
        dataset_revision=row["dataset"]["revision"],
        date=row["date"],
        notes=_notes(row, tools),
    )
    text: str = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return text


def _notes(row: Row, tools: Mapping[str, str]) -> str:
    metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
    words = [metric, f"{row['num_fewshot']}-shot", f"task version {row['version']}"]
    words += [f"{row['items']} items"] if row["limit"] is not None else []
    return ", ".join([*words, f"lm_eval {tools['lm_eval']}"])


def write(directory: Path, content: Mapping[str, Any], found: Mapping[str, str]) -> list[str]:
    """Write the files, and remove those that were written before and are no longer true.

    Args:
        directory: The model.
        content: The content of its interleave.json.
        found: The text of each file, by its path in the directory.

    Returns:
        The `files` of interleave.json from now on.

    Raises:
        OutputError: A file cannot be written.
    """
    listed = content.get("files")
    before = [str(name) for name in listed] if isinstance(listed, list) else []
    stale = {name for name in before if name.startswith(f"{FOLDER}/")} - found.keys()
    for name in stale:
        (directory / name).unlink(missing_ok=True)
    for name, text in found.items():
        try:
            (directory / name).parent.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{directory / FOLDER}: {error.strerror}") from error
        replace_file(directory / name, text)
    return sorted({*before, *found} - stale)
