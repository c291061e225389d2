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
            "--as",
            metavar="|".join(TOOLS),
            help="The form to write: mergekit's YAML, the arguments of PEFT's LoraConfig "
            "(layer_replication) as JSON, or exllamav3's layer_map.",
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
