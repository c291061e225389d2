"""`train`: a trainer's settings that train the new layers and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands.inputs import StrPath
from mergekit_interleave.training import settings, target


@dataclass(frozen=True)
class TrainerSettings:
    """The settings of a trainer.

    Attributes:
        trainer: The trainer.
        text: The settings: YAML, shell words or Python, as the trainer takes them.
        method: How the new layers are trained: `full` or `lora`.
        notes: What else to know, one sentence each.
        warnings: What to beware of, one sentence each.
    """

    trainer: str
    text: str
    method: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values, as `train --json` prints them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}


def train(
    directory: StrPath,
    *,
    trainer: str,
    method: str | None = None,
    recipe: StrPath | None = None,
    trust_remote_code: bool = False,
) -> TrainerSettings:
    """Write a trainer's settings that train the new layers and nothing else."""
    settings.check(trainer, method)
    models = Models(trust_remote_code=trust_remote_code)
    file = None if recipe is None else Path(recipe)
    found = settings.settings(target.read(Path(directory), models, file), trainer, method)
    return TrainerSettings(trainer, found.text, found.method, found.notes)
