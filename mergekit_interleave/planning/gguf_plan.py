"""Plan a grown GGUF model: its sources, every tensor, and the metadata.

All checks run before anything is written. llama.cpp must take each layer for the kind that its
source layer has, so a layout with which it would not is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_interleave.architectures import gguf as architectures
from mergekit_interleave.checkpoint.hub import is_hub_id
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.gguf import values
from mergekit_interleave.gguf.model import ARCHITECTURE, DEPTH, GgufModel
from mergekit_interleave.gguf.values import Value
from mergekit_interleave.layout.layout import Layout, expand
from mergekit_interleave.planning import gguf_metadata, llama_cpp, public_names, zeroing
from mergekit_interleave.planning.gguf_metadata import Misread
from mergekit_interleave.planning.resolve import Expansion
from mergekit_interleave.planning.suggest import with_growth
from mergekit_interleave.planning.tensor_plan import TensorSpec, assemble

MOST_LAYERS = 512
"""The largest number of blocks that llama.cpp loads."""

_FILE_TYPE = "general.file_type"

_CHAT_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class GgufPlan:
    """The plan of a grown GGUF model.

    Attributes:
        expansion: The directive and its layout.
        sources: The models that layers are taken from.
        base: The model that the metadata is taken from.
        names: The public name of each model: the name of its file.
        origins: The Hub id and commit of each model for which they are known.
        specs: Every tensor of the result.
        metadata: The metadata of the result, without provenance.
        warnings: The warnings, including those of the expansion.
    """

    expansion: Expansion
    sources: Mapping[ModelRef, GgufModel]
    base: GgufModel
    names: Mapping[ModelRef, str]
    origins: Mapping[ModelRef, ModelPath]
    specs: Sequence[TensorSpec]
    metadata: Mapping[str, Value]
    warnings: tuple[str, ...] = ()

    @property
    def layout(self) -> Layout:
        """The layers."""
        return self.expansion.layout

    @property
    def first(self) -> GgufModel:
        """The model of the first layer."""
        return self.sources[self.layout.models[0]]

    @property
    def parameters(self) -> int:
        """The number of parameters of the result."""
        return sum(math.prod(spec.shape) for spec in self.specs)

    @property
    def new_parameters(self) -> int:
        """The number of parameters of its new layers."""
        new = {layer.index for layer in self.layout.new_layers}
        return sum(math.prod(spec.shape) for spec in self.specs if spec.layer in new)

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(spec.nbytes for spec in self.specs)

    def title(self, ref: ModelRef) -> str:
        """Return the public name of a model."""
        return self.names[ref]

    @cached_property
    def identities(self) -> frozenset[int]:
        """The indices of the new layers that pass their input on unchanged.

        Nothing is claimed of an unknown architecture.
        """
        return _identities(self.layout, self.sources)

    @property
    def is_identity(self) -> bool:
        """Whether the result computes the same as its base."""
        return zeroing.adds_only(self.identities, self.layout, self.first.depth)

    def changed_metadata(self) -> Iterator[tuple[str, tuple[object, object]]]:
        """Yield the keys that differ from those of the base, each with its old and new value."""
        for key, value in self.metadata.items():
            old = self.base.metadata.get(key)
            if old != value:
                yield key, (None if old is None else old.decoded(), value.decoded())


def plan_gguf(expansion: Expansion, *, base_model: str | None = None) -> GgufPlan:
    """Plan the result of an expansion of GGUF models.

    Args:
        expansion: The directive and its layout.
        base_model: The Hub id of the only source model, if its path does not state one.

    Raises:
        InterleaveError: The result cannot be produced.
    """
    _check_keys(expansion)
    _check_names(expansion)
    expansion = _with_one_name_each(expansion)
    sources, base = _opened(expansion)
    layout = expansion.layout
    for model in sources.values():
        model.require_family()
        model.check_depth()
        _check_fit(model, base)
        _check_depth(layout, model)
    _check_head(layout, sources)
    specs = assemble(layout, sources)
    _check_places(layout, sources, base)
    _check_kinds(expansion, sources, base)
    metadata = gguf_metadata.grown(base, layout, sources, specs)
    _check_windows(metadata, base)
    _check_first_layer(metadata, base)
    _check_last_layer(layout, sources)
    names, origins = _names([*sources.values()], base_model)
    unknown = base.architecture is None
    warning = (
        f"architecture {base.model_type!r} is unknown: whether the result computes what its base "
        "computes is not known; `mk-interleave verify --forward` measures it"
    )
    return GgufPlan(
        expansion=expansion,
        sources=sources,
        base=base,
        names=names,
        origins=origins,
        specs=specs,
        metadata=metadata,
        warnings=(*expansion.warnings, *([warning] if unknown else [])),
    )


def _check_names(expansion: Expansion) -> None:
    """Refuse an unknown architecture unless the directive states what it does to the tensors.

    The slices of a mergekit config state everything.
    """
    directive = expansion.directive
    if directive.growth is None or directive.zero is not None or directive.scale:
        return
    for ref, model in expansion.sources.items():
        if isinstance(model, GgufModel) and model.architecture is None:
            raise RefusedError(
                f"{ref}: architecture {model.model_type!r} is unknown, so it is not known how "
                "llama.cpp reads more layers",
                hint="state the tensors to zero, `zero: [NAMES]`, or that none is, `zero: none`",
            )


def _with_one_name_each(expansion: Expansion) -> Expansion:
    """Return an expansion in which two spellings of a file are one model."""
    first: dict[object, ModelRef] = {}
    for ref in expansion.layout.models:
        first.setdefault(ref.identity, ref)
    slices = (replace(part, model=first[part.model.identity]) for part in expansion.layout.slices)
    return replace(expansion, layout=Layout(tuple(slices)))


def _opened(expansion: Expansion) -> tuple[dict[ModelRef, GgufModel], GgufModel]:
    """Return the models of the layers, and that of the metadata.

    Raises:
        RefusedError: One of them is not a GGUF file, or the metadata is that of another model.
    """
    found: dict[ModelRef, GgufModel] = {}
    for ref in expansion.layout.models:
        model = expansion.sources.get(ref)
        if not isinstance(model, GgufModel):
            raise RefusedError(
                f"{ref}: is not a GGUF file, and cannot be stacked with GGUF files",
                hint="convert it to GGUF, in the same quantization, or name directories only",
            )
        found[ref] = model
    wanted = expansion.base.identity
    base = next((model for ref, model in found.items() if ref.identity == wanted), None)
    if base is None:
        raise RefusedError(
            f"base_model: {expansion.base} has no layer in the result, so its metadata does not "
            "describe it",
            hint="name a model of the layers, or leave `base_model` out",
        )
    return found, base


def _identities(layout: Layout, sources: Mapping[ModelRef, GgufModel]) -> frozenset[int]:
    """Return the indices of the new layers that are known to pass their input on unchanged."""
    if any(model.architecture is None for model in sources.values()):
        return frozenset()
    return zeroing.identities(
        layout,
        lambda model: sources[model].require_family(),
        lambda layer: sources[layer.model].layer_tensors(layer.source),
    )


def _check_keys(expansion: Expansion) -> None:
    """Refuse the keys that only mergekit applies."""
    for key in expansion.directive.mergekit:
        if key == "dtype":
            raise RefusedError(
                "dtype: the tensors of a GGUF file keep their types",
                hint="leave `dtype` out; llama-quantize converts the result",
            )
        if key not in ("base_model", "merge_method"):
            raise RefusedError(f"{key}: mergekit applies this key, and it reads no GGUF files")


def _check_fit(model: GgufModel, base: GgufModel) -> None:
    """Check that the layers of a model can be stacked on those of the base."""
    if model is base:
        return
    for key in sorted(model.metadata.keys() | base.metadata.keys()):
        one, other = model.metadata.get(key), base.metadata.get(key)
        if one != other and _must_agree(key, base, one, other):
            raise RefusedError(
                f"{model.ref} cannot be stacked with {base.ref}: {key} is {_short(one)} in "
                f"{model.ref} and {_short(other)} in {base.ref}"
            )
    for name in sorted({*_shared(model), *_shared(base)}):
        both = name in base.tensors and name in model.tensors
        if not both or _bytes(model, name) != _bytes(base, name):
            raise RefusedError(
                f"{model.ref} cannot be stacked with {base.ref}: their tensors {name} differ"
            )


def _must_agree(key: str, base: GgufModel, *found: Value | None) -> bool:
    """Whether a key must have the same value in all models of a stack.

    Args:
        key: The key.
        base: A model of the stack.
        found: The values in two models.
    """
    if key in (ARCHITECTURE, _FILE_TYPE):
        return True
    if key.startswith("tokenizer."):
        return key != _CHAT_TEMPLATE
    prefix, name = f"{base.model_type}.", key.removeprefix(f"{base.model_type}.")
    counts = () if base.architecture is None else base.architecture.leading_counts
    if name in architectures.per_layer_arrays():  # arrays are joined
        return not any(value is not None and value.is_array for value in found)
    return key.startswith(prefix) and name not in (DEPTH, *counts)


def _short(value: Value | None) -> str:
    if value is None:
        return "missing"
    return f"{value.count} entries" if value.is_array else f"{value.decoded()!r:.60}"


def _shared(model: GgufModel) -> list[str]:
    """Return the tensors outside the layers that all layers use."""
    return [name for name in model.tensors if name.startswith("rope_")]


def _bytes(model: GgufModel, name: str) -> bytes:
    tensor = model.tensors[name]
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.nbytes)


_HEAD = "output.weight"


def _check_head(layout: Layout, sources: Mapping[ModelRef, GgufModel]) -> None:
    """Refuse a stack whose head would be the embeddings of another model."""
    first, last = (sources[part.model] for part in (layout.slices[0], layout.slices[-1]))
    if first is not last and _HEAD not in last.tensors:
        raise RefusedError(
            f"{last.ref}: has no {_HEAD}, because its head is its embeddings, and those of the "
            f"result are from {first.ref}",
            hint="take the first and the last layer from one model",
        )


def _check_depth(layout: Layout, base: GgufModel) -> None:
    """Refuse a depth with which llama.cpp computes something else, or which it does not load."""
    architecture, depth = base.architecture, len(layout)
    blocks = depth + base.blocks - base.depth
    if blocks > MOST_LAYERS:
        raise RefusedError(f"llama.cpp loads at most {MOST_LAYERS} layers, not {blocks}")
    if architecture is None:
        return
    unless = architecture.fixed_depth_unless
    is_free = unless is not None and base.key(unless) in base.metadata
    if architecture.fixed_depth and is_free:
        return
    if architecture.depth_class(depth) != architecture.depth_class(base.depth):
        raise RefusedError(
            f"with the architecture {base.model_type} llama.cpp computes something else in "
            f"{depth} layers than in {base.depth}: its code depends on the number"
        )


def _check_places(layout: Layout, sources: Mapping[ModelRef, GgufModel], base: GgufModel) -> None:
    """Refuse a layout in which first layers with a role of their own are moved."""
    if base.architecture is None:
        return
    for key in base.architecture.pinned_counts:
        count = base.integer(key) or 0
        if [layer.source for layer in layout.layers[:count]] != [*range(count)]:
            raise RefusedError(
                f"llama.cpp adds something to each of the first {count} layers, which "
                f"{base.key(key)} counts, so they must keep their places",
                hint=f"leave the first {count} layers as they are",
            )
    if not base.architecture.keeps_first_layer:
        return
    places = [layer.index for layer in layout.layers if layer.source == 0]
    if places != [0] or len(sources) > 1:
        raise RefusedError(
            f"with the architecture {base.model_type} the first layer computes what the others "
            "use, so it must stay the first one and cannot be copied"
        )


def _check_kinds(
    expansion: Expansion, sources: Mapping[ModelRef, GgufModel], base: GgufModel
) -> None:
    """Refuse a layout of which llama.cpp would take a layer for another kind."""
    layout = expansion.layout
    found = gguf_metadata.misread(layout, sources, _identities(layout, sources))
    if found is None:
        return
    works = _nearest(expansion.directive, expansion.layout, base)
    raise RefusedError(
        f"llama.cpp would compute something else: {_reason(found, base)}",
        hint=f"{llama_cpp.KEEPS.format(works)}" if works else None,
    )


def _reason(found: Misread, base: GgufModel) -> str:
    period = found.period
    where = "starts" if period.first else "ends"
    return (
        f"with the architecture {base.model_type} a layer of another kind {where} each group of "
        f"{period.length}, and layer {found.source} would become layer {found.layer}"
    )


def _nearest(directive: Directive, layout: Layout, base: GgufModel) -> str | None:
    """Return the directive closest to a given one that copies whole groups of layers, if any."""
    length = math.lcm(*(period.length for period in gguf_metadata.periods_of(base)))
    if len(layout.models) > 1 or length > base.depth:
        return None
    growth = llama_cpp.copied_periods(base.depth, length, len(layout) - base.depth)
    other = None if growth is None else with_growth(growth, directive, base, layout)
    if growth is None or other is None:
        return None
    trial = expand(growth, base.ref, base.depth)
    works = gguf_metadata.misread(trial, {base.ref: base}) is None
    return yaml_io.write_inline(other.to_document()) if works else None


_WINDOW, _WINDOW_KINDS = "attention.sliding_window", "attention.sliding_window_pattern"


def _check_windows(metadata: Mapping[str, Value], base: GgufModel) -> None:
    """Refuse a result in which no layer has the window: llama.cpp aborts when it loads that."""
    kinds = metadata.get(base.key(_WINDOW_KINDS))
    if kinds is not None and kinds.is_array and base.is_set(_WINDOW) and not any(kinds.decoded()):
        raise RefusedError(
            f"no layer of the result would have the window that {base.key(_WINDOW)} states, and "
            "llama.cpp loads no such model",
            hint="keep a layer with the window",
        )


def _check_first_layer(metadata: Mapping[str, Value], base: GgufModel) -> None:
    """Refuse another first layer if llama.cpp takes sizes of all layers from it."""
    for name in architectures.sizes_of_first_layer():
        key = base.key(name)
        old, new = base.metadata.get(key), metadata.get(key)
        if old is None or new is None or not new.is_array:
            continue
        was = values.parts(old)[0] if old.is_array else old.data
        if values.parts(new)[0] != was and new.decoded()[0] != _first(old.decoded()):
            raise RefusedError(
                f"llama.cpp takes sizes of all layers from the first one, and {key} would be "
                f"{new.decoded()[0]} there, not {_first(old.decoded())}",
                hint=f"keep layer 0, or start with a layer whose {name} is {_first(old.decoded())}",
            )


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _check_last_layer(layout: Layout, sources: Mapping[ModelRef, GgufModel]) -> None:
    """Refuse a last layer that llama.cpp would skip together with the selection of outputs."""
    last = layout.layers[-1]
    model = sources[last.model]
    name = None if model.architecture is None else model.architecture.nonzero_in_last_layer
    value = None if name is None else model.metadata.get(model.key(name))
    if value is not None and value.is_array and not value.decoded()[last.source]:
        raise RefusedError(
            f"the last layer would be layer {last.source}, whose {name} is 0, and llama.cpp needs "
            "another one there"
        )


def _names(
    models: Sequence[GgufModel], base_model: str | None
) -> tuple[dict[ModelRef, str], dict[ModelRef, ModelPath]]:
    """Return the public names and the known origins of some models.

    Raises:
        DirectiveError: `base_model` is not a Hub id, or there are several models.
    """
    stated = None if base_model is None else public_names.stated(base_model, models)
    names: dict[ModelRef, str] = {}
    paths: dict[Path, str] = {}
    origins: dict[ModelRef, ModelPath] = {}
    for model in models:
        place = model.path.resolve()
        if place not in paths:
            same = sum(path.name == model.path.name for path in paths)
            paths[place] = f"{model.path.name}~{same + 1}" if same else model.path.name
        names[model.ref] = paths[place]
        origin = stated or model.hub_origin
        if origin is not None and is_hub_id(origin.path):
            origins[model.ref] = origin
    return names, origins
