"""Name the source models in OUT: by their Hub id if it is known, never by a local path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_interleave import _out_files
from mergekit_interleave.checkpoint.checkpoint import MAX_CONFIG, Checkpoint
from mergekit_interleave.checkpoint.hub import is_hub_id
from mergekit_interleave.checkpoint.models import Source
from mergekit_interleave.checkpoint.safetensors_header import read_json
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, is_directory_or_file
from mergekit_interleave.errors import CheckpointError, DirectiveError

REPO = "repo"
"""The key of interleave.json that is the Hub id under which the model is published."""


@dataclass(frozen=True)
class PublicNames:
    """The public names of the source models; never a local path.

    Attributes:
        origins: The Hub id and commit of each model for which they are known.
        names: The public name of each model.
    """

    origins: Mapping[ModelRef, ModelPath]
    names: Mapping[ModelRef, ModelPath]

    @classmethod
    def of(
        cls, checkpoints: Mapping[ModelRef, Checkpoint], base_model: str | None = None
    ) -> PublicNames:
        """Name the models.

        Args:
            checkpoints: The source models.
            base_model: The Hub id of the only source model, if the user gives it.

        Raises:
            DirectiveError: `base_model` is not a Hub id, or there are several models.
        """
        given = None if base_model is None else stated(base_model, checkpoints.values())
        origins: dict[ModelRef, ModelPath] = {}
        names: dict[ModelRef, ModelPath] = {}
        directories: dict[Path, ModelPath] = {}
        for ref, checkpoint in checkpoints.items():
            known = checkpoint.hub_origin or _published(checkpoint)
            if given and known and given.path != known.path:
                how = "downloaded from" if checkpoint.hub_origin else "published as"
                raise DirectiveError(
                    f"base_model: {checkpoint.path} was {how} {known.path}, not {given.path}",
                    hint="leave it out, because the Hub id is known",
                )
            origin = given or known or (None if checkpoint.is_local else ref.model)
            if origin is not None:
                origins[ref] = origin
            place = Path(os.path.abspath(checkpoint.path))  # noqa: PTH100 - keeps the name of a link
            if checkpoint.is_local and place not in directories:
                directories[place] = origin or _unused(place.name, directories)
            names[ref] = given or (directories[place] if checkpoint.is_local else ref.model)
        return cls(origins, names)

    def __call__(self, ref: ModelRef) -> object:
        """Return the public name of a model as mergekit's YAML value, including a LoRA."""
        model = self._model(ref)
        lora = None if ref.lora is None else _without_path(ref.lora)
        return ModelRef(model, lora, ref.override_architecture).to_yaml()

    def title(self, ref: ModelRef) -> str:
        """Return a model's name for a card, with the revision if several revisions are used."""
        model = self._model(ref)
        alike = {name.revision for name in self.names.values() if name.path == model.path}
        lora = None if ref.lora is None else _without_path(ref.lora)
        return titled(ModelRef(model, lora), revision=len(alike) > 1)

    def _model(self, ref: ModelRef) -> ModelPath:
        same = (name for known, name in self.names.items() if known.identity == ref.identity)
        return next(same, _without_path(ref.model))


def _published(checkpoint: Checkpoint) -> ModelPath | None:
    """Return the Hub id that a model's interleave.json states, or None."""
    try:
        repo = read_json(checkpoint.path / _out_files.MANIFEST, most=MAX_CONFIG).get(REPO)
    except CheckpointError:
        return None
    return ModelPath(repo) if isinstance(repo, str) and is_hub_id(repo) else None


def stated(base_model: str, models: Iterable[Source]) -> ModelPath:
    """Return the Hub id that the user states for the only source model.

    Args:
        base_model: The Hub id, perhaps with a revision.
        models: The source models.

    Raises:
        DirectiveError: It is not a Hub id, or there are several models.
    """
    path, _, revision = base_model.partition("@")
    checked_id(path, "base_model")
    if len({model.path.resolve() for model in models}) > 1:
        raise DirectiveError(
            "base_model: there are several source models, and it can name only one",
            hint="leave it out; they are named by their Hub ids or directory names",
        )
    return ModelPath(path, revision or None)


def checked_id(text: str, where: str) -> str:
    """Return a Hub id that the user states.

    Args:
        text: The Hub id.
        where: The parameter, for errors.

    Raises:
        DirectiveError: It is not of the form org/name.
    """
    if "/" not in text or not is_hub_id(text):
        raise DirectiveError(
            f"{where}: {text!r} is not a Hub id of the form org/name",
            hint=f"for example --{where.replace('_', '-')} me/name",
        )
    return text


def _unused(name: str, directories: Mapping[Path, ModelPath]) -> ModelPath:
    """Return the name of a directory, with a number if the name is already in use."""
    taken = sum(place.name == name for place in directories)
    return ModelPath(f"{name}~{taken + 1}" if taken else name)


def titled(ref: ModelRef, *, revision: bool) -> str:
    """Return the display name of a model, with or without its revision."""
    name = str(ref.model) if revision else ref.model.path
    return f"{name}+{ref.lora.path}" if ref.lora else name


def without_path(ref: ModelRef) -> object:
    """Return a model, which need not be opened, as mergekit's YAML value without local paths."""
    lora = None if ref.lora is None else _without_path(ref.lora)
    return ModelRef(_without_path(ref.model), lora, ref.override_architecture).to_yaml()


def _without_path(model: ModelPath) -> ModelPath:
    """Return the last part of a path on this or another machine; a Hub id stays unchanged."""
    if is_directory_or_file(model.path):
        return ModelPath(Path(model.path).resolve().name)
    if is_hub_id(model.path):
        return model
    return ModelPath(model.path.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or "model")
