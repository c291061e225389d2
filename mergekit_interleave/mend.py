"""`fix-config`: the config.json that plain `mergekit-yaml` left broken, or did not write.

The weights are taken as they are: they must be those of the recipe, or nothing is mended.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave import modelconfig, recipe, smallfiles, structure
from mergekit_interleave.checkpoint import CONFIG, Checkpoint, read_json, read_tensors
from mergekit_interleave.errors import OutputError, RefusedError
from mergekit_interleave.expand import Expansion, Models
from mergekit_interleave.layout import Layout
from mergekit_interleave.reference import parse_model


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
    layout = recipe.effective(expansion.layout, keys)
    base = models.open(layout.models[0])
    if "base_model" in keys:
        base = models.open(parse_model(keys["base_model"], "base_model"))
    dtype = keys.get("out_dtype", keys.get("dtype"))
    placement = modelconfig.placement_of(base, layout)
    before = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    config = modelconfig.restated(
        modelconfig.deepened(
            base,
            layout,
            placement,
            onto=before if before.get("model_type") == base.model_type else None,
        ),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
    )
    _check_weights(directory, base, layout, config)
    models.fetch_small_files(base)
    tokenizer = smallfiles.TOKENIZER_FILES if recipe.changes_tokenizer(keys) else ()
    missing = {
        name: smallfiles.read(name, file, base)
        for name, file in smallfiles.collect(base, without=tokenizer)
        if not (directory / name).exists()
    }
    added = {name: content for name, content in missing.items() if content is not None}
    try:
        for name, content in added.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        _replace(directory / CONFIG, config)
    except OSError as error:
        raise OutputError(f"{directory}: {error.strerror or error}") from error
    return Mended(not before, dict(_differences(before, config)), tuple(added))


def _check_weights(
    directory: Path, base: Checkpoint, layout: Layout, config: Mapping[str, Any]
) -> None:
    """Check that the class which loads the directory finds there what it looks for.

    mergekit writes the names of the checkpoint, or those of the model in memory.
    """
    written = read_tensors(directory)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, CONFIG).write_text(json.dumps(config), encoding="utf-8")
        if len(layout.models) == 1:
            structure.check(base, layout, Path(folder))
        wanted = structure.names(Path(folder), trusted=base.trusted)
    result = Checkpoint(base.ref, directory, config, is_local=True)
    found = {name for name in written if result.layer_of(name) is not None}
    expected = {name for name in wanted if result.layer_of(name) is not None}
    if found != expected and base.has_weights:
        expected = {
            result.renamed(name, layer.index)
            for layer in layout.layers
            for name in base.layer_tensors(layer.source)
        }
    for name in sorted(found ^ expected):
        raise RefusedError(
            f"{directory}: its weights are not those of its recipe: {name} is "
            f"{'missing' if name in expected else 'one too many'}",
            hint="`mk-interleave run` takes the same recipe and writes the model",
        )


def _replace(file: Path, config: Mapping[str, Any]) -> None:
    """The old file stays whole until the new one is."""
    work = file.with_name(f".{file.name}.{os.getpid()}")
    work.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    work.replace(file)


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any], place: str = ""
) -> Iterator[tuple[str, tuple[object, object]]]:
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{place}{key}.")
        elif old != new:
            yield f"{place}{key}", (old, new)
