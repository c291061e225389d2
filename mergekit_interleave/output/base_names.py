"""Name the first base of a model by its Hub id, in interleave.json and in the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.model_ref import ModelPath, parse_model
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.output import lineage
from mergekit_interleave.output.lineage import Entry
from mergekit_interleave.output.recorded_layout import RecordedLayout
from mergekit_interleave.planning import public_names


def stated(content: Entry, base_model: str) -> dict[str, Any]:
    """Return the content of interleave.json with the Hub id of the first base.

    Args:
        content: The content.
        base_model: The Hub id, with an optional revision.

    Raises:
        DirectiveError: It is not a Hub id, or there are several first bases.
    """
    path, _, revision = base_model.partition("@")
    public_names.checked_id(path, "base_model")
    parts = [*content.get(lineage.KEY, ()), content]
    found = [e["model"] for part in parts for e in part["models"] if lineage.GROWTH not in e]
    base, *others = [model for i, model in enumerate(found) if model not in found[:i]]
    if others:
        raise DirectiveError(
            f"base_model: the model has several bases: {base} and {others[0]}",
            hint="leave --base-model out; it can name only one",
        )
    grown = [entry.get("hub_id") for entry in lineage.entries(content) if lineage.GROWTH in entry]
    if path in (*grown, content.get(public_names.REPO)):
        raise DirectiveError(
            f"base_model: {path} is a model that was grown from the first base, {base}",
            hint="name the first base, or leave --base-model out",
        )
    old = parse_model(base, "models")
    new = replace(old, model=ModelPath(path, revision or None)).to_yaml()
    *growths, own = (_named(part, base, new, path) for part in parts)
    return {**own, **({lineage.KEY: growths} if growths else {})}


def _named(part: Entry, base: object, new: object, hub_id: str) -> dict[str, Any]:
    """Return an interleave.json, or a growth in it, with another name of the first base."""
    models = [
        entry if lineage.GROWTH in entry else {**entry, "model": new, "hub_id": hub_id}
        for entry in part["models"]
    ]
    if any(entry["model"] == base for entry in models):
        return {**part, "models": models}  # a grown model has the same name
    named = {
        key: _renamed(part[key], [(base, new)]) for key in ("directive", "verified") if key in part
    }
    return {**part, "models": models, **named}


def write_recipe(directory: Path, content: Entry, recipe: str | None) -> list[str]:
    """Write mergekit_config.yml with the names of the models in interleave.json.

    Args:
        directory: The model.
        content: The content of its interleave.json.
        recipe: The recipe; None to change the names in the present file, if there is one.

    Returns:
        The name of the file, if it has changed.

    Raises:
        OutputError: It cannot be written.
    """
    file = directory / mergekit_yaml.FILE
    present = file.read_text(encoding="utf-8") if file.is_file() else None
    text = present if recipe is None else recipe
    if "layers" not in content or file.is_symlink() or text is None:
        return []
    directive = directives.parse(text, str(file))
    models = RecordedLayout(directive, None).layout.models
    names = [
        (model.to_yaml(), entry["model"])
        for model, entry in zip(models, content["models"], strict=True)
    ]
    comments = [line for line in text.splitlines(keepends=True) if line.startswith("#")]
    document = yaml_io.read(text, str(file))
    named = _renamed(document, names)
    if named != document:
        text = "".join(comments) + yaml_io.write(named)
    if text == present:
        return []
    replace_file(file, text)
    return [file.name]


def _renamed(value: Any, names: Sequence[tuple[object, object]]) -> Any:
    """Replace the names of models in a document; a name may be a mapping."""
    for old, new in names:
        if value == old:
            return new
    if isinstance(value, Mapping):
        return {key: _renamed(entry, names) for key, entry in value.items()}
    return [_renamed(entry, names) for entry in value] if isinstance(value, list) else value
