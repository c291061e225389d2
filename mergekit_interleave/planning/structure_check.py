"""Check that the class of the result builds each layer as it builds that layer's source.

A config can state a layout that the class does not build: one kind of layer where the weights are
of another, or a tensor that only the first or last layer has. Both models are built without memory
and compared layer by layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.meta_model import shapes
from mergekit_interleave.errors import RefusedError, UnsayableError
from mergekit_interleave.layout.layout import Layout

_Layers = Mapping[int, Mapping[str, tuple[int, ...]]]


def check(
    base: Checkpoint, layout: Layout, out: Path, kv_sharing_layers: Collection[int] = ()
) -> None:
    """Compare the layers of the two models.

    Args:
        base: The only source model.
        layout: The layers of the result.
        out: A directory that holds the new config.json.
        kv_sharing_layers: The indices of the new layers that lack what they use of others.

    Raises:
        UnsayableError: A layer would be built unlike its source.
    """
    family = base.require_family()
    lacking = [
        n
        for rule in (family.indexer_sharing, family.kv_sharing)
        if rule
        for n in rule.absent_tensors
    ]
    before, after = (_stacks(path, trusted=base.trusted) for path in (base.path, out))
    grown = [
        stack
        for stack, layers in before.items()
        if len(layers) == base.depth and len(after.get(stack, {})) == len(layout)
    ]
    if not any(len(layers) == base.depth for layers in before.values()):
        raise RefusedError(
            f"{base.ref}: transformers does not build {base.depth} layers from its config.json"
        )
    if not grown:
        raise RefusedError(
            f"transformers would not build {len(layout)} layers from the new config.json"
        )
    for stack in grown:
        for layer in layout.layers:
            without = lacking if layer.index in kv_sharing_layers else []
            # A class may tie what only one layer has stored to all of them.
            own = family.never_copied if layer.new else ()
            if layer.index in kv_sharing_layers and family.kv_sharing is not None:
                own += tuple(family.kv_sharing.widened(base.layer_config))
            ours = _but(own, after[stack][layer.index])
            theirs = _but((*own, *without), before[stack][layer.source])
            if ours != theirs:
                tensor = min(name for name, _ in ours.items() ^ theirs.items())
                raise UnsayableError(
                    f"{tensor} of the new layer {layer.index} would be built unlike that of layer "
                    f"{layer.source}, its source"
                )


def _but(
    parts: Collection[str], tensors: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    return {n: shape for n, shape in tensors.items() if not any(part in n for part in parts)}


def _stacks(path: Path, *, trusted: bool) -> Mapping[str, _Layers]:
    """The shapes of the tensors of each layer of each stack, as the class builds them."""
    return layer_names.by_stack(shapes(path, trusted=trusted))
