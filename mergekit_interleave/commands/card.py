"""What is written about a model for others: its card and its picture, and what was verified.

It is taken from interleave.json, so that a card can be written again at any time, and comes out the
same. A card that cannot be written never costs the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave.checkpoint.checkpoint import MAX_CONFIG, Checkpoint, config_errors
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands.inputs import StrPath
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, parse_model
from mergekit_interleave.engines.registry import MERGEKIT
from mergekit_interleave.errors import CheckpointError, InterleaveError, OutputError, RefusedError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.output import (
    card_metadata,
    manifest,
    model_card,
    recorded_layout,
    verification_text,
)
from mergekit_interleave.output.card_data import facts
from mergekit_interleave.output.model_card import CardData
from mergekit_interleave.output.recorded_layout import RecordedLayout
from mergekit_interleave.planning import public_names, zeroing
from mergekit_interleave.verification import expected as expectations
from mergekit_interleave.verification import report as verification
from mergekit_interleave.verification.expected import ExpectedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CardReport:
    """What was written.

    Attributes:
        files: The names of the files.
        name: The suggested name of the model.
        base_models: The Hub ids of its bases.
        warnings: What to beware of, one sentence each.
        notes: What else to know, one sentence each.
    """

    files: tuple[str, ...]
    name: str
    base_models: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as lines of text."""
        return [*(f"{name}: written" for name in self.files), f"suggested name: {self.name}"]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values, as `card --json` prints it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}


def card(directory: StrPath, *, force: bool = False) -> CardReport:
    """Write the model card and the layer map again, from interleave.json and the weights.

    Args:
        directory: The model.
        force: Replace a card that was edited, or that another tool wrote.
    """
    written = rewrite(Path(directory), force=force)
    note = "no base_model, since its Hub id is not known; `run --base-model org/name` states it"
    return CardReport(
        files=(model_card.FILE, model_card.PICTURE),
        name=written.name,
        base_models=tuple(written.base_models),
        notes=() if written.base_models else (note,),
    )


def rewrite(directory: Path, *, force: bool = False) -> CardData:
    """Write the card of a model anew, after a look at what it holds.

    Args:
        directory: The model.
        force: Replace a card that is not as this project wrote it.

    Raises:
        CheckpointError: Nothing says what the model is.
        OutputError: The card is another tool's or a person's, or cannot be written.
        RefusedError: The model is not what it says.
    """
    recorded_layout.check_directory(directory)
    page, drawing = directory / model_card.FILE, directory / model_card.PICTURE
    _check_own(page, drawing, force=force)
    models = Models(cached_only=True)
    try:
        claimed = recorded_layout.read(directory)
    except CheckpointError as error:
        if not (directory / manifest.FILE).exists():
            error.hint = f"of a trained model: copy {manifest.FILE} of the expansion there"
        raise
    expected, trained = _look(directory, models)
    result = models.open(ModelRef(ModelPath(str(directory))))
    packed = manifest.is_packed(result)
    content = {
        **_content(directory, claimed, result),
        **manifest.totals(expected.layout, expected.specs, packed=packed),
    }
    if trained and verification_text.TRAINED not in content.get("verified", {}):
        content["verified"] = {}  # what was verified was of other bytes
    title = directory.resolve().name or "model"
    found = facts(directory, title, content, claimed.layout, trained=trained)
    with config_errors(directory, manifest.FILE):
        text, picture = model_card.write(found), model_card.picture(found)
    replace_file(page, text)
    replace_file(drawing, picture)
    for problem in card_metadata.problems(text, directory):
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
    if not (own and model_card.is_sealed(page.read_text(encoding="utf-8", errors="replace"))):
        raise OutputError(
            f"{page}: is not as mk-interleave wrote it", hint="--force replaces it all the same"
        )


def _look(directory: Path, models: Models) -> tuple[ExpectedModel, bool]:
    """What the model must be, and whether its new layers were trained since.

    Raises:
        RefusedError: Anything but its new layers is not what it must be.
    """
    report = verification.verify(directory, models)
    if not report.differences:
        return report.expected, False
    lenient = verification.verify(directory, models, trained=True)
    if lenient.differences:
        raise RefusedError(
            f"{directory}: is not what its layout says: {lenient.differences[0]}",
            hint=f"mk-interleave verify {directory}",
        )
    new = {layer.index for layer in report.expected.layout.new_layers}
    trained = any(difference.layer in new for difference in report.differences)
    return lenient.expected, trained


def _content(directory: Path, claimed: RecordedLayout, result: Checkpoint) -> Mapping[str, Any]:
    """What interleave.json says; where there is none, what it would say, as far as is known."""
    if claimed.manifest is not None:
        return claimed.manifest.content
    layout, keys = claimed.layout, claimed.directive.mergekit
    against = list(layout.models)
    if "base_model" in keys:
        against += [parse_model(keys["base_model"], "base_model")]
    try:
        sources = Models(cached_only=True)
        plan = expectations.of_sources(claimed, list(dict.fromkeys(against)), sources).plan
    except InterleaveError:
        plan = None
    if plan is not None:
        made = manifest.describe(plan, MERGEKIT, None, {})
        return {**made, "tools": {}, "recipe": plan.recipe, "says": mergekit_yaml.FILE}
    family = result.require_family()
    return {
        "directive": mergekit_yaml.to_document(claimed.spelled, keys, public_names.without_path),
        "models": [{"model": public_names.without_path(model)} for model in layout.models],
        "identities": sorted(zeroing.identities(layout, lambda _: family)),
        "inherited": card_metadata.inherited({"": card_metadata.read(directory)}, "", ()),
        "recipe": mergekit_yaml.to_yaml(claimed.spelled, keys, public_names.without_path),
        "says": mergekit_yaml.FILE,
    }
