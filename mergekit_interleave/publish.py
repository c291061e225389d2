"""What is written about a model for others: its card and its picture, and what was verified.

It is taken from interleave.json, so that a card can be written again at any time, and comes out the
same. A card that cannot be written never costs the model.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_interleave import (
    architecture,
    card,
    claim,
    frontmatter,
    hub,
    manifest,
    naming,
    outcomes,
    recipe,
    tasks,
    verify,
    yamltext,
    zeroing,
)
from mergekit_interleave import directive as directives
from mergekit_interleave.card import Facts, Source
from mergekit_interleave.checkpoint import CONFIG, MAX_CONFIG, Checkpoint, interpreted
from mergekit_interleave.claim import Claim, Expected
from mergekit_interleave.errors import CheckpointError, InterleaveError, OutputError, RefusedError
from mergekit_interleave.expand import Models
from mergekit_interleave.growth import Spelled
from mergekit_interleave.layout import Layout
from mergekit_interleave.reference import ModelPath, ModelRef, parse_model
from mergekit_interleave.shards import read_json
from mergekit_interleave.staging import replace_file
from mergekit_interleave.verify import Report
from mergekit_interleave.weights import MERGEKIT

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
        found = facts(directory, title, content, Claim(own.directive, own).layout)
        text = card.write(found)
        (directory / card.PICTURE).write_text(card.picture(found), encoding="utf-8")
        (directory / card.FILE).write_text(text, encoding="utf-8")
        for problem in frontmatter.problems(text, directory):
            log.warning("the model card: %s", problem)
    except Exception as error:  # noqa: BLE001 - whatever it is, the weights are worth more
        log.warning("the model card could not be written: %s", error)
        return None
    return found.name


def rewrite(directory: Path, *, force: bool = False) -> Facts:
    """Write the card of a model anew, after a look at what it holds.

    Args:
        directory: The model.
        force: Replace a card that is not as this project wrote it.

    Raises:
        CheckpointError: Nothing says what the model is.
        OutputError: The card is another tool's or a person's, or cannot be written.
        RefusedError: The model is not what it says.
    """
    claim.check_directory(directory)
    page, drawing = directory / card.FILE, directory / card.PICTURE
    _check_own(page, drawing, force=force)
    models = Models(cached_only=True)
    try:
        claimed = claim.read(directory)
    except CheckpointError as error:
        if not (directory / manifest.FILE).exists():
            error.hint = f"of a trained model: copy {manifest.FILE} of the expansion there"
        raise
    expected, trained = _look(directory, models)
    result = models.open(ModelRef(ModelPath(str(directory))))
    packed = manifest.is_packed(result)
    content = {
        **_content(directory, claimed, result),
        **manifest.totals(expected.layout, expected.parts, packed=packed),
    }
    if trained and outcomes.TRAINED not in content.get("verified", {}):
        content["verified"] = {}  # what was verified was of other bytes
    title = directory.resolve().name or "model"
    found = facts(directory, title, content, claimed.layout, trained=trained)
    with interpreted(directory, manifest.FILE):
        text, picture = card.write(found), card.picture(found)
    replace_file(page, text)
    replace_file(drawing, picture)
    for problem in frontmatter.problems(text, directory):
        log.warning("the model card: %s", problem)
    return found


def _check_own(page: Path, drawing: Path, *, force: bool) -> None:
    """Check that card and picture may be replaced."""
    for file in (page, drawing):
        if file.is_symlink():
            hint = "copy the model"
            raise OutputError(f"{file}: is a link, perhaps into the Hub's cache", hint=hint)
        if file.exists() and not file.is_file():
            raise OutputError(f"{file}: is no file")
    if force or not page.exists():
        return
    own = page.stat().st_size <= MAX_CONFIG
    if not (own and card.is_sealed(page.read_text(encoding="utf-8", errors="replace"))):
        raise OutputError(
            f"{page}: is not as mk-interleave wrote it", hint="--force replaces it all the same"
        )


def _look(directory: Path, models: Models) -> tuple[Expected, bool]:
    """What the model must be, and whether its new layers were trained since.

    Raises:
        RefusedError: Anything but its new layers is not what it must be.
    """
    report = verify.verify(directory, models)
    if not report.differences:
        return report.expected, False
    lenient = verify.verify(directory, models, trained=True)
    if lenient.differences:
        raise RefusedError(
            f"{directory}: is not what its layout says: {lenient.differences[0]}",
            hint=f"mk-interleave verify {directory}",
        )
    new = {layer.index for layer in report.expected.layout.new_layers}
    trained = any(difference.layer in new for difference in report.differences)
    return lenient.expected, trained


def _content(directory: Path, claimed: Claim, result: Checkpoint) -> Mapping[str, Any]:
    """What interleave.json says; where there is none, what it would say, as far as is known."""
    if claimed.manifest is not None:
        return claimed.manifest.content
    layout, keys = claimed.layout, claimed.directive.mergekit
    against = list(layout.models)
    if "base_model" in keys:
        against += [parse_model(keys["base_model"], "base_model")]
    try:
        sources = Models(cached_only=True)
        plan = claim.of_sources(claimed, list(dict.fromkeys(against)), sources).plan
    except InterleaveError:
        plan = None
    if plan is not None:
        made = manifest.describe(plan, MERGEKIT, None, {})
        return {**made, "tools": {}, "recipe": plan.recipe, "says": recipe.FILE}
    family = result.require_family()
    return {
        "directive": recipe.to_document(claimed.spelled, keys, naming.without_path),
        "models": [{"model": naming.without_path(model)} for model in layout.models],
        "identities": sorted(zeroing.identities(layout, lambda _: family)),
        "inherited": frontmatter.inherited({"": frontmatter.read(directory)}, "", ()),
        "recipe": recipe.to_yaml(claimed.spelled, keys, naming.without_path),
        "says": recipe.FILE,
    }


def facts(
    directory: Path,
    title: str,
    content: Mapping[str, Any],
    layout: Layout,
    *,
    trained: bool = False,
) -> Facts:
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
    with interpreted(directory, manifest.FILE):
        return _facts(directory, title, content, layout, trained=trained)


def _facts(
    directory: Path, title: str, content: Mapping[str, Any], layout: Layout, *, trained: bool
) -> Facts:
    config = read_json(directory / CONFIG, most=MAX_CONFIG)
    directive = dict(content["directive"])
    growth = directives.from_document(directive).growth
    spelled = isinstance(growth, Spelled)
    verified = dict(content.get("verified", {}))
    total, new = content.get("parameters"), content.get("new_parameters")
    own = directory / recipe.FILE
    written = own.read_text(encoding="utf-8") if own.is_file() else None
    edits = {layer.index: layer.edit for layer in layout.new_layers if layer.edit}
    family = architecture.family_of_config(config)
    return Facts(
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
        directive=None if spelled else yamltext.write(directive),
        recipe=content.get("recipe", written),
        says=content.get("says", manifest.FILE),
        tools={str(name): str(version) for name, version in content.get("tools", {}).items()},
        parameters=None if total is None or new is None else (int(total), int(new)),
        nbytes=content.get("bytes"),
        dtypes=[str(dtype) for dtype in content.get("dtypes", ())],
        conversion=content.get("converted"),
        beyond_mergekit=content.get("beyond_mergekit"),
        remote="auto_map" in config,
        verified=verified,
    )


def _status(
    content: Mapping[str, Any], layout: Layout, verified: Mapping[str, Any], *, trained: bool
) -> str:
    """What the model is like beside its base, by what was verified and what its making tells."""
    if any(outcome.get("exact") is False for outcome in verified.values()):
        return card.WRONG
    if outcomes.TRAINED in verified:
        return card.TRAINED
    if trained:
        return card.TOUCHED
    kept = [layer.source for layer in layout.layers if not layer.new]
    equal = content.get("equal")
    if equal is True and kept == [*range(len(kept))] and len(layout.models) == 1:
        return card.EQUAL
    return card.UNKNOWN if equal is None else card.CHANGED


def _sources(entries: Sequence[Mapping[str, Any]]) -> list[Source]:
    models = [parse_model(entry["model"], "models") for entry in entries]
    revisions = {(model.model.path, model.model.revision) for model in models}
    paths = Counter(path for path, _ in revisions)
    return [
        _source(entry, naming.titled(model, revision=paths[model.model.path] > 1))
        for entry, model in zip(entries, models, strict=True)
    ]


def _source(entry: Mapping[str, Any], title: str) -> Source:
    """A source model, by what interleave.json says of it."""
    ids = [entry.get(key) for key in ("hub_id", "lora_hub_id")]
    own, lora = (id_ if isinstance(id_, str) and hub.is_hub_id(id_) else None for id_ in ids)
    return Source(
        name=title,
        hub_id=own,
        lora=lora,
        commit=entry.get("commit"),
        depth=entry.get("layers"),
        parameters=entry.get("parameters"),
        license=entry.get("license"),
    )


def record(out: Path, report: Report, measured: Mapping[str, Any] | None = None) -> None:
    """Write what was verified into interleave.json and the card; that it cannot is no failure.

    Nothing is written where OUT was held to other words than its own, or failed against others than
    those that it was made of: that says nothing of OUT.

    Args:
        out: The model's directory.
        report: What came of its weights.
        measured: What came of a forward pass, where that is to be written.
    """
    own = report.own
    stated = [] if own is None else [_last(name) for name in own.models]
    if own is None or not (report.is_exact or stated == [_last(name) for name in report.against]):
        return
    kind, found = report.kind, report.outcome()
    if measured is not None:
        kind, found = outcomes.FORWARD, dict(measured)
    try:
        verified = manifest.record(out, kind, found)
        page = out / card.FILE
        if verified is not None and page.is_file() and not page.is_symlink():
            if page.stat().st_size > MAX_CONFIG:
                return
            _reverify(out, page, {**own.content, "verified": verified})
    except Exception as error:  # noqa: BLE001 - whatever it is, the answer is worth more
        log.warning("what was verified could not be written down: %s", error)


def _reverify(out: Path, page: Path, content: Mapping[str, Any]) -> None:
    """Write into a card what was verified; of one that someone has edited only that is touched."""
    text = page.read_text(encoding="utf-8")
    found = None
    if card.is_sealed(text):
        title = next(line[2:] for line in text.splitlines() if line.startswith("# "))
        found = facts(out, title, content, claim.read(out).layout)
    new = card.reverified(text, content["verified"]) if found is None else card.write(found)
    if new != text:
        replace_file(page, new)
    if found is not None:
        _redraw(out / card.PICTURE, found)


def _redraw(drawing: Path, found: Facts) -> None:
    """Draw a picture anew that is as it was drawn of the same layers; another is somebody's own."""
    if drawing.is_symlink() or not drawing.is_file() or drawing.stat().st_size > MAX_CONFIG:
        return
    new = card.picture(found)
    drawn = {card.picture(replace(found, status=status)) for status in (card.EQUAL, card.TRAINED)}
    if drawing.read_text(encoding="utf-8", errors="replace") in drawn - {new}:
        replace_file(drawing, new)


def _last(name: str) -> str:
    """A model's name without its owner and revision: a copy of it may have no other."""
    return name.partition("@")[0].rpartition("/")[2]
