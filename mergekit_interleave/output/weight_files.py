"""Tell whether a model's weights are the files that its interleave.json describes.

interleave.json records the size and the time of the last change of each file with weights. A digest
would read all weights again, which takes longer than a run that shares disk blocks with the base.
A copy with other times therefore counts as other weights, until they are compared again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "weight_files"
"""The key of interleave.json that lists the files: name, then size in bytes and time in ns."""

CHANGED = "changed"
"""The key that tells what has changed since the model was made, if that was not verified."""

NEW_LAYERS, WEIGHTS = ("new layers", "weights")
"""Its values: new layers are not what the layout says, or some weights are not what `run` wrote."""


def stamps(directory: Path) -> dict[str, list[int]]:
    """Return the size and the time of the last change of each file with weights, by its name."""
    files = {file.name: file.stat() for file in sorted(directory.glob("*.safetensors"))}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in files.items()}


def are_those_of(content: Mapping[str, Any], directory: Path) -> bool:
    """Return whether a directory has the files that an interleave.json describes, unchanged."""
    found = stamps(directory)
    return bool(found) and content.get(KEY) == found
