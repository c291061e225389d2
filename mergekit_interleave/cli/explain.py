"""Define the command `mk-interleave explain`."""

from __future__ import annotations

from typing import Annotated

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import options, text

EXAMPLE = "mk-interleave explain deeper"


def explain(
    source: Annotated[str, typer.Argument(metavar="FILE", show_default=False, help=
        "A mergekit YAML, a model card that contains one, the directory of a model, a GGUF file "
        "that `run` wrote, or - for standard input.")],
) -> None:  # fmt: skip
    """Print the shortest directive that expands to the same slices as a mergekit YAML."""
    directive = api.explain(options.opened(source) or source)
    text.tell("warning", directive.warnings)
    text.write(directive)
