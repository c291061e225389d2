"""Keep the memory of a scan below a limit: only the layer at work, and as many states as fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mergekit_interleave import _dtypes
from mergekit_interleave._units import amount
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.scanning.measure import Measure
from mergekit_interleave.scanning.streaming import mappings
from mergekit_interleave.virtual.model import layers_of


def check(checkpoint: Checkpoint, dtype: str, most: int) -> None:
    """Check, before a model is loaded, that its weights fit or can stay in their file.

    Args:
        checkpoint: The model.
        dtype: The name of the dtype to compute in.
        most: The limit in bytes.

    Raises:
        RefusedError: They do not fit, and cannot stay in their file.
    """
    stored = [tensor for tensor in checkpoint.tensors.values() if _dtypes.is_float(tensor.dtype)]
    needed = sum(tensor.elements for tensor in stored) * _dtypes.NAMED[dtype].bits // 8
    others = [name for each in stored if (name := _dtypes.name_of(each.dtype)) not in {None, dtype}]
    if needed <= most // 2:
        return
    too_large = f"the weights take {amount(needed)} in {dtype}, more than half of --max-memory, and"
    if checkpoint.require_family().facts.changes_weights:
        raise RefusedError(
            f"{too_large} this type of model changes them, so they cannot stay in their file"
        )
    if others:
        raise RefusedError(
            f"{too_large} only weights that are computed in their own dtype can stay in their file",
            hint=f"pass --dtype {others[0]}" if len(others) == len(stored) else None,
        )


def limited(measure: Measure, checkpoint: Checkpoint, most: int) -> Measure:
    """Limit the memory of a measurement.

    Args:
        measure: The measurement, of a loaded model.
        checkpoint: The model.
        most: The limit in bytes. Half of it is for states and logits.

    Raises:
        RefusedError: The weights do not fit, and are not in a file.
    """
    base, states = measure.base, most // 2
    weights = sum({each.data_ptr(): each.nbytes for each in base.parameters()}.values())
    if weights <= most - states:
        return replace(measure, most=states)
    mapped = mappings()
    layers = _layers(base, checkpoint.depth)
    if not all(mapped.holds(each) for layer in layers for each in layer.parameters()):
        raise RefusedError(
            f"the weights take {amount(weights)}, which is more than half of --max-memory, and "
            "transformers does not leave them in their file"
        )
    mapped.hook([*layers, *_ends(base)])

    def build(plan: ExpansionPlan) -> Any:
        found = measure.build(plan)
        mapped.hook([*_layers(found, len(plan.layout)), *_ends(found)])
        return found

    return replace(measure, build=build, at_work=mapped.at_work, most=states)


def _layers(model: Any, depth: int) -> list[Any]:
    return [layer for stack in layers_of(model, depth).values() for layer in stack]


def _ends(model: Any) -> list[Any]:
    """Return the embeddings and the head, which are large where the vocabulary is."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [each for each in ends if each is not None]
