"""Derive the metadata of a grown GGUF model.

What states something of each layer, or of their number, is derived again. Everything else, such as
the tokenizer, stays as it is, to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_interleave.architectures import gguf as architectures
from mergekit_interleave.architectures.gguf import Period
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.gguf import values
from mergekit_interleave.gguf.header import ALIGNMENT, DEFAULT_ALIGNMENT
from mergekit_interleave.gguf.model import DEPTH, GgufModel
from mergekit_interleave.gguf.values import Value
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning.tensor_plan import TensorSpec

PROVENANCE = "interleave."
"""The prefix of the keys that this project writes."""

_SPLIT = "split."

_NAME, _PARAMETERS, _SIZE = "general.name", "general.parameter_count", "general.size_label"

_NOT_OF_LAYERS = ("general.", "tokenizer.", "quantize.", PROVENANCE, _SPLIT)
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
        if not key.startswith((PROVENANCE, _SPLIT))
    }
    for key in _arrays(sources.values(), base):
        metadata[key] = _per_layer(key, blocks)
    depth = base.key(DEPTH)
    metadata[depth] = values.number(base.metadata[depth].kind, len(blocks))
    if base.architecture is not None:
        for key in base.architecture.leading_counts:
            whole = base.key(key)
            if whole in metadata:
                count = _leading(whole, blocks, key)
                metadata[whole] = values.number(metadata[whole].kind, count)
    models = [*sources.values(), base]
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
                if value.count != model.blocks:
                    raise RefusedError(
                        f"{model.path}: {key} has {value.count} entries, but there are "
                        f"{model.blocks} blocks"
                    )
                yield key
            elif value.count == model.blocks:
                raise RefusedError(
                    f"{model.path}: {key} has as many entries as there are layers, and it is "
                    "unknown whether each is that of a layer"
                )


def _per_layer(key: str, blocks: Sequence[Block]) -> Value:
    """Return the array of the entries of all blocks; a single value is that of each block."""
    found = {block.model: block.model.metadata.get(key) for block in blocks}
    kinds = {value.items for value in found.values() if value is not None and value.is_array}
    if None in found.values() or len(kinds) != 1:
        raise RefusedError(f"{key} is missing in one of the sources, or has another type there")
    (kind,) = kinds
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
    return [values.number(kind, value.decoded()).data] * count


def _leading(key: str, blocks: Sequence[Block], name: str) -> int:
    """Return how many leading blocks of the result are of the kind that a key counts.

    Raises:
        RefusedError: They would not be the first ones.
    """
    counts = {block.model.ref: block.model.integer(name) or 0 for block in blocks}
    kinds = [block.source < counts[block.model.ref] for block in blocks]
    count = sum(kinds)
    if not all(kinds[:count]):
        raise RefusedError(
            f"the metadata cannot represent this layout: {key} counts leading layers, and layer "
            f"{kinds.index(False)} of the result is of the other kind",
            hint="keep the leading layers together at the start",
        )
    return count


def _general(
    metadata: Mapping[str, Value], base: GgufModel, depth: int, specs: Sequence[TensorSpec]
) -> Iterator[tuple[str, Value]]:
    """Yield what the metadata states of the model as a whole, if the base states it."""
    if _NAME in metadata and depth != base.depth:
        name = str(metadata[_NAME].decoded())
        yield _NAME, values.text(f"{_without_depth(name)} {depth}L")
    if _PARAMETERS in metadata:
        total = sum(math.prod(spec.shape) for spec in specs)
        yield _PARAMETERS, values.number(metadata[_PARAMETERS].kind, total)
    if _SIZE in metadata:
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


def misread(layout: Layout, base: GgufModel, identities: Collection[int] = ()) -> Misread | None:
    """Return the first layer that llama.cpp would take for another kind, if there is one.

    Args:
        layout: The layers.
        base: A model of their architecture.
        identities: The indices of the new layers that pass their input on unchanged.
    """
    for period in periods_of(base):
        for layer in layout.layers:
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
