"""interleave.json: what the new model is, layer for layer, for whoever holds it later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from mergekit_interleave import __version__, recipe
from mergekit_interleave.assembly import Part
from mergekit_interleave.checkpoint import Checkpoint
from mergekit_interleave.directive import Directive, Spelled
from mergekit_interleave.layout import Layout
from mergekit_interleave.naming import PublicNames
from mergekit_interleave.reference import ModelRef

FILE = "interleave.json"
VERSION = 1


def fingerprint(layout: Layout) -> str:
    """A name for the layout that does not depend on what its models are called.

    Only models of the same fingerprint can be merged with each other layer by layer.
    """
    models = layout.models
    layers = [
        [models.index(layer.model), layer.source, [[s.filter, s.value] for s in layer.scales]]
        for layer in layout.layers
    ]
    digest = hashlib.sha256(json.dumps(layers, separators=(",", ":")).encode())
    return digest.hexdigest()[:16]


def describe(
    directive: Directive,
    layout: Layout,
    parts: Sequence[Part],
    checkpoints: Mapping[ModelRef, Checkpoint],
    public: PublicNames,
) -> dict[str, Any]:
    """The content of interleave.json.

    Args:
        directive: What was asked for.
        layout: What that means.
        parts: Every tensor of the result.
        checkpoints: The source models.
        public: What to call the models.
    """
    zeroed = [part.name for part in parts if part.scale == 0]
    models = layout.models
    layers = []
    for layer in layout.layers:
        prefix = checkpoints[layer.model].require_family().layer_prefix(layer.index)
        layers.append(
            {
                "model": models.index(layer.model),
                "layer": layer.source,
                "new": layer.new,
                "zeroed": [n.removeprefix(prefix) for n in zeroed if n.startswith(prefix)],
                "scale": [{"filter": s.filter, "value": s.value} for s in layer.scales],
            }
        )
    return {
        "version": VERSION,
        "fingerprint": fingerprint(layout),
        "directive": _directive(directive, layout, public),
        "models": [_source(model, checkpoints[model], public) for model in models],
        "layers": layers,
        "tools": tools(),
    }


def _directive(directive: Directive, layout: Layout, public: PublicNames) -> dict[str, Any]:
    """The directive with its models under their public names; spelled slices are the recipe."""
    written = recipe.to_document(layout, directive.mergekit, public)
    if isinstance(directive.growth, Spelled):
        return written
    return directive.to_document(public) | {key: written[key] for key in directive.mergekit}


def _source(model: ModelRef, checkpoint: Checkpoint, public: PublicNames) -> dict[str, Any]:
    source = {"model": public(model), "layers": checkpoint.depth}
    origin = checkpoint.hub_origin
    return source | ({"commit": origin.revision} if origin else {})


def tools() -> dict[str, str]:
    """The versions of what made the model."""
    names = ("mergekit", "torch", "transformers", "safetensors")
    return {"mergekit-interleave": __version__, **{name: metadata.version(name) for name in names}}
