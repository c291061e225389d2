"""Record evaluation results in interleave.json, the model card and `.eval_results/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_interleave._interrupts import uninterrupted
from mergekit_interleave.checkpoint.checkpoint import MAX_CONFIG
from mergekit_interleave.checkpoint.safetensors_header import read_json
from mergekit_interleave.commands.evaluation_report import EvaluationReport
from mergekit_interleave.evaluation import comparison
from mergekit_interleave.evaluation.comparison import Comparison
from mergekit_interleave.output import (
    card_files,
    evaluation_text,
    hub_results,
    manifest,
    recorded_layout,
    weight_sample,
)


def record(directory: Path, report: EvaluationReport) -> tuple[str, ...]:
    """Write results into the files of the grown model, completely or not at all.

    Results of the same weights against the same base stay, and all are corrected together.

    Args:
        directory: The model's directory.
        report: The results.

    Returns:
        Notes about what was written.

    Raises:
        InterleaveError: A file is malformed, or cannot be written.
    """
    file = directory / manifest.FILE
    if file.is_symlink():
        return (f"{file} is a link, perhaps into the Hub's cache, so no result is recorded",)
    if not file.is_file():
        return (f"{directory} has no {manifest.FILE}, so no result is recorded; `card` writes one",)
    return uninterrupted(partial(_record, directory, report))


def _record(directory: Path, report: EvaluationReport) -> tuple[str, ...]:
    content = read_json(directory / manifest.FILE, most=MAX_CONFIG)
    layout = recorded_layout.read(directory).layout
    head = {
        "against": report.against,
        weight_sample.KEY: weight_sample.digest(directory),
        "dtype": report.dtype,
        "tools": dict(report.tools),
    }
    rows = _together(content.get(evaluation_text.KEY), head, report.rows)
    texts = hub_results.texts(rows, report.tools)
    content["files"] = hub_results.write(directory, content, texts)
    content[evaluation_text.KEY] = {**head, "results": rows}
    names = [
        name for name in card_files.FILES if card_files.is_generated(directory / name, content)
    ]
    content = card_files.write(directory, content, layout, files=names)[1]
    manifest.write(directory, content)
    return (*_notes(directory, names, texts),)


def _together(
    before: object, head: Mapping[str, Any], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return new results, and those before that are as valid and not measured again.

    All are corrected for their number.
    """
    if isinstance(before, dict) and all(before.get(key) == value for key, value in head.items()):
        new = {row["task"] for row in rows}
        kept = [row for row in before.get("results", ()) if row["task"] not in new]
        rows = [*kept, *rows]
    found = comparison.corrected([Comparison.from_dict(row) for row in rows])
    return [{**row, **each.as_dict()} for row, each in zip(rows, found, strict=True)]


def _notes(directory: Path, names: list[str], texts: Mapping[str, str]) -> Iterator[str]:
    card = card_files.FILES[0]
    written = [manifest.FILE, *([card] if card in names else []), *texts]
    yield f"{directory}: results recorded in {', '.join(written)}"
    if (directory / card).exists() and card not in names:
        yield f"{directory / card}: was edited, so it does not have the results; see `card --force`"
