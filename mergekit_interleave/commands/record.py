"""Write what was verified into interleave.json and the card."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave.checkpoint.checkpoint import MAX_CONFIG
from mergekit_interleave.output import (
    manifest,
    model_card,
    recorded_layout,
    verification_text,
)
from mergekit_interleave.output.card_data import facts
from mergekit_interleave.output.model_card import CardData
from mergekit_interleave.verification.report import VerifyReport

log = logging.getLogger(__name__)


def record(out: Path, report: VerifyReport, measured: Mapping[str, Any] | None = None) -> None:
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
        kind, found = verification_text.FORWARD, dict(measured)
    try:
        verified = manifest.record(out, kind, found)
        page = out / model_card.FILE
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
    if model_card.is_sealed(text):
        title = next(line[2:] for line in text.splitlines() if line.startswith("# "))
        found = facts(out, title, content, recorded_layout.read(out).layout)
    new = (
        model_card.reverified(text, content["verified"])
        if found is None
        else model_card.write(found)
    )
    if new != text:
        replace_file(page, new)
    if found is not None:
        _redraw(out / model_card.PICTURE, found)


def _redraw(drawing: Path, found: CardData) -> None:
    """Draw a picture anew that is as it was drawn of the same layers; another is somebody's own."""
    if drawing.is_symlink() or not drawing.is_file() or drawing.stat().st_size > MAX_CONFIG:
        return
    new = model_card.picture(found)
    drawn = {
        model_card.picture(replace(found, status=status))
        for status in (model_card.EQUAL, model_card.TRAINED)
    }
    if drawing.read_text(encoding="utf-8", errors="replace") in drawn - {new}:
        replace_file(drawing, new)


def _last(name: str) -> str:
    """A model's name without its owner and revision: a copy of it may have no other."""
    return name.partition("@")[0].rpartition("/")[2]
