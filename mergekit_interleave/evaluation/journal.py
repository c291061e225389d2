"""Keep the scores of each model and task in a cache, so that no evaluation starts again.

A file's name is a digest of all that determines the scores. So the scores of a base serve for every
model that is compared with it, and an evaluation that was stopped goes on with the next task.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave.checkpoint.safetensors_header import read_json, to_json
from mergekit_interleave.errors import CheckpointError, OutputError
from mergekit_interleave.evaluation import scores
from mergekit_interleave.evaluation.scores import TaskScores

VARIABLE = "MK_INTERLEAVE_CACHE"
"""The environment variable that names the directory of the cache."""

VERSION = 1
_MOST = 2**30
"""The maximum bytes of a file."""


@dataclass(frozen=True)
class Journal:
    """The scores that are kept.

    Attributes:
        directory: The directory of the cache.
        settings: What determines all scores besides model and task, as JSON values.
    """

    directory: Path
    settings: dict[str, Any]

    def get(self, model: str, task: str) -> TaskScores | None:
        """Return the scores of a model on a task, or None if they are not known.

        Args:
            model: The digest of the model.
            task: The digest of the task.
        """
        try:
            return scores.from_dict(read_json(self._file(model, task), most=_MOST))
        except (CheckpointError, KeyError, TypeError, ValueError):
            return None

    def keep(self, model: str, task: str, found: TaskScores) -> None:
        """Keep the scores of a model on a task.

        Raises:
            OutputError: They cannot be written.
        """
        file = self._file(model, task)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{file.parent}: {error.strerror}", hint=f"name another directory by {VARIABLE}"
            ) from error
        replace_file(file, to_json(found.as_dict()))

    def _file(self, model: str, task: str) -> Path:
        key = json.dumps([VERSION, model, task, self.settings], sort_keys=True)
        return self.directory / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def directory() -> Path:
    """Return the directory of the cache, which need not exist."""
    stated = os.environ.get(VARIABLE)
    if stated:
        return Path(stated) / "evaluations"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mergekit-interleave" / "evaluations"
