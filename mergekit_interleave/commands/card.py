"""`card`: regenerate README.md and layers.svg of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_interleave import _out_files
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands import _carried, gguf
from mergekit_interleave.commands.card_report import CardReport
from mergekit_interleave.commands.inputs import StrPath
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, parse_model
from mergekit_interleave.engines.registry import MERGEKIT
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.gguf.header import is_gguf
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.output import (
    base_names,
    card_data,
    card_files,
    card_metadata,
    evaluation_text,
    hub_results,
    manifest,
    recorded_layout,
    weight_sample,
)
from mergekit_interleave.output.card_data import CardData
from mergekit_interleave.output.manifest import Manifest
from mergekit_interleave.output.recorded_layout import RecordedLayout
from mergekit_interleave.output.staging import files_below
from mergekit_interleave.planning import public_names, zeroing
from mergekit_interleave.verification import report as verification
from mergekit_interleave.verification.report import VerifyReport


def card(
    directory: StrPath,
    *,
    repo: str | None = None,
    base_model: str | None = None,
    recipe: StrPath | None = None,
    force: bool = False,
) -> CardReport:
    """Write the model card and the layer map of a model again.

    Both are derived from interleave.json and from the present content of the directory. If the
    model has no interleave.json, because a trainer or mergekit-yaml wrote it, `card` writes one.

    Args:
        directory: A model that `run`, mergekit-yaml or a trainer wrote, or a GGUF file that `run`
            wrote.
        repo: The Hub id under which you will publish the model.
        base_model: The Hub id of its base; of a model that was grown several times, of its first
            base.
        recipe: The file that records the layers, if the directory has none: the interleave.json of
            the expansion, or the directory that contains it.
        force: Replace a card that was edited or written by another tool.

    Returns:
        The report: the written files, the suggested name and the bases.

    Raises:
        DirectiveError: `repo` or `base_model` is not a Hub id, or the model has several bases.
        CheckpointError: No file records the model's layers.
        OutputError: The card was edited, or cannot be written.
        RefusedError: The model does not match its layout.
    """
    place, file = Path(directory), None if recipe is None else Path(recipe)
    if is_gguf(str(place)):
        if file is not None:
            raise RefusedError("--recipe has no effect on GGUF files", hint="leave it out")
        _check_ids(repo, base_model)
        return gguf.card(place, repo=repo, base_model=base_model, force=force)
    recorded_layout.check_directory(place)
    _check_ids(repo, base_model)
    recorded, own = recorded_layout.read(place, file), place / manifest.FILE
    before = manifest.read(own).content if own.is_file() else {}
    models, warnings = Models(cached_only=True), [*recorded.directive.warnings]
    report, content = _described(place, recorded, file, models, warnings.append)
    card_files.check_replaceable(place, before, force=force)
    result = models.open(ModelRef(ModelPath(str(place))))
    content = _updated(content, report, result, is_of_expansion=file is not None)
    if evaluation_text.of_weights(content, place) is None and evaluation_text.KEY in content:
        content = {key: content[key] for key in content if key != evaluation_text.KEY}
        content["files"] = hub_results.write(place, content, {})
    content |= {} if repo is None else {manifest.REPO: repo}
    if base_model is not None:
        content = base_names.stated(content, base_model)
    record = file if recorded.manifest else None
    written = base_names.write_recipe(place, content, _recipe(report, record))
    data, content = card_files.write(place, content, recorded.layout)
    if "layers" in content:
        if file is not None or not before:
            content["files"] = _files(place, recorded)
            written = [manifest.FILE, *written]
        if content != before:
            manifest.write(place, content)
    return CardReport(
        files=(*card_files.FILES, *written),
        name=data.name,
        base_models=tuple(data.base_models),
        warnings=tuple(warnings),
        notes=tuple(_notes(data, {} if recorded.manifest is None else recorded.manifest.content)),
    )


def _check_ids(repo: str | None, base_model: str | None) -> None:
    """Check the Hub ids before anything is read."""
    if repo is not None:
        public_names.checked_id(repo, "repo")
    if base_model is not None:
        public_names.checked_id(base_model.partition("@")[0], "base_model")


def _updated(
    content: Mapping[str, Any], report: VerifyReport, result: Checkpoint, *, is_of_expansion: bool
) -> dict[str, Any]:
    """Return the content of interleave.json with what is true of the model now.

    Args:
        content: The recorded content.
        report: The comparison of the model.
        result: The model.
        is_of_expansion: Whether the content was recorded for the model before training.
    """
    expected, packed = report.expected, manifest.is_packed(result)
    updated = {**content, **manifest.totals(expected.layout, expected.specs, packed=packed)}
    if is_of_expansion:
        updated.pop(manifest.REPO, None)
        updated.pop(card_files.KEY, None)
    return updated


def _files(directory: Path, recorded: RecordedLayout) -> list[str]:
    """Return the files that `run --force` may replace: never the weights of a trainer."""
    from_mergekit = recorded.manifest is None
    usual = filter(_out_files.is_usual, files_below(directory)) if from_mergekit else ()
    return sorted({*usual, *card_files.FILES, manifest.FILE})


def _recipe(report: VerifyReport, record: Path | None) -> str | None:
    """Return the mergekit YAML of a model: that of its plan, or that beside its record."""
    if report.expected.plan is not None:
        return report.expected.plan.recipe
    if record is None:
        return None
    beside = (record if record.is_dir() else record.parent) / mergekit_yaml.FILE
    return beside.read_text(encoding="utf-8") if beside.is_file() else None


def _notes(data: CardData, before: Mapping[str, Any]) -> Iterator[str]:
    if before.get("verified") and data.status in (card_data.ALTERED, card_data.UNCOMPARED):
        yield (
            "the card does not state the recorded verification, because it is not known that the "
            "weights are those that were verified; `mk-interleave verify` checks them"
        )
    if not data.base_models:
        only = len(data.since or data.sources) == 1
        remedy = "; set it with `card DIR --base-model org/name`" if only else ""
        bases = "base's Hub id is" if only else "bases' Hub ids are"
        yield f"the card has no base_model, because the {bases} unknown{remedy}"


def _described(
    directory: Path,
    recorded: RecordedLayout,
    file: Path | None,
    models: Models,
    warn: Callable[[str], object],
) -> tuple[VerifyReport, dict[str, Any]]:
    """Verify a model, and return the content of its interleave.json or reconstruct it.

    Raises:
        RefusedError: A tensor outside the new layers differs, or another file does.
    """
    against: list[ModelRef] = []
    if recorded.manifest is None and _are_available(sources := _sources(recorded), models):
        against = sources
    report = verification.verify_as_found(directory, models, against=against, layout_from=file)
    if report.differences:
        command = ["mk-interleave verify", str(directory), *(f"--against {m}" for m in against)]
        raise RefusedError(
            f"{directory}: does not match its layout: {report.differences[0]} "
            f"(`{' '.join(command)}` lists all differences)"
        )
    if recorded.manifest is not None:
        return report, _with_outcomes(directory, recorded.manifest, file, report, models)
    plan = report.expected.plan
    if plan is None:
        content = _of_itself(directory, recorded, models, warn)
        return report, _carried.dropped(directory, content, None, report)
    outcomes = {report.kind: report.outcome()}
    content = manifest.describe(plan, MERGEKIT, None, outcomes, warn)
    sample = {weight_sample.KEY: weight_sample.digest(directory)}
    return report, {**content, **sample, "tools": {}}  # the version of mergekit is unknown


def _with_outcomes(
    directory: Path,
    recorded: Manifest,
    file: Path | None,
    report: VerifyReport,
    models: Models,
) -> dict[str, Any]:
    """Return the recorded content with the outcomes of verification that are true of a model."""
    known = _carried.carried(directory, recorded.content, file, report)
    if known is None and not report.changed:
        sources = _sources(RecordedLayout(recorded.directive, recorded))
        sources = sources if _are_available(sources, models) else []
        known = _carried.compared_again(directory, recorded.content, file, sources, models)
    return known or _carried.dropped(directory, recorded.content, file, report)


def _sources(recorded: RecordedLayout) -> list[ModelRef]:
    """Return the models that a recipe names, in the order of `verify --against`."""
    keys = recorded.directive.mergekit
    base = [parse_model(keys["base_model"], "base_model")] if "base_model" in keys else []
    return list(dict.fromkeys((*recorded.layout.models, *base)))


def _are_available(sources: Sequence[ModelRef], models: Models) -> bool:
    found = [models.open_if_possible(model) for model in sources]
    return all(checkpoint is not None and checkpoint.has_weights for checkpoint in found)


def _of_itself(
    directory: Path, recorded: RecordedLayout, models: Models, warn: Callable[[str], object]
) -> dict[str, Any]:
    """Reconstruct what is known of a model whose sources are not available."""
    layout, keys = recorded.layout, recorded.directive.mergekit
    family = models.open(ModelRef(ModelPath(str(directory)))).require_family()
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
