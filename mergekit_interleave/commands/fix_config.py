"""`fix-config`: fix the config.json that mergekit-yaml left broken or did not write.

The weights are not changed. If they do not match the recipe, nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave.checkpoint import extra_files, meta_model
from mergekit_interleave.checkpoint.checkpoint import CONFIG, Checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.safetensors_header import read_json, read_tensors, to_json
from mergekit_interleave.commands import inputs
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.inputs import ModelLike, StrPath
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive.model_ref import parse_model
from mergekit_interleave.errors import CheckpointError, DirectiveError, OutputError, RefusedError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.output import recorded_layout
from mergekit_interleave.planning import grown_config, structure_check
from mergekit_interleave.planning.resolve import Expansion, resolve


@dataclass(frozen=True)
class FixConfigReport:
    """The changes that `fix-config` made.

    Attributes:
        directory: The model.
        layers: The number of its layers.
        written: Whether there was no config.json before.
        changes: The changed keys of config.json, each with its old and new value.
        added: The names of the base's files that were missing.
        warnings: Warnings, one sentence each.
    """

    directory: Path
    layers: int
    written: bool
    changes: Mapping[str, tuple[object, object]]
    added: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        if self.written:
            lines = [f"config.json: written, for {self.layers} layers"]
        else:
            lines = [
                f"config.json: {key}: {json.dumps(old)} -> {json.dumps(new)}"
                for key, (old, new) in self.changes.items()
            ]
        lines += [f"{name}: added" for name in self.added]
        return lines or [f"{self.directory}: its config.json is correct"]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, as `fix-config --json` prints it."""
        return {
            "directory": str(self.directory),
            "layers": self.layers,
            "written": self.written,
            "config": {key: {"from": old, "to": new} for key, (old, new) in self.changes.items()},
            "added": list(self.added),
            "warnings": list(self.warnings),
        }


def fix_config(
    directory: StrPath, *, recipe: StrPath | None = None, model: ModelLike | None = None
) -> FixConfigReport:
    """Fix the config.json that mergekit-yaml left broken or did not write.

    Args:
        directory: The directory that mergekit-yaml wrote.
        recipe: The YAML that it was made from. The default is mergekit_config.yml in the
            directory, which is missing if mergekit stopped early.
        model: The source model, if it is not at the path that the recipe names.

    Returns:
        The changes.

    Raises:
        DirectiveError: No recipe is given, and the directory contains none.
        RefusedError: The weights do not match the recipe; nothing is changed.
        InterleaveError: The config.json cannot be written; nothing is changed.
    """
    place = Path(directory)
    own = place / mergekit_yaml.FILE
    recorded_layout.check_directory(place)
    if recipe is None and not own.is_file():
        raise DirectiveError(
            f"{directory}: contains no {mergekit_yaml.FILE}, so its layers are unknown",
            hint="name the YAML that it was made from: --recipe FILE",
        )
    models = Models()
    wanted = inputs.parse(directives.load_file(Path(recipe or own)), {"model": model})
    with restored_settings():
        try:
            expansion = resolve(wanted, models, strict=True)
        except CheckpointError as error:
            if model is None:
                error.hint = "name the directory of the recipe's model: --model DIR"
            raise
        return _fix(place, expansion, models)


def _fix(directory: Path, expansion: Expansion, models: Models) -> FixConfigReport:
    keys = expansion.directive.mergekit
    layout = mergekit_yaml.effective(expansion.layout, keys)
    sources = {model: models.open(model) for model in layout.models}
    first = base = sources[layout.models[0]]
    if "base_model" in keys:
        base = models.open(parse_model(keys["base_model"], "base_model"))
    grown = grown_config.grow(sources, layout)
    before = _before(directory / CONFIG)
    known = before.get("model_type") == base.model_type
    config = grown.config(before if known else base.config, dtype=mergekit_yaml.dtype_of(keys))
    _check_weights(directory, first, len(layout), config)
    warnings = [*expansion.warnings, *models.fetch_small_files(base)]
    tokenizer = extra_files.TOKENIZER_FILES if mergekit_yaml.changes_tokenizer(keys) else ()
    missing = {
        name: extra_files.read(name, file, base, warnings.append)
        for name, file in extra_files.collect(base, without=tokenizer, warn=warnings.append)
        if not (directory / name).exists()
    }
    added = {
        name: grown_config.moved_file(name, content, first, layout)
        for name, content in missing.items()
        if content is not None
    }
    try:
        for name, content in added.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        if not (directory / mergekit_yaml.FILE).exists():
            (directory / mergekit_yaml.FILE).write_text(expansion.recipe, encoding="utf-8")
        replace_file(directory / CONFIG, to_json(config))
    except OSError as error:
        raise OutputError(f"{directory}: {error.strerror or error}") from error
    differences = grown_config.differences(before, config)
    return FixConfigReport(
        directory,
        len(layout),
        written=not before,
        changes={key: (old, new) for key, (old, new) in differences if old != new},
        added=tuple(added),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _before(file: Path) -> dict[str, Any]:
    """Return the present config, or an empty one if it cannot be read."""
    try:
        return read_json(file)
    except CheckpointError:
        return {}


def _check_weights(
    directory: Path, first: Checkpoint, depth: int, config: Mapping[str, Any]
) -> None:
    """Check that the class of the new config.json loads the weights as they are stored.

    mergekit writes either the tensors of the sources or those that the class has in memory.

    Raises:
        RefusedError: A tensor is missing, has another shape or is not loaded.
    """
    forms = structure_check.forms_of_tensors(read_tensors(directory))
    with scratch_directory() as folder:
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        if not meta_model.has_class(folder, trusted=first.trusted):
            return  # the code of a checkpoint is not run
        problem = structure_check.problem_of(folder, forms, first, depth=depth)
    if problem is not None:
        raise RefusedError(
            f"{directory}: its weights do not match its recipe: {problem.what}",
            hint="write the model from the recipe with `mk-interleave run`",
        )
