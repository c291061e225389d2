"""`train`: write the settings with which a trainer trains the new layers and nothing else."""

from __future__ import annotations

from pathlib import Path

from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.inputs import StrPath
from mergekit_interleave.training import target, write
from mergekit_interleave.training.settings import TrainerSettings
from mergekit_interleave.training.trainers import registry

__all__ = ["TrainerSettings", "train"]


def train(  # noqa: PLR0913 - one parameter for each option
    directory: StrPath,
    *,
    trainer: str,
    method: str | None = None,
    recipe: StrPath | None = None,
    since: str | None = None,
    trust_remote_code: bool = False,
) -> TrainerSettings:
    """Write the settings with which a trainer trains the new layers and nothing else.

    Nothing is trained, and no weights are read.

    Args:
        directory: The model's directory, written by `run` or by mergekit-yaml.
        trainer: The name of a trainer, as `mk-interleave train --help` lists them.
        method: `full` trains the new layers themselves; `lora` trains a LoRA of them. The default
            is `full` if the trainer supports it for these layers, else `lora`.
        recipe: The file that records which layers are new, if the directory has none: an
            interleave.json, a mergekit config, or the directory of a model that has one of them.
        since: A model in the lineage of a model that was grown several times. All layers that it
            does not have are new. The default is the source of the last growth.
        trust_remote_code: Run code from the model. By default none is run.

    Returns:
        The settings as `text`, with the `method` that was used and `notes` on it.

    Raises:
        DirectiveError: There is no such trainer or method, `recipe` does not record layers, or
            `since` is not in the lineage.
        CheckpointError: The directory is not a model, or does not record which layers are new.
        RefusedError: No layer is new, or the trainer cannot train exactly the new layers.
    """
    registry.find(trainer, method)
    models = Models(trust_remote_code=trust_remote_code)
    file = None if recipe is None else Path(recipe)
    with restored_settings():
        return write.write(target.read(Path(directory), models, file, since), trainer, method)
