"""Define the command `mk-interleave card`."""

from __future__ import annotations

from typing import Annotated

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import text
from mergekit_interleave.cli.options import AsJson

EXAMPLE = "mk-interleave card deeper"


def card(
    directory: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=
        "A model that `run` or mergekit-yaml wrote.")],
    *,
    force: Annotated[bool, typer.Option("--force", help=
        "Replace a card that was edited or that another tool wrote.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Regenerate the model card and the layer map, from interleave.json and the weights."""
    report = api.card(directory, force=force)
    text.show_report(report, report.notes, as_json=as_json)
