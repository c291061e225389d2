"""Keep a record of verification only for the weights that were verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.safetensors_header import has_weight_files
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import InterleaveError
from mergekit_interleave.output import weight_sample
from mergekit_interleave.output.verification_text import TRAINED
from mergekit_interleave.verification import report as verification
from mergekit_interleave.verification.report import VerifyReport
from mergekit_interleave.verification.same_weights import have_same_weights

_OF_WEIGHTS = ("verified", weight_sample.KEY, weight_sample.CHANGED)
"""The keys of interleave.json that are true of certain weights only."""


def carried(
    directory: Path,
    content: Mapping[str, Any],
    record: Path | None,
    report: VerifyReport,
) -> dict[str, Any] | None:
    """Return the content of interleave.json, if what it records is true of a model's weights.

    Args:
        directory: The model.
        content: The content.
        record: The file or directory that holds it; None if the model itself does.
        report: The comparison of the model with itself.

    Returns:
        The content for these weights, or None if they are not known to be those that it describes.

    Raises:
        CheckpointError: The weights cannot be read.
    """
    verified = content.get("verified") or {}
    if not verified or (report.changed and TRAINED not in verified):
        return None
    place = directory if record is None else _directory(record)
    if not weight_sample.are_those_of(content, place):
        return None
    if record is not None and not have_same_weights(directory, place):
        return None
    return dict(content)  # with the digest, which equal weights share


def compared_again(
    directory: Path,
    content: Mapping[str, Any],
    record: Path | None,
    sources: Sequence[ModelRef],
    models: Models,
) -> dict[str, Any] | None:
    """Return the content of interleave.json after a comparison with the sources.

    Args:
        directory: The model.
        content: The content.
        record: See `carried`.
        sources: The sources; empty if they are not available.
        models: Opens the sources.

    Returns:
        The content for these weights, or None if they were not found to be what the layout says. A
        model that only has the name of a source may differ, so that is no error.
    """
    if not sources:
        return None
    try:
        found = verification.verify(directory, models, against=sources, layout_from=record)
    except InterleaveError:
        return None
    if found.differences:
        return None
    return {**without_weights(content), "verified": {found.kind: found.outcome()}} | {
        weight_sample.KEY: weight_sample.digest(directory)
    }


def dropped(
    directory: Path, content: Mapping[str, Any], record: Path | None, report: VerifyReport
) -> dict[str, Any]:
    """Return the content of interleave.json for weights that were compared with no source.

    Args:
        directory: See `carried`.
        content: See `carried`.
        record: See `carried`.
        report: See `carried`.
    """
    changed = weight_sample.NEW_LAYERS if report.changed else None
    if record is None:
        changed = changed or content.get(weight_sample.CHANGED)
    elif changed is None and _differs_from(directory, _directory(record)):
        changed = weight_sample.WEIGHTS
    # The digest of the weights that the record was made for stays: these are other ones.
    sample = {weight_sample.KEY: content[weight_sample.KEY]} if weight_sample.KEY in content else {}
    return {**without_weights(content), **sample, "verified": {}} | (
        {weight_sample.CHANGED: changed} if changed else {}
    )


def without_weights(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of interleave.json without what is true of certain weights only."""
    return {key: value for key, value in content.items() if key not in _OF_WEIGHTS}


def _directory(record: Path) -> Path:
    return record if record.is_dir() else record.parent


def _differs_from(directory: Path, other: Path) -> bool:
    """Whether the weights differ from those of another directory, if that has any."""
    return has_weight_files(other) and not have_same_weights(directory, other)
