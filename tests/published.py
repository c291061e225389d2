"""What people have published: slices of 52 passthrough merges, found on the Hub and in issues."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "data" / "published.json"

MERGES: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
"""Each with its name, models, dtype, and slices: model, start, stop, and scale if there is one."""


def document(merge: dict[str, Any]) -> dict[str, Any]:
    """A merge as mergekit's YAML has it."""
    slices = []
    for model, start, stop, *scale in merge["slices"]:
        source: dict[str, Any] = {"model": merge["models"][model], "layer_range": [start, stop]}
        if scale:
            source["parameters"] = {"scale": scale[0]}
        slices.append({"sources": [source]})
    dtype = {"dtype": merge["dtype"]} if merge["dtype"] else {}
    return {"slices": slices, "merge_method": "passthrough", **dtype}


def lines(text: str, width: int = 100) -> int:
    """How many lines a text takes, those wrapped that are longer than the width."""
    return sum(max(1, math.ceil(len(line) / width)) for line in text.splitlines())
