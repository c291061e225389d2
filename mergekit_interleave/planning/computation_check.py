"""Check that each layer of the result computes what its source computes.

A class may compute with the index of a layer, or share a tensor among layers, although all names
and shapes are right. The class runs the sources and the result without weights, and the operations
of each layer are compared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from mergekit_interleave.checkpoint import computation, layer_names
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.computation import Computation
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import RefusedError, UnrepresentableError, Warn
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning import grown_config
from mergekit_interleave.planning.expansion_plan import ExpansionPlan


def check_plan(plan: ExpansionPlan, out: Path, warn: Warn, *, mix: bool = False) -> None:
    """Compare the operations of each layer with those of its source, if the data cannot vouch.

    Args:
        plan: The plan.
        out: A directory that holds the new config.json.
        warn: Called with a warning if the operations cannot be compared.
        mix: Whether models may be stacked that are not compatible.

    Raises:
        UnrepresentableError: A layer would compute something else than its source.
    """
    family = plan.first.require_family()
    is_stack = len(plan.sources) > 1 and not mix
    if is_stack or family.is_unknown or family.own_code:
        reason = check(plan.sources, plan.layout, out, plan.placement.kv_sharing_layers)
        if reason is not None:
            warn(f"it is not checked that no layer computes with its index: {reason}")


def check(
    sources: Mapping[ModelRef, Checkpoint],
    layout: Layout,
    out: Path,
    kv_sharing_layers: Collection[int] = (),
) -> str | None:
    """Compare the operations of each layer with those of its source.

    Args:
        sources: The models that layers are taken from.
        layout: The layers of the result.
        out: A directory that holds the new config.json.
        kv_sharing_layers: The indices of the new layers that reuse a result of an earlier layer.

    Returns:
        Why the operations cannot be compared, or None if they were.

    Raises:
        UnrepresentableError: A layer would compute something else than its source.
    """
    first = sources[layout.models[0]]
    try:
        before = {model: _recorded(sources[model].path, sources[model]) for model in layout.models}
        after = _recorded(out, first, len(layout))
    except RefusedError as error:
        return str(error)
    _check_shared(after, layout)
    for layer in layout.layers:
        own = after.by_layer.get(layer.index)
        source = before[layer.model].by_layer.get(layer.source)
        if not _is_same(own, source) and layer.index not in kv_sharing_layers:
            raise UnrepresentableError(
                f"layer {layer.index} would compute something else than its source, layer "
                f"{layer.source}, because the class computes with the index of a layer"
            )
    return None


def _is_same(one: object, other: object) -> bool:
    """Whether two records are equal, up to the rounding of numbers that depend on the depth."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return one == other


def _recorded(path: Path, model: Checkpoint, depth: int | None = None) -> Computation:
    config = grown_config.loaded(path, trusted=model.trusted)
    return computation.record(config, depth or model.depth, trusted=model.trusted)


def _check_shared(after: Computation, layout: Layout) -> None:
    """Check that layers of several models do not share a tensor."""
    models = [layer.model for layer in layout.layers]
    for name in after.layer_shapes:
        own = layer_names.parse(name)
        for other in filter(None, map(layer_names.parse, after.ties[name])):
            if own is not None and models[own.index] != models[other.index]:
                raise UnrepresentableError(
                    f"layers {own.index} and {other.index} share {own.rest}, so they cannot be "
                    "taken from several models"
                )
