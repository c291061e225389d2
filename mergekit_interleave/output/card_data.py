"""What a model card says of a model, taken from interleave.json."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures import task as tasks
from mergekit_interleave.checkpoint import hub
from mergekit_interleave.checkpoint.checkpoint import CONFIG, MAX_CONFIG, config_errors
from mergekit_interleave.checkpoint.safetensors_header import read_json
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.growth import ExplicitSlices
from mergekit_interleave.directive.model_ref import parse_model
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import (
    card_metadata,
    manifest,
    model_card,
    verification_text,
)
from mergekit_interleave.output.model_card import CardData, CardSource
from mergekit_interleave.output.recorded_layout import RecordedLayout
from mergekit_interleave.planning import public_names, zeroing

log = logging.getLogger(__name__)


def write(directory: Path, title: str, content: Mapping[str, Any]) -> str | None:
    """Write card and picture beside a model that was just made.

    Args:
        directory: Where it is: config.json and recipe are there.
        title: What to call it.
        content: That of its interleave.json.

    Returns:
        The name that is suggested for it; None where the card could not be written.
    """
    try:
        own = manifest.of_content(content, directory / manifest.FILE)
        found = facts(directory, title, content, RecordedLayout(own.directive, own).layout)
        text = model_card.write(found)
        (directory / model_card.PICTURE).write_text(model_card.picture(found), encoding="utf-8")
        (directory / model_card.FILE).write_text(text, encoding="utf-8")
        for problem in card_metadata.problems(text, directory):
            log.warning("the model card: %s", problem)
    except Exception as error:  # noqa: BLE001 - whatever it is, the weights are worth more
        log.warning("the model card could not be written: %s", error)
        return None
    return found.name


def facts(
    directory: Path,
    title: str,
    content: Mapping[str, Any],
    layout: Layout,
    *,
    trained: bool = False,
) -> CardData:
    """What a card says of a model.

    Args:
        directory: Where it is.
        title: What to call it.
        content: That of its interleave.json.
        layout: Its layers.
        trained: Whether new layers were trained since.

    Raises:
        CheckpointError: interleave.json holds what none has.
    """
    with config_errors(directory, manifest.FILE):
        return _facts(directory, title, content, layout, trained=trained)


def _facts(
    directory: Path, title: str, content: Mapping[str, Any], layout: Layout, *, trained: bool
) -> CardData:
    config = read_json(directory / CONFIG, most=MAX_CONFIG)
    directive = dict(content["directive"])
    growth = directives.from_document(directive).growth
    spelled = isinstance(growth, ExplicitSlices)
    verified = dict(content.get("verified", {}))
    total, new = content.get("parameters"), content.get("new_parameters")
    own = directory / mergekit_yaml.FILE
    written = own.read_text(encoding="utf-8") if own.is_file() else None
    edits = {layer.index: layer.edit for layer in layout.new_layers if layer.edit}
    family = families.family_of_config(config)
    return CardData(
        title=title,
        layout=layout,
        growth=None if spelled else growth,
        sources=_sources(content["models"]),
        identities=edits.keys() & {int(index) for index in content.get("identities", ())},
        status=_status(content, layout, verified, trained=trained),
        norms=family is not None and any(zeroing.closes_gains(e, family) for e in edits.values()),
        fingerprint=manifest.fingerprint(layout),
        task=tasks.task_of(config),
        inherited=dict(content.get("inherited", {})),
        directive=None if spelled else yaml_io.write(directive),
        recipe=content.get("recipe", written),
        says=content.get("says", manifest.FILE),
        tools={str(name): str(version) for name, version in content.get("tools", {}).items()},
        parameters=None if total is None or new is None else (int(total), int(new)),
        nbytes=content.get("bytes"),
        dtypes=[str(dtype) for dtype in content.get("dtypes", ())],
        conversion=content.get("converted"),
        beyond_mergekit=content.get("beyond_mergekit"),
        has_remote_code="auto_map" in config,
        verified=verified,
    )


def _status(
    content: Mapping[str, Any], layout: Layout, verified: Mapping[str, Any], *, trained: bool
) -> str:
    """What the model is like beside its base, by what was verified and what its making tells."""
    if any(outcome.get("exact") is False for outcome in verified.values()):
        return model_card.WRONG
    if verification_text.TRAINED in verified:
        return model_card.TRAINED
    if trained:
        return model_card.TOUCHED
    kept = [layer.source for layer in layout.layers if not layer.new]
    equal = content.get("equal")
    if equal is True and kept == [*range(len(kept))] and len(layout.models) == 1:
        return model_card.EQUAL
    return model_card.UNKNOWN if equal is None else model_card.CHANGED


def _sources(entries: Sequence[Mapping[str, Any]]) -> list[CardSource]:
    models = [parse_model(entry["model"], "models") for entry in entries]
    revisions = {(model.model.path, model.model.revision) for model in models}
    paths = Counter(path for path, _ in revisions)
    return [
        _source(entry, public_names.titled(model, revision=paths[model.model.path] > 1))
        for entry, model in zip(entries, models, strict=True)
    ]


def _source(entry: Mapping[str, Any], title: str) -> CardSource:
    """A source model, by what interleave.json says of it."""
    ids = [entry.get(key) for key in ("hub_id", "lora_hub_id")]
    own, lora = (id_ if isinstance(id_, str) and hub.is_hub_id(id_) else None for id_ in ids)
    return CardSource(
        name=title,
        hub_id=own,
        lora=lora,
        commit=entry.get("commit"),
        depth=entry.get("layers"),
        parameters=entry.get("parameters"),
        license=entry.get("license"),
    )
