"""Identify a layout by a digest. Pure."""

from __future__ import annotations

import hashlib
import json

from mergekit_interleave.layout.layout import Layout


def fingerprint(layout: Layout) -> str:
    """Return a digest of the layout that does not depend on the names of its models."""
    models = layout.models
    layers = [
        [
            models.index(layer.model),
            layer.source,
            [
                [s.filter, float(s.value), *([float(s.fixed)] if s.fixed else [])]
                for s in layer.scales
            ],
            *[[c.filter, float(c.value), c.after, c.square] for c in layer.constants],
            *([] if layer.mean_with is None else [layer.mean_with]),
        ]
        for layer in layout.layers
    ]
    digest = hashlib.sha256(json.dumps(layers, separators=(",", ":")).encode())
    return digest.hexdigest()[:16]
