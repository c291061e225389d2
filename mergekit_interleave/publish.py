"""What is written about a model for others: its card and its picture, and what was verified.

It is taken from interleave.json, so that a card can be written again at any time, and comes out the
same. A card that cannot be written never costs the model.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_interleave import (
    card,
    claim,
    frontmatter,
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
from mergekit_interleave.checkpoint import CONFIG, MAX_CONFIG, interpreted
from mergekit_interleave.claim import Claim
from mergekit_interleave.errors import CheckpointError, InterleaveError, OutputError, RefusedError
from mergekit_interleave.expand import Models
from mergekit_interleave.growth import Spelled
from mergekit_interleave.layout import Layout
from mergekit_interleave.reference import ModelRef, parse_model
from mergekit_interleave.shards import read_json
from mergekit_interleave.staging import replace_file
from mergekit_interleave.verify import Report

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
        (directory / card.PICTURE).write_text(card.picture(found), encoding="utf-8")
        text = card.write(found)
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
        OutputError: The card is another's, or cannot be written.
        RefusedError: The model is not what it says.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    page = directory / card.FILE
    if page.is_symlink():
        raise OutputError(f"{page}: is a link, perhaps into the Hub's cache", hint="copy the model")
    old = page.read_text(encoding="utf-8") if page.is_file() else None
    if old is not None and not card.is_sealed(old) and not force:
        raise OutputError(
            f"{page}: is not as mk-interleave wrote it", hint="--force replaces it all the same"
        )
    report = verify.verify(directory, Models(cached_only=True))
    trained = _is_trained(directory, report)
    claimed = claim.read(directory)
    content = _content(directory, claimed)
    if trained and outcomes.TRAINED not in content.get("verified", {}):
        content = {**content, "verified": {}}  # what was verified of other bytes
    title = directory.resolve().name or "model"
    found = facts(directory, title, content, claimed.layout, trained=trained)
    with interpreted(directory, manifest.FILE):
        text, picture = card.write(found), card.picture(found)
    replace_file(directory / card.PICTURE, picture)
    replace_file(page, text)
    for problem in frontmatter.problems(text, directory):
        log.warning("the model card: %s", problem)
    return found


def _is_trained(directory: Path, report: Report) -> bool:
    """Whether new layers are no longer what they were made as.

    Raises:
        RefusedError: Anything else is not what it must be.
    """
    new = {layer.index for layer in report.expected.layout.new_layers}
    other = [difference for difference in report.differences if difference.layer not in new]
    if other:
        raise RefusedError(
            f"{directory}: is not what its layout says: {other[0]}",
            hint=f"mk-interleave verify {directory}",
        )
    return bool(report.differences)


def _content(directory: Path, claimed: Claim) -> Mapping[str, Any]:
    """What interleave.json says; where there is none, what it would say, as far as is known."""
    if claimed.manifest is not None:
        return claimed.manifest.content
    layout, keys = claimed.layout, claimed.directive.mergekit
    models = Models(cached_only=True)
    against = list(layout.models)
    if "base_model" in keys:
        against += [parse_model(keys["base_model"], "base_model")]
    try:
        plan = claim.of_sources(claimed, list(dict.fromkeys(against)), models).plan
    except InterleaveError:
        plan = None
    if plan is not None:
        return {**manifest.describe(plan, "mergekit", None, {}), "recipe": plan.recipe}
    own = models.open(parse_model(str(directory), "DIR"))
    family = own.require_family()
    slices = claimed.spelled
    written = recipe.to_document(slices, keys, naming.without_path)
    return {
        "directive": written,
        "models": [{"model": naming.without_path(model)} for model in layout.models],
        "identities": sorted(zeroing.identities(layout, lambda _: family)),
        "inherited": frontmatter.inherited({"": frontmatter.read(directory)}, "", ()),
        "tools": manifest.tools("mergekit"),
        "recipe": recipe.to_yaml(slices, keys, naming.without_path),
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
    verified = content.get("verified", {})
    total, new = content.get("parameters"), content.get("new_parameters")
    written = content.get("recipe")
    if written is None:
        written = (directory / recipe.FILE).read_text(encoding="utf-8")
    return Facts(
        title=title,
        layout=layout,
        growth=None if spelled else growth,
        sources=_sources(content["models"]),
        identities=frozenset(content.get("identities", ())),
        equal=content.get("equal"),
        trained=trained or outcomes.TRAINED in verified,
        fingerprint=manifest.fingerprint(layout),
        task=tasks.task_of(config),
        inherited=content.get("inherited", {}),
        directive=None if spelled else yamltext.write(directive),
        recipe=written,
        tools=content["tools"],
        parameters=None if total is None or new is None else (total, new),
        nbytes=content.get("bytes"),
        dtypes=content.get("dtypes", ()),
        conversion=content.get("converted"),
        beyond_mergekit=content.get("beyond_mergekit"),
        remote="auto_map" in config,
        verified=verified,
    )


def _sources(entries: Sequence[Mapping[str, Any]]) -> list[Source]:
    models = [parse_model(entry["model"], "models") for entry in entries]
    revisions = {(model.model.path, model.model.revision) for model in models}
    paths = Counter(path for path, _ in revisions)
    return [
        _source(entry, model, naming.titled(model, revision=paths[model.model.path] > 1))
        for entry, model in zip(entries, models, strict=True)
    ]


def _source(entry: Mapping[str, Any], model: ModelRef, title: str) -> Source:
    """A source model, by what interleave.json says of it."""
    ids = [model.path] if "commit" in entry or "/" in model.path else []
    if model.lora is not None and "/" in model.lora.path:
        ids.append(model.lora.path)
    return Source(
        name=title,
        hub_ids=ids,
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
            text = page.read_text(encoding="utf-8")
            changed = _reverified(out, text, {**own.content, "verified": verified})
            if changed != text:
                replace_file(page, changed)
    except Exception as error:  # noqa: BLE001 - whatever it is, the answer is worth more
        log.warning("what was verified could not be written down: %s", error)


def _reverified(out: Path, text: str, content: Mapping[str, Any]) -> str:
    """A card with what was verified; of one that someone has edited only that part is touched."""
    if not card.is_sealed(text):
        return card.reverified(text, content["verified"])
    title = next(line[2:] for line in text.splitlines() if line.startswith("# "))
    return card.write(facts(out, title, content, claim.read(out).layout))


def _last(name: str) -> str:
    """A model's name without its owner and revision: a copy of it may have no other."""
    return name.partition("@")[0].rpartition("/")[2]
