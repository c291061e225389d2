"""Derive the tensors of a grown model from the tensors of loaded models, which it shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.planning.tensor_plan import TensorSpec
from mergekit_interleave.virtual import quantized_modules
from mergekit_interleave.virtual.memory_names import MemoryNames, memory_names, reverted
from mergekit_interleave.virtual.quantized_modules import Source, plain_names, plain_specs
from mergekit_interleave.virtual.values import Zeros, value


class SharedState(NamedTuple):
    """What a grown model takes from loaded models.

    Attributes:
        tensors: Its tensors, by names from which transformers loads them.
        modules: Its quantized modules by path.
    """

    tensors: Mapping[str, Any]
    modules: Mapping[str, Any]


def shared_state(specs: Sequence[TensorSpec], models: Mapping[ModelRef, Any]) -> SharedState:
    """Return the tensors and the quantized modules of a grown model.

    A tensor that transformers merges or splits on loading has its name in memory, unless its parts
    have different values; all others have the name in which they would be stored.

    Args:
        specs: The planned tensors.
        models: The loaded source models.

    Raises:
        RefusedError: A quantized tensor cannot be shared.
    """
    tensors: dict[str, Any] = {}
    modules: dict[str, Any] = {}
    zeros = Zeros()
    sources = {ref: quantized_modules.source_of(model) for ref, model in models.items()}
    for ref, source in sources.items():
        planned = [spec for spec in specs if spec.model == ref]
        means = (spec.mean_with.source for spec in planned if spec.mean_with is not None)
        stored = dict.fromkeys((*(spec.source for spec in planned), *means))
        possible = (other for name in stored for other in plain_names(name))
        names = memory_names(source.plain, dict.fromkeys((*stored, *possible)))
        own = plain_specs(planned, names)
        tensors.update(_tensors(source, own, names, zeros))
        paths = quantized_modules.placed(source, own, names, _moved_with)
        modules.update({path: source.modules[old] for path, old in paths.items()})
    quantized_modules.check_placed(sources.values(), modules)
    return SharedState(tensors, modules)


def _tensors(
    source: Source, specs: Sequence[TensorSpec], names: Mapping[str, MemoryNames], zeros: Zeros
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors that come from one model."""
    tensors = source.tensors(zeros)
    together: dict[tuple[tuple[str, ...], int], list[TensorSpec]] = {}
    for spec in specs:
        known = names[spec.source]
        if known.is_converted:
            together.setdefault((known.names, _shift(spec)), []).append(spec)
        else:
            mean = spec.mean_with
            other = None if mean is None else tensors[names[mean.source].names[0]]
            yield spec.name, value(spec, tensors[known.names[0]], zeros, other)
    for (merged, shift), group in together.items():
        by = _distance(group[0])
        parts = {name: (tensors[name], tensors[_moved(name, by)]) for name in merged}
        yield from _converted(source.plain, parts, shift, group, zeros)


def _converted(
    model: Any,
    sources: Mapping[str, tuple[Any, Any]],
    shift: int,
    specs: Sequence[TensorSpec],
    zeros: Zeros,
) -> Iterator[tuple[str, Any]]:
    """Yield tensors that transformers makes together from several stored tensors, or from one."""
    first = specs[0]
    if all(_is_same_operation(spec, first) for spec in specs):
        for name, (source, behind) in sources.items():
            other = None if first.mean_with is None else behind
            yield _moved(name, shift), value(first, source, zeros, other)
        return
    stored = reverted(model, {name: source for name, (source, _) in sources.items()})
    others: Mapping[str, Any] = {}
    if by := next(filter(None, map(_distance, specs)), 0):
        behind_each = {_moved(name, by): behind for name, (_, behind) in sources.items()}
        others = reverted(model, behind_each)
    for spec in specs:
        other = None if spec.mean_with is None else others[spec.mean_with.source]
        yield spec.name, value(spec, stored[spec.source], zeros, other)


def _distance(spec: TensorSpec) -> int:
    """Return how many layers behind its source the tensor is that it is averaged with."""
    if spec.mean_with is None:
        return 0
    source, other = (layer_names.parse(name) for name in (spec.source, spec.mean_with.source))
    return 0 if source is None or other is None else other.index - source.index


def _is_same_operation(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two tensors are made by the same operation, which treats each number alone."""
    if one.is_unchanged or other.is_unchanged:
        return one.is_unchanged and other.is_unchanged
    operations = [(spec.operation, _distance(spec)) for spec in (one, other)]
    alone = all(spec.constant is None and spec.packing is None for spec in (one, other))
    return alone and operations[0] == operations[1]


def _shift(spec: TensorSpec) -> int:
    """Return how many layers a tensor moves up; names in memory may count from another number."""
    before, after = (layer_names.parse(name) for name in (spec.source, spec.name))
    return 0 if before is None or after is None else after.index - before.index


def _moved_with(name: str, spec: TensorSpec) -> str:
    return _moved(name, _shift(spec))


def _moved(name: str, shift: int) -> str:
    parsed = layer_names.parse(name)
    return name if parsed is None else parsed.at(parsed.index + shift)
