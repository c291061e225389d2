"""Define the command `mk-interleave schema`."""

from __future__ import annotations

import mergekit_interleave as api
from mergekit_interleave.cli import text

EXAMPLE = "mk-interleave schema > interleave.schema.json"


def schema() -> None:
    """Print the JSON Schema of a directive, which editors use to complete and check directives."""
    text.show_json(api.schema())
