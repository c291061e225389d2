"""`card`: regenerate README.md and layers.svg of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.safetensors_header import to_json
from mergekit_interleave.commands.inputs import StrPath
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, parse_model
from mergekit_interleave.engines.registry import MERGEKIT
from mergekit_interleave.errors import CheckpointError, InterleaveError, RefusedError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.output import (
    card_files,
    card_metadata,
    manifest,
    recorded_layout,
    verification_text,
)
from mergekit_interleave.output.card_data import card_data
from mergekit_interleave.output.recorded_layout import RecordedLayout
from mergekit_interleave.planning import public_names, zeroing
from mergekit_interleave.verification import expected as expectations
from mergekit_interleave.verification import report as verification
from mergekit_interleave.verification.expected import ExpectedModel


@dataclass(frozen=True)
class CardReport:
    """The files that `card` wrote.

    Attributes:
        files: The names of the files.
        name: The suggested name of the model.
        base_models: The Hub ids of its bases.
        warnings: Warnings, one sentence each.
        notes: Notes, one sentence each.
    """

    files: tuple[str, ...]
    name: str
    base_models: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return [*(f"{name}: written" for name in self.files), f"suggested name: {self.name}"]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, as `card --json` prints it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}


def card(directory: StrPath, *, force: bool = False) -> CardReport:
    """Regenerate the model card and the layer map of a model.

    Both are derived from interleave.json and from the present content of the directory.

    Args:
        directory: A model that `run` or mergekit-yaml wrote.
        force: Replace a card that was edited or written by another tool.

    Returns:
        The report: the written files, the suggested name and the bases.

    Raises:
        CheckpointError: The directory does not record the model's layers.
        OutputError: The card was edited, or cannot be written.
        RefusedError: The model does not match its layout.
    """
    place = Path(directory)
    recorded_layout.check_directory(place)
    warnings: list[str] = []
    try:
        recorded = recorded_layout.read(place)
    except CheckpointError as error:
        if not (place / manifest.FILE).exists():
            error.hint = f"for a trained model, copy {manifest.FILE} from the expanded model"
        raise
    before = {} if recorded.manifest is None else recorded.manifest.content
    card_files.check_replaceable(place, before, force=force)
    models = Models(cached_only=True)
    expected, trained = _verify(place, models)
    result = models.open(ModelRef(ModelPath(str(place))))
    content = {
        **(before or _content(place, recorded, result, warnings.append)),
        **manifest.totals(expected.layout, expected.specs, packed=manifest.is_packed(result)),
    }
    if trained and verification_text.TRAINED not in content.get("verified", {}):
        content["verified"] = {}  # the recorded outcomes are those before training
    title = place.resolve().name or "model"
    data = card_data(place, title, content, recorded.layout, trained=trained)
    texts = card_files.generate(data)
    for name, text in texts.items():
        replace_file(place / name, text)
    digests = card_files.digests(texts)
    file = place / manifest.FILE
    if before and before.get(card_files.KEY) != digests and not file.is_symlink():
        replace_file(file, to_json({**before, card_files.KEY: digests}))
    note = (
        "the card has no base_model, because the base's Hub id is unknown; set it with "
        "`run --base-model org/name`"
    )
    return CardReport(
        files=tuple(texts),
        name=data.name,
        base_models=tuple(data.base_models),
        warnings=tuple(warnings),
        notes=() if data.base_models else (note,),
    )


def _verify(directory: Path, models: Models) -> tuple[ExpectedModel, bool]:
    """Return the expected model, and whether its new layers were trained after `run` wrote it.

    Raises:
        RefusedError: A tensor outside the new layers differs, or another file does.
    """
    report = verification.verify_as_found(directory, models)
    if report.differences:
        raise RefusedError(
            f"{directory}: does not match its layout: {report.differences[0]}",
            hint=f"mk-interleave verify {directory}",
        )
    return report.expected, bool(report.changed)


def _content(
    directory: Path, recorded: RecordedLayout, result: Checkpoint, warn: Callable[[str], object]
) -> Mapping[str, Any]:
    """Reconstruct the content of a missing interleave.json, as far as it is known."""
    layout, keys = recorded.layout, recorded.directive.mergekit
    against = list(layout.models)
    if "base_model" in keys:
        against += [parse_model(keys["base_model"], "base_model")]
    try:
        sources = Models(cached_only=True)
        plan = expectations.of_sources(recorded, list(dict.fromkeys(against)), sources).plan
    except InterleaveError:
        plan = None
    if plan is not None:
        content = manifest.describe(plan, MERGEKIT, None, {}, warn)
        return {**content, "tools": {}, "recipe": plan.recipe, "layers_file": mergekit_yaml.FILE}
    family = result.require_family()
    inherited = card_metadata.inherited({"": card_metadata.read(directory, warn)}, "", ())
    return {
        "directive": mergekit_yaml.to_document(
            recorded.as_written, keys, public_names.without_path
        ),
        "models": [{"model": public_names.without_path(model)} for model in layout.models],
        "identities": sorted(zeroing.identities(layout, lambda _: family)),
        "inherited": inherited,
        "recipe": mergekit_yaml.to_yaml(recorded.as_written, keys, public_names.without_path),
        "layers_file": mergekit_yaml.FILE,
    }
