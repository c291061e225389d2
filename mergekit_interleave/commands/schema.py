"""`schema`: print the JSON Schema of a directive."""

from __future__ import annotations

from typing import Any

from mergekit_interleave.directive import json_schema


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a directive, which editors use to complete and check directives."""
    return dict(json_schema.schema())
