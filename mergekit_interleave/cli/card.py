"""Define the command `mk-interleave card`."""

from __future__ import annotations

from typing import Annotated

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import text
from mergekit_interleave.cli.options import AsJson

EXAMPLE = "mk-interleave card deeper"


def card(  # noqa: PLR0913 - one parameter for each flag
    directory: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=
        "A model that `run`, mergekit-yaml or a trainer wrote, or a GGUF file that `run` wrote.")],
    *,
    repo: Annotated[str | None, typer.Option(metavar="ME/NAME", show_default=False, help=
        "The Hub id under which you will publish the model.")] = None,
    base_model: Annotated[str | None, typer.Option(metavar="ORG/NAME", show_default=False, help=
        "The Hub id of the base; of a model that was grown several times, of its first base.",
        )] = None,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", show_default=False, help=
        "The file that records the layers, if DIR has none: the interleave.json of the expanded "
        "model, or its directory.")] = None,
    force: Annotated[bool, typer.Option("--force", help=
        "Replace a card that was edited or that another tool wrote.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write the model card and the layer map again, from interleave.json and the weights.

    If DIR has no interleave.json, because a trainer or mergekit-yaml wrote it, it gets one.
    """
    report = api.card(directory, repo=repo, base_model=base_model, recipe=recipe, force=force)
    text.show_report(report, report.notes, as_json=as_json)
