"""Record the result of `verify` in interleave.json, and in the model card if it is unedited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave.checkpoint.safetensors_header import to_json
from mergekit_interleave.output import (
    card_files,
    lineage,
    manifest,
    recorded_layout,
    verification_text,
)
from mergekit_interleave.output.card_data import card_data
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
        data = card_data(out, out.resolve().name, content, recorded_layout.read(out).layout)
        texts = {name: text for name, text in card_files.generate(data).items() if name in names}
        for name, text in texts.items():
            replace_file(out / name, text)
        recorded = {**card_files.recorded(content), **card_files.digests(texts)}
        replace_file(out / manifest.FILE, to_json({**content, card_files.KEY: recorded}))
    page = out / card_files.FILES[0]
    if page.exists() and page.name not in names:
        return (f"{page}: was edited, so the result is recorded in {manifest.FILE} only",)
    return ()


def _are_sources(names: Sequence[str], content: Mapping[str, Any]) -> bool:
    """Return whether models have the names of the sources, or of earlier bases."""
    wanted = list(map(lineage.last_part, names))
    generations = lineage.generations(content)
    return any(list(map(lineage.last_part, each.names)) == wanted for each in generations)
