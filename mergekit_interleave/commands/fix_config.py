"""`fix-config`: the config.json that plain `mergekit-yaml` left broken, or did not write.

The weights are taken as they are: they must be those of the recipe, or nothing is mended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave.checkpoint import extra_files, meta_model, quantization
from mergekit_interleave.checkpoint.checkpoint import CONFIG, Checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.safetensors_header import read_json, read_tensors, to_json
from mergekit_interleave.directive.model_ref import ModelRef, parse_model
from mergekit_interleave.errors import CheckpointError, OutputError, RefusedError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning import grown_config, structure_check
from mergekit_interleave.planning.per_layer_config import Placement
from mergekit_interleave.planning.resolve import Expansion
from mergekit_interleave.planning.tensor_plan import assemble


@dataclass(frozen=True)
class Mended:
    """What was changed.

    Attributes:
        written: Whether there was no config.json before.
        changes: Each key of config.json with what it was and is.
        added: The base's small files that were missing.
    """

    written: bool
    changes: Mapping[str, tuple[object, object]]
    added: tuple[str, ...]


def mend(directory: Path, expansion: Expansion, models: Models) -> Mended:
    """Write the config.json that the recipe of a directory calls for.

    Args:
        directory: What `mergekit-yaml` wrote.
        expansion: Its recipe.
        models: Where the source models are opened.

    Raises:
        InterleaveError: It cannot be mended, and nothing is changed.
    """
    keys = expansion.directive.mergekit
    layout = mergekit_yaml.effective(expansion.layout, keys)
    sources = {model: models.open(model) for model in layout.models}
    first = base = sources[layout.models[0]]
    if "base_model" in keys:
        base = models.open(parse_model(keys["base_model"], "base_model"))
    placement = grown_config.placement_of(sources, layout)
    before = _before(directory / CONFIG)
    known = before.get("model_type") == base.model_type
    config = grown_config.restated(
        grown_config.deepened(first, layout, placement, onto=before if known else base.config),
        dtype=mergekit_yaml.dtype_of(keys),
    )
    _check_weights(directory, sources, layout, placement, config)
    models.fetch_small_files(base)
    tokenizer = extra_files.TOKENIZER_FILES if mergekit_yaml.changes_tokenizer(keys) else ()
    missing = {
        name: extra_files.read(name, file, base)
        for name, file in extra_files.collect(base, without=tokenizer)
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
    return Mended(
        not before,
        {key: pair for key, pair in grown_config.differences(before, config) if pair[0] != pair[1]},
        tuple(added),
    )


def _before(file: Path) -> dict[str, Any]:
    """What stands there; nothing, where that is no config."""
    try:
        return read_json(file)
    except CheckpointError:
        return {}


def _check_weights(
    directory: Path,
    sources: Mapping[ModelRef, Checkpoint],
    layout: Layout,
    placement: Placement,
    config: Mapping[str, Any],
) -> None:
    """Check that the weights have the names and shapes that the recipe calls for.

    Those of the checkpoint where it is at hand, or, in the layers, those of the model in memory:
    mergekit may write either.
    """
    first = sources[layout.models[0]]
    written = {name: tensor.shape for name, tensor in read_tensors(directory).items()}
    with scratch_directory() as folder:
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        if len(sources) == 1:
            structure_check.check(first, layout, folder, placement.kv_sharing_layers)
        wanted = meta_model.shapes(folder, trusted=first.trusted)
    if all(source.has_weights for source in sources.values()):
        parts = assemble(layout, sources, kv_sharing_layers=placement.kv_sharing_layers)
        stored = {part.name: part.shape for part in parts}
        if written == stored:
            return
        if quantization.KEY in first.config:  # in memory there may be no trace of the scales
            wanted = stored
    result = Checkpoint(first.ref, directory, config, is_local=True)
    found, expected = (
        {name: shape for name, shape in tensors.items() if result.layer_of(name) is not None}
        for tensors in (written, wanted)
    )
    wrong = sorted(name for name, _ in found.items() ^ expected.items())
    if wrong:
        what = "missing" if wrong[0] not in found else "one too many, or of another shape"
        raise RefusedError(
            f"{directory}: its weights are not those of its recipe: {wrong[0]} is {what}",
            hint="`mk-interleave run` takes the same recipe and writes the model",
        )
