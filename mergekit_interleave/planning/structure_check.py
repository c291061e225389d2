"""Check that the model class builds each layer of the result like the layer's source.

The class may build a layer that does not match the weights: another kind of layer, or a tensor that
only the first or last layer has. Both models are built on the meta device and compared layer by
layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.meta_model import shapes
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import RefusedError, UnrepresentableError
from mergekit_interleave.layout.layout import Layout

_Layers = Mapping[int, Mapping[str, tuple[int, ...]]]


def check(
    sources: Mapping[ModelRef, Checkpoint],
    layout: Layout,
    out: Path,
    kv_sharing_layers: Collection[int] = (),
) -> None:
    """Compare the layers of the result with those of its sources.

    Args:
        sources: The models that layers are taken from.
        layout: The layers of the result.
        out: A directory that holds the new config.json.
        kv_sharing_layers: The indices of the new layers that reuse a result of an earlier layer.

    Raises:
        UnrepresentableError: The class would build a layer differently from its source.
        RefusedError: transformers cannot build one of the models with the right number of layers.
    """
    before = {model: _stacks(sources[model].path, sources[model]) for model in layout.models}
    after = _stacks(out, sources[layout.models[0]])
    for model, stacks in before.items():
        depth = sources[model].depth
        if not any(len(layers) == depth for layers in stacks.values()):
            raise RefusedError(
                f"{model}: transformers does not build {depth} layers from its config.json"
            )
    grown = [
        stack
        for stack, layers in after.items()
        if len(layers) == len(layout)
        and all(len(found.get(stack, {})) == sources[m].depth for m, found in before.items())
    ]
    if not grown:
        raise RefusedError(
            f"transformers does not build {len(layout)} layers from the new config.json"
        )
    for stack in grown:
        for layer in layout.layers:
            family = sources[layer.model].require_family()
            rules = (rule for rule in (family.indexer_sharing, family.kv_sharing) if rule)
            absent = [name for rule in rules for name in rule.absent_tensors]
            without = absent if layer.index in kv_sharing_layers else []
            # The class may share one tensor, which only one layer stores, among all layers.
            ignored = family.never_copied if layer.new else ()
            if layer.index in kv_sharing_layers and family.kv_sharing is not None:
                ignored += tuple(family.kv_sharing.widened(sources[layer.model].layer_config))
            built = _except(ignored, after[stack][layer.index])
            expected = _except((*ignored, *without), before[layer.model][stack][layer.source])
            if built != expected:
                tensor = min(name for name, _ in built.items() ^ expected.items())
                raise UnrepresentableError(
                    f"transformers would build {tensor} of layer {layer.index} differently from "
                    f"its source, layer {layer.source}"
                )


def _except(
    parts: Collection[str], tensors: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    return {n: shape for n, shape in tensors.items() if not any(part in n for part in parts)}


def _stacks(path: Path, model: Checkpoint) -> Mapping[str, _Layers]:
    """Return the shapes of the tensors that the class builds, by stack and layer.

    Args:
        path: The directory that holds the config.json.
        model: The model that it was made from.
    """
    return layer_names.by_stack(shapes(path, trusted=model.trusted))
