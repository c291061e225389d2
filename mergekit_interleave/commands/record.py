"""Record the result of `verify` in interleave.json, and in the model card if it is unedited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_interleave.output import (
    card_files,
    lineage,
    manifest,
    recorded_layout,
    verification_text,
)
from mergekit_interleave.verification.report import VerifyReport


def record(
    out: Path, report: VerifyReport, measured: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Write the result of a comparison into interleave.json and the model card.

    Nothing is written if OUT was compared with a layout other than its own, or if it differs from
    models that are not its recorded sources: such a result does not apply to OUT.

    Args:
        out: The model's directory.
        report: The comparison of its weights.
        measured: The outcome of a forward pass; if given, it is recorded instead of `report`.

    Returns:
        Warnings. A failure to write is not an error.
    """
    own = report.own
    if own is None or not (report.is_exact or _are_sources(report.against, own.content)):
        return ()
    kind, outcome = report.kind, report.outcome()
    if measured is not None:
        kind, outcome = verification_text.FORWARD, dict(measured)
    try:
        return _record(out, kind, outcome)
    except Exception as error:  # noqa: BLE001 - the result of `verify` must be returned anyway
        return (f"{out}: the result could not be recorded: {error}",)


def _record(out: Path, kind: str, outcome: Mapping[str, Any]) -> tuple[str, ...]:
    content = manifest.record(out, kind, outcome)
    if content is None:
        return ()
    names = [name for name in card_files.FILES if card_files.is_generated(out / name, content)]
    if names:
        layout = recorded_layout.read(out).layout
        manifest.write(out, card_files.write(out, content, layout, files=names)[1])
    page = out / card_files.FILES[0]
    if page.exists() and page.name not in names:
        return (f"{page}: was edited, so the result is recorded in {manifest.FILE} only",)
    return ()


def _are_sources(names: Sequence[str], content: Mapping[str, Any]) -> bool:
    """Return whether models have the names of the sources, or of earlier bases."""
    wanted = list(map(lineage.last_part, names))
    generations = lineage.generations(content)
    return any(list(map(lineage.last_part, each.names)) == wanted for each in generations)
