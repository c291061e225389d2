"""What a source model is called in OUT: its Hub id where that is known, never a local path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_interleave.checkpoint import Checkpoint
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.hub import is_hub_id
from mergekit_interleave.reference import ModelPath, ModelRef


@dataclass(frozen=True)
class PublicNames:
    """The names of the source models before the world.

    Attributes:
        origins: The Hub id and commit of each model, those that are known.
        names: What to call each model.
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
            base_model: The Hub id of the only source model, where the user states it.

        Raises:
            DirectiveError: It is no Hub id, or there are several models.
        """
        stated = None if base_model is None else _stated(base_model, checkpoints)
        origins: dict[ModelRef, ModelPath] = {}
        names: dict[ModelRef, ModelPath] = {}
        for ref, checkpoint in checkpoints.items():
            is_local = Path(ref.path).exists()
            origin = stated or checkpoint.hub_origin or (None if is_local else ref.model)
            if origin is not None:
                origins[ref] = origin
            name = ref.model if not is_local else origin or _unused(checkpoint.path, names)
            names[ref] = stated or name
        return cls(origins, names)

    def __call__(self, ref: ModelRef) -> object:
        """The model as mergekit's YAML names it, a LoRA included."""
        model = self.names.get(ref, _without_path(ref.model))
        lora = None if ref.lora is None else _without_path(ref.lora)
        return ModelRef(model, lora, ref.override_architecture).to_yaml()


def _stated(base_model: str, checkpoints: Mapping[ModelRef, Checkpoint]) -> ModelPath:
    path, _, revision = base_model.partition("@")
    if not is_hub_id(path):
        raise DirectiveError(f"--base-model: {base_model!r} is no Hub id of the form org/name")
    if len(checkpoints) > 1:
        raise DirectiveError("--base-model: there are several source models")
    return ModelPath(path, revision or None)


def _unused(directory: Path, names: Mapping[ModelRef, ModelPath]) -> ModelPath:
    """The directory's own name, numbered where another model has it already."""
    name = directory.resolve().name
    taken = sum(other.path.rsplit("~", 1)[0] == name for other in names.values())
    return ModelPath(f"{name}~{taken + 1}" if taken else name)


def _without_path(model: ModelPath) -> ModelPath:
    return ModelPath(Path(model.path).resolve().name) if Path(model.path).exists() else model
