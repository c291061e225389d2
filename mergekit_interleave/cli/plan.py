"""Define the command `mk-interleave plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import options, text
from mergekit_interleave.cli.options import AsJson, Directive, Flags, NonIdentity, TrustRemoteCode
from mergekit_interleave.output import svg

EXAMPLE = "mk-interleave plan --every 4 --svg layers.svg"


@options.takes_words
def plan(  # noqa: PLR0913 - one parameter for each flag
    directive: Directive = None,
    *,
    flags: Flags,
    allow_non_identity: NonIdentity = False,
    drawing: Annotated[
        str | None,
        typer.Option(
            "--svg",
            metavar="FILE",
            show_default=False,
            help="Write the layer map to this file as an SVG; only such a picture is replaced.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what `run` would write, without writing the model."""
    if drawing is not None:
        svg.check_file(Path(drawing))
    found = api.plan(
        options.opened(directive),
        allow_non_identity=allow_non_identity,
        trust_remote_code=trust_remote_code,
        **options.words(flags),
    )
    if drawing is not None:
        Path(drawing).write_text(found.svg(), encoding="utf-8")
    if as_json:
        text.show_json(found.as_dict())
    elif sys.stdout.isatty():
        _show_on_terminal(found)
    else:
        for name, words in found.lines():
            text.show(f"{name:<11} {words}")


def _show_on_terminal(found: api.Plan) -> None:
    """Print the layers as a picture, and the rest as a table."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(highlight=False)
    plain = not (console.encoding or "").lower().startswith("utf")
    for line in found.strip(console.width, ascii_only=plain):
        console.print(Text.assemble(*line), no_wrap=True, crop=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    before = None
    for name, words in found.lines():
        style = "yellow" if name == "warning" else ""
        label = Text("" if name == before else name, style=style)
        table.add_row(label, Text(text.printable(words), style=style))
        before = name
    console.print()
    console.print(table)
