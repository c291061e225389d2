"""interleave.json: what the new model is, layer for layer, for whoever holds it later."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import metadata
from typing import Any

from mergekit_interleave import __version__, recipe
from mergekit_interleave.directive import Spelled
from mergekit_interleave.layout import Layout
from mergekit_interleave.preflight import Preflight
from mergekit_interleave.reference import ModelRef

FILE = "interleave.json"
VERSION = 1


def fingerprint(layout: Layout) -> str:
    """A name for the layout that does not depend on what its models are called.

    Only models of the same fingerprint can be merged with each other layer by layer.
    """
    models = layout.models
    layers = [
        [
            models.index(layer.model),
            layer.source,
            [[s.filter, s.value] for s in layer.scales],
            *[[c.filter, c.value, c.after, c.square] for c in layer.constants],
        ]
        for layer in layout.layers
    ]
    digest = hashlib.sha256(json.dumps(layers, separators=(",", ":")).encode())
    return digest.hexdigest()[:16]


def describe(plan: Preflight, files: list[str], engine: str) -> dict[str, Any]:
    """The content of interleave.json.

    Args:
        plan: What was made.
        files: The names that stand in OUT, which --force may replace.
        engine: What wrote the weights.
    """
    layout, models = plan.layout, plan.layout.models
    zeroed: dict[int, list[str]] = {layer.index: [] for layer in layout.layers}
    filled: dict[int, dict[str, float]] = {layer.index: {} for layer in layout.layers}
    for part in plan.parts:
        if part.layer is not None:
            tensor = re.split(rf"\.{part.layer}\.", part.name, maxsplit=1)[-1]
            if part.constant is not None:
                filled[part.layer][tensor] = part.constant.value
            elif part.scale == 0:
                zeroed[part.layer].append(tensor)
    return {
        "version": VERSION,
        "fingerprint": fingerprint(layout),
        "directive": directive_of(plan),
        "models": [_source(model, plan) for model in models],
        "layers": [
            {
                "model": models.index(layer.model),
                "layer": layer.source,
                "new": layer.new,
                "zeroed": zeroed[layer.index],
                "set": filled[layer.index],
                "scale": [{"filter": s.filter, "value": s.value} for s in layer.scales],
            }
            for layer in layout.layers
        ],
        "files": files,
        "engine": engine,
        "tools": tools(engine),
    }


def directive_of(plan: Preflight) -> dict[str, Any]:
    """The directive with its models under their public names; spelled slices are the recipe."""
    directive = plan.expansion.directive
    written = recipe.to_document(
        plan.expansion.layout, plan.mergekit, plan.public, plan.expansion.modules
    )
    if isinstance(directive.growth, Spelled):
        return written
    return directive.to_document(plan.public) | {key: written[key] for key in plan.mergekit}


def _source(model: ModelRef, plan: Preflight) -> dict[str, Any]:
    checkpoint = plan.sources[model]
    source = {"model": plan.public(model), "layers": checkpoint.depth}
    origin = checkpoint.hub_origin
    return source | ({"commit": origin.revision} if origin else {})


def tools(engine: str) -> dict[str, str]:
    """The versions of what made the model; the stream engine is this project's own."""
    names = ("mergekit", "torch", "transformers", "safetensors") if engine == "mergekit" else ()
    return {"mergekit-interleave": __version__, **{name: metadata.version(name) for name in names}}
