"""`train`: write the settings with which a trainer trains certain layers and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.inputs import StrPath
from mergekit_interleave.training import selection, target, write
from mergekit_interleave.training.settings import TrainerSettings
from mergekit_interleave.training.trainers import registry

__all__ = ["TrainerSettings", "train"]


def train(  # noqa: PLR0913 - one parameter for each option
    directory: StrPath,
    *,
    trainer: str,
    method: str | None = None,
    layers: str = selection.NEW,
    also: Sequence[str] = (),
    recipe: StrPath | None = None,
    since: str | None = None,
    trust_remote_code: bool = False,
) -> TrainerSettings:
    """Write the settings with which a trainer trains the new layers, or others that you name.

    Nothing is trained, and no weights are read.

    Args:
        directory: The model's directory, written by `run` or by mergekit-yaml.
        trainer: The name of a trainer, as `mk-interleave train --help` lists them.
        method: `full` trains the new layers themselves; `lora` trains a LoRA of them. The default
            is `full` if the trainer supports it for these layers, else `lora`.
        layers: The layers to train: `new`, `seams` (the layers at both sides of each merge seam) or
            a range of indices such as `8:24`; several are separated by commas.
        also: What to train outside the layers: `lm_head`, `embed_tokens`, or the names that the
            model's class has for them. If they share one tensor, either name trains it.
        recipe: The file that records which layers are new, if the directory has none: an
            interleave.json, a mergekit config, or the directory of a model that has one of them.
        since: A model in the lineage of a model that was grown several times. All layers that it
            does not have are new. The default is the source of the last growth.
        trust_remote_code: Run code from the model. By default none is run.

    Returns:
        The settings as `text`, with the `method` that was used and `notes` on it.

    Raises:
        DirectiveError: There is no such trainer or method, `recipe` does not record layers, `since`
            is not in the lineage, `layers` has an unknown word, or the model has no module that
            `also` names.
        CheckpointError: The directory is not a model, or does not record which layers are new.
        LayoutError: The model has no such layers.
        RefusedError: No layers are selected, or the trainer cannot train exactly these layers.
    """
    registry.find(trainer, method)
    models = Models(trust_remote_code=trust_remote_code)
    file = None if recipe is None else Path(recipe)
    with restored_settings():
        wanted = target.read(Path(directory), models, file, since, layers=layers, also=also)
        return write.write(wanted, trainer, method)
