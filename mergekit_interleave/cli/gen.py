"""Define the command `mk-interleave gen`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import options, text
from mergekit_interleave.cli.options import Directive, Flags, NonIdentity
from mergekit_interleave.commands.tools import MERGEKIT, TOOLS
from mergekit_interleave.errors import OutputError

EXAMPLE = "mk-interleave gen --every 4 > cfg.yml"


@options.takes_words
def gen(
    directive: Directive = None,
    *,
    flags: Flags,
    allow_non_identity: NonIdentity = False,
    tool: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="|".join(TOOLS),
            help="The tool to write for: mergekit's YAML, or the arguments of PEFT's LoraConfig "
            "(layer_replication), as JSON.",
            autocompletion=options.offering(*TOOLS),
        ),
    ] = MERGEKIT,
) -> None:
    """Print the mergekit YAML of a directive, ready for mergekit-yaml."""
    if sys.stdout is None:
        raise OutputError("standard output is closed")
    recipe = api.gen(
        options.opened(directive),
        tool=tool,
        allow_non_identity=allow_non_identity,
        **options.words(flags),
    )
    text.tell("warning", recipe.warnings)
    text.write(recipe)
