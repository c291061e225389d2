"""Name the first base of a model by its Hub id, in interleave.json and in the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.model_ref import ModelPath
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.output import lineage, recorded_layout
from mergekit_interleave.planning import public_names


def stated(content: Mapping[str, Any], base_model: str) -> dict[str, Any]:
    """Return the content of interleave.json with the Hub id of the first base.

    Args:
        content: The content.
        base_model: The Hub id, with an optional revision.

    Raises:
        DirectiveError: It is not a Hub id, or there are several first bases.
    """
    path, _, revision = base_model.partition("@")
    public_names.checked_id(path, "--base-model")
    parts = [*content.get(lineage.KEY, ()), content]
    bases = {str(e["model"]) for part in parts for e in part["models"] if lineage.GROWTH not in e}
    if len(bases) > 1:
        raise DirectiveError(
            f"--base-model: the model has several bases: {', '.join(sorted(bases))}",
            hint="leave it out; it can name only one",
        )
    (base,) = bases
    name = str(ModelPath(path, revision or None))
    growths = [_named(growth, base, name, path) for growth in content.get(lineage.KEY, ())]
    outcomes = content.get("verified")
    return {
        **_named(content, base, name, path),
        **({"verified": _renamed(outcomes, {base: name})} if outcomes else {}),
        **({lineage.KEY: growths} if growths else {}),
    }


def _named(part: Mapping[str, Any], base: str, name: str, hub_id: str) -> dict[str, Any]:
    models = [
        entry
        if lineage.GROWTH in entry
        else {**entry, "model": _renamed(entry["model"], {base: name}), "hub_id": hub_id}
        for entry in part["models"]
    ]
    return {**part, "models": models, "directive": _renamed(part["directive"], {base: name})}


def write_recipe(directory: Path, content: Mapping[str, Any]) -> list[str]:
    """Name the models in mergekit_config.yml as interleave.json does.

    Args:
        directory: The model.
        content: The content of its interleave.json.

    Returns:
        The name of the file, if it has changed.

    Raises:
        OutputError: It cannot be written.
    """
    file = directory / mergekit_yaml.FILE
    if "layers" not in content or file.is_symlink() or not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    recorded = recorded_layout.read(directory, file)
    names = {}
    for model, entry in zip(recorded.layout.models, content["models"], strict=True):
        written = model.to_yaml()
        if isinstance(written, str) and written != entry["model"]:
            names[written] = entry["model"]
    if not names:
        return []
    comments = [line for line in text.splitlines(keepends=True) if line.startswith("#")]
    document = _renamed(yaml_io.read(text, str(file)), names)
    replace_file(file, "".join(comments) + yaml_io.write(document))
    return [file.name]


def _renamed(value: Any, names: Mapping[str, object]) -> Any:
    """Replace the names of models in a document."""
    if isinstance(value, Mapping):
        return {key: _renamed(entry, names) for key, entry in value.items()}
    if isinstance(value, list):
        return [_renamed(entry, names) for entry in value]
    return names.get(value, value) if isinstance(value, str) else value
