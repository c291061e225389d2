"""Derive the metadata of a grown GGUF model.

What states something of each layer, or of their number, is derived again. Everything else, such as
the tokenizer, stays as it is, to the byte.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_interleave.architectures import gguf as architectures
from mergekit_interleave.architectures.gguf import Period
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.gguf import values
from mergekit_interleave.gguf.header import ALIGNMENT, DEFAULT_ALIGNMENT
from mergekit_interleave.gguf.model import DEPTH, GgufModel
from mergekit_interleave.gguf.values import STRING, Value
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning.tensor_plan import TensorSpec

PROVENANCE = "interleave."
"""The prefix of the keys that this project writes."""

SPLIT_PREFIX = "split."
"""The prefix of the keys of splits."""

_EXTRA = "general.tensor_extra."
_EXTRA_NAMES = f"{_EXTRA}name"
"""The key of an array of names of tensors; other arrays with this prefix have an entry for each."""

_NAME, _PARAMETERS, _SIZE = "general.name", "general.parameter_count", "general.size_label"

_NOT_OF_LAYERS = ("general.", "tokenizer.", "quantize.", PROVENANCE, SPLIT_PREFIX)
"""The prefixes of keys whose arrays have no entry per layer, whatever their length."""


@dataclass(frozen=True)
class Block:
    """A block of the result: a layer, or a block behind the layers.

    Attributes:
        model: Its source model.
        source: The index of the source block.
    """

    model: GgufModel
    source: int


def blocks_of(layout: Layout, sources: Mapping[ModelRef, GgufModel]) -> list[Block]:
    """Return all blocks of a result; those behind the layers are those of the last model."""
    last = sources[layout.slices[-1].model]
    layers = [Block(sources[layer.model], layer.source) for layer in layout.layers]
    return [*layers, *(Block(last, index) for index in range(last.depth, last.blocks))]


def grown(
    base: GgufModel,
    layout: Layout,
    sources: Mapping[ModelRef, GgufModel],
    specs: Sequence[TensorSpec],
) -> dict[str, Value]:
    """Return the metadata of a result, without the provenance.

    Args:
        base: The model that the metadata is taken from.
        layout: The layers.
        sources: Their models.
        specs: The tensors of the result.

    Raises:
        RefusedError: No metadata can represent the layout.
    """
    blocks = blocks_of(layout, sources)
    metadata = {
        key: value
        for key, value in base.metadata.items()
        if not key.startswith((PROVENANCE, SPLIT_PREFIX))
    }
    models = list(sources.values())
    for key in _arrays(models, base):
        metadata[key] = _per_layer(key, blocks, base)
    _restate(metadata, base.key(DEPTH), len(blocks))
    for key in () if base.architecture is None else base.architecture.leading_counts:
        if any(model.key(key) in model.metadata for model in models):
            _restate(metadata, base.key(key), _leading(base.key(key), blocks, key))
    _restate_extra(metadata, specs, models)
    alignment = max(file.alignment for model in models for file in model.files)
    if alignment != DEFAULT_ALIGNMENT:
        metadata[ALIGNMENT] = values.unsigned(alignment)
    return metadata | dict(_general(metadata, base, len(layout), specs))


def _arrays(sources: Iterable[GgufModel], base: GgufModel) -> Iterator[str]:
    """Yield the keys with one entry per layer in any source.

    Raises:
        RefusedError: It is unknown whether an array has one entry per layer.
    """
    known = architectures.per_layer_arrays()
    others = architectures.other_arrays()
    for model in sources:
        for key, value in model.metadata.items():
            if not value.is_array or key.startswith(_NOT_OF_LAYERS):
                continue
            name = key.removeprefix(f"{base.model_type}.")
            if name in others:
                continue
            if name in known:
                if value.count not in (model.blocks, model.depth):
                    raise RefusedError(
                        f"{model.path}: {key} has {value.count} entries, but there are "
                        f"{model.blocks} blocks"
                    )
                yield key
            elif value.count in (model.blocks, model.depth):
                raise RefusedError(
                    f"{model.path}: {key} has as many entries as there are layers, and it is "
                    "unknown whether each is that of a layer"
                )


def _per_layer(key: str, blocks: Sequence[Block], base: GgufModel) -> Value:
    """Return the array of the entries of all blocks, or of all layers.

    A single value is that of each block, except for a key that then states a period.
    """
    found = {block.model: block.model.metadata.get(key) for block in blocks}
    arrays = {model: value for model, value in found.items() if value and value.is_array}
    kinds = {value.items for value in arrays.values()}
    of_layers = [value.count == model.depth for model, value in arrays.items()]
    periods = () if base.architecture is None else base.architecture.periods
    states_period = any(period.key and base.key(period.key) == key for period in periods)
    if (
        None in found.values()
        or len(kinds) != 1
        or len({*of_layers}) > 1
        or (states_period and len(arrays) < len(found))
    ):
        raise RefusedError(f"{key} is missing in one of the sources, or has another form there")
    (kind,) = kinds
    if of_layers[0]:
        blocks = [block for block in blocks if block.source < block.model.depth]
    entries = {
        model: _entries(value, kind or 0, model.blocks)
        for model, value in found.items()
        if value is not None
    }
    return values.array(kind or 0, [entries[block.model][block.source] for block in blocks])


def _entries(value: Value, kind: int, count: int) -> list[bytes]:
    """Return the entry of each block, as a type of items."""
    if value.is_array:
        return values.parts(value)
    if kind not in values.INTEGERS or not value.is_integer:
        raise RefusedError("an array of the sources has another type than the value of another")
    return [values.number(kind, value.decoded()).data] * count


def _leading(key: str, blocks: Sequence[Block], name: str) -> int:
    """Return how many leading blocks of the result are of the kind that a key counts.

    Raises:
        RefusedError: They would not be the first ones.
    """
    counts = {block.model: block.model.integer(name) for block in blocks}
    stated = {model: count for model, count in counts.items() if count is not None}
    if len(stated) < len(counts):
        raise RefusedError(f"{key} is missing in one of the sources")
    kinds = [block.source < stated[block.model] for block in blocks]
    count = sum(kinds)
    if not all(kinds[:count]):
        raise RefusedError(
            f"the metadata cannot represent this layout: {key} counts leading layers, and layer "
            f"{kinds.index(False)} of the result is of the other kind",
            hint="keep the leading layers together at the start",
        )
    return count


def _restate(metadata: dict[str, Value], key: str, count: int) -> None:
    """State another count under a key, in its type.

    Raises:
        RefusedError: The type has no such number.
    """
    old = metadata.get(key)
    try:
        metadata[key] = values.unsigned(count) if old is None else values.number(old.kind, count)
    except (KeyError, struct.error) as error:
        raise RefusedError(f"{key}: its type cannot state {count}") from error


def _restate_extra(
    metadata: dict[str, Value], specs: Sequence[TensorSpec], models: Sequence[GgufModel]
) -> None:
    """Derive the arrays that state something of some tensors, whose names one of them lists.

    Raises:
        RefusedError: There are several models, or the arrays have different lengths.
    """
    names = metadata.get(_EXTRA_NAMES)
    if names is None:
        return
    arrays = {key: value for key, value in metadata.items() if key.startswith(_EXTRA)}
    counts = {value.count for value in arrays.values()}
    if len(models) > 1 or len(counts) > 1 or not all(v.is_array for v in arrays.values()):
        raise RefusedError(
            f"{_EXTRA}* states something of single tensors, which cannot be derived here",
            hint="take all layers from one model",
        )
    places = {name: place for place, name in enumerate(names.decoded())}
    found = [(spec.name, places[spec.source]) for spec in specs if spec.source in places]
    for key, value in arrays.items():
        parts = values.parts(value)
        metadata[key] = values.array(value.items or 0, [parts[place] for _, place in found])
    metadata[_EXTRA_NAMES] = values.texts([name for name, _ in found])


def _general(
    metadata: Mapping[str, Value], base: GgufModel, depth: int, specs: Sequence[TensorSpec]
) -> Iterator[tuple[str, Value]]:
    """Yield what the metadata states of the model as a whole, if the base states it."""
    name, parameters, size = (metadata.get(key) for key in (_NAME, _PARAMETERS, _SIZE))
    if name is not None and name.kind == STRING and depth != base.depth:
        yield _NAME, values.text(f"{_without_depth(name.decoded())} {depth}L")
    if parameters is not None and parameters.is_integer:
        stated = {_PARAMETERS: parameters}
        _restate(stated, _PARAMETERS, sum(math.prod(spec.shape) for spec in specs))
        yield _PARAMETERS, stated[_PARAMETERS]
    if size is not None and size.kind == STRING:
        yield _SIZE, values.text(size_label(specs))


def _without_depth(name: str) -> str:
    """Return a name without the depth that an earlier growth has added."""
    rest, _, last = name.rpartition(" ")
    return rest if rest and last.endswith("L") and last[:-1].isdigit() else name


def size_label(specs: Sequence[TensorSpec]) -> str:
    """Return the size of a model as gguf-py states it, such as 135M or 8x7B."""
    total = shared = expert = experts = stacks = 0
    for spec in specs:
        size = math.prod(spec.shape)
        total += size
        axis = 2 if ".bias" in spec.name else 3
        if "_exps." in spec.name and len(spec.shape) >= axis:
            expert += size // max(spec.shape[-axis], 1)
            experts += spec.shape[-axis]
            stacks += 1
        else:
            shared += size
    if stacks and experts // stacks > 0:
        return f"{experts // stacks}x{_rounded(shared + expert)}"
    return _rounded(total)


def _rounded(count: int) -> str:
    """Return a number of parameters with at least two digits."""
    suffixes = ((1e12, 1e-12, "T"), (1e9, 1e-9, "B"), (1e6, 1e-6, "M"))
    factor, suffix = next(((f, s) for least, f, s in suffixes if count > least), (1e-3, "K"))
    scaled = count * factor
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{suffix}"


@dataclass(frozen=True)
class Misread:
    """A layer that llama.cpp would take for another kind than its source layer.

    Attributes:
        layer: Its index in the result.
        source: Its index in its source.
        period: The rule of llama.cpp.
    """

    layer: int
    source: int
    period: Period


def misread(
    layout: Layout, sources: Mapping[ModelRef, GgufModel], identities: Collection[int] = ()
) -> Misread | None:
    """Return the first layer that llama.cpp would take for another kind, if there is one.

    Args:
        layout: The layers.
        sources: Their models.
        identities: The indices of the new layers that pass their input on unchanged.
    """
    periods = {ref: periods_of(model) for ref, model in sources.items()}
    for layer in layout.layers:
        for period in periods[layer.model]:
            if layer.index in identities and not period.of_tensors:
                continue
            if period.is_other(layer.index) != period.is_other(layer.source):
                return Misread(layer.index, layer.source, period)
    return None


def periods_of(model: GgufModel) -> list[Period]:
    """Return the rules by which llama.cpp derives kinds of layers from their indices."""
    found = []
    for period in () if model.architecture is None else model.architecture.periods:
        value = None if period.key is None else model.metadata.get(model.key(period.key))
        if (
            (value is not None and value.is_array)
            or (period.depth not in (None, model.depth))
            or (period.needs is not None and not model.is_set(period.needs))
            or (period.unless is not None and model.key(period.unless) in model.metadata)
        ):
            continue
        length = int(value.decoded()) if value is not None and value.is_integer else period.length
        if length > 1:
            found.append(period.of_length(length))
    return found
