"""Derive the tensors and the config that a model must contain from its recorded layout.

If the sources are available, the model is checked against them. Otherwise it is checked against
itself: each new layer must be a copy of the original layer in the same model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mergekit_interleave import _dtypes
from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.quantization import KEY
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import ExplicitSlices, Stack
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, parse_model
from mergekit_interleave.directive.scale import Scale, scale_of
from mergekit_interleave.errors import CheckpointError, DirectiveError, RefusedError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout, Slice
from mergekit_interleave.output import lineage, manifest
from mergekit_interleave.output.lineage import Generation
from mergekit_interleave.output.recorded_layout import RecordedLayout
from mergekit_interleave.planning import grown_config
from mergekit_interleave.planning.expansion_plan import ExpansionPlan, plan_expansion
from mergekit_interleave.planning.resolve import Expansion, models_for, resolve
from mergekit_interleave.planning.tensor_plan import TensorSpec, assemble

ORIGINAL = "original layers and tensors outside the layers, which only --against BASE can check"
ROUNDED = "computed from numbers that are not stored"
"""The reasons why tensors of a model that is compared with itself are not compared."""


@dataclass(frozen=True)
class ExpectedModel:
    """The tensors and the config that a model must contain.

    Attributes:
        layout: The layers.
        specs: Every tensor.
        config: The content of its config.json; None if unknown.
        unread: Returns the reason why a tensor cannot be compared, or None if it can be.
        plan: The plan of the model, if its sources are available.
        warnings: Warnings for the user, one sentence each.
        rounding: The relative error that numbers in config.json may have.
    """

    layout: Layout
    specs: Sequence[TensorSpec]
    config: Mapping[str, Any] | None
    unread: Callable[[TensorSpec], str | None]
    plan: ExpansionPlan | None = None
    warnings: tuple[str, ...] = ()
    rounding: float = 0.0

    @classmethod
    def of_plan(
        cls,
        plan: ExpansionPlan,
        config: Mapping[str, Any],
        *,
        warnings: tuple[str, ...] = (),
        rounding: float = 0.0,
    ) -> ExpectedModel:
        """Return what a model made by a plan must contain, with this config.json."""
        return cls(plan.layout, plan.specs, config, plan.reason_unread, plan, warnings, rounding)


def of_sources(
    recorded: RecordedLayout, against: Sequence[ModelRef], models: Models
) -> ExpectedModel:
    """Derive what a model must contain from its sources.

    Args:
        recorded: Its recorded layout.
        against: Its sources, in the order of their first layers; then the model that its config
            comes from, if that is not one of them.
        models: Opens the sources.

    Raises:
        InterleaveError: The sources cannot be read, or are not those of this model.
    """
    expansion = _expansion(recorded, against, models)
    opener = models_for(expansion.directive, models)
    _check_depths(expansion.layout, recorded, opener)
    fetched = opener.fetch_small_files(opener.open(expansion.base))
    legacy = recorded.manifest is not None and bool(recorded.manifest.content.get(manifest.LEGACY))
    plan = plan_expansion(expansion, models, None, mix=True, legacy=legacy)
    return ExpectedModel.of_plan(plan, plan.config(), warnings=(*plan.warnings, *fetched))


def of_generation(
    generation: Generation, against: Sequence[ModelRef], models: Models
) -> ExpectedModel:
    """Derive what a model must contain from the sources of its sources.

    Only its original layers and the tensors outside the layers can be derived: layers that were new
    in any growth may have been trained since.

    Args:
        generation: The model in terms of these sources.
        against: The sources, in the order of their first layers.
        models: Opens the sources.

    Raises:
        RefusedError: A growth changed more than layers, so the tensors cannot be derived.
        InterleaveError: The sources cannot be read.
    """
    keys = _composed_keys(generation)
    known = dict(zip(generation.layout.models, against, strict=True))
    _check_against(known)
    layout = Layout(
        tuple(dataclasses.replace(s, model=known[s.model]) for s in generation.layout.slices)
    )
    plan = plan_expansion(Expansion(Directive(mergekit=keys), layout), models, None)
    _check_outside(generation, plan)
    return ExpectedModel.of_plan(plan, plan.config(), warnings=plan.warnings, rounding=_ROUNDING)


def _check_outside(generation: Generation, plan: ExpansionPlan) -> None:
    """Check that no growth scaled tensors outside the layers, as a first or last slice may.

    Raises:
        RefusedError: One did.
    """
    first, last = (plan.sources[plan.layout.slices[i].model] for i in (0, -1))
    outside = {
        0: first.scaled(first.outside_layers()[0]),
        -1: last.scaled(last.outside_layers()[1]),
    }
    for place, growth in generation.growths.items():
        for index, names in outside.items():
            scales = growth["layers"][index].get("scale", ())
            factors = tuple(Scale(scale["value"], scale["filter"]) for scale in scales)
            for name in names:
                if scale_of(name, factors) not in (None, 1):
                    raise RefusedError(f"{place}layers: a scale also applied to {name}")


_ROUNDING = 1e-12
"""Each growth rounds the numbers that depend on the depth; this is far more than doubles need."""


def _composed_keys(generation: Generation) -> dict[str, object]:
    """Return the keys of mergekit for all growths together.

    Raises:
        RefusedError: A growth changed the tokenizer, or took the config from another model.
    """
    steps: list[str] = []
    for place, growth in generation.growths.items():
        for number, entry in enumerate(growth["models"]):
            crossed = f"{lineage.KEY}[{entry.get(lineage.GROWTH)}]." in generation.growths
            if crossed and lineage.has_lora(entry):
                raise RefusedError(
                    f"{place}models[{number}]: a LoRA was merged into {entry['model']}, so the "
                    "tensors cannot be compared with those of an earlier base"
                )
    for place, growth in [*generation.growths.items()][::-1]:  # the oldest first
        keys = lineage.directive_of(growth).mergekit
        first = growth["models"][growth["layers"][0]["model"]]["model"]
        for key, value in keys.items():
            if key in ("dtype", "out_dtype") or (key == "base_model" and value == first):
                continue
            raise RefusedError(
                f"{place}directive.{key}: changed more than layers, so the tensors cannot be "
                "compared with those of an earlier base"
            )
        steps += [dtype for dtype in mergekit_yaml.dtypes_of(keys) if dtype is not None]
    dtypes = [dtype for dtype, _ in groupby(steps)]
    if len(dtypes) > len(_DTYPES):
        raise RefusedError(f"dtype: converted {len(dtypes)} times: {', '.join(dtypes)}")
    return dict(zip(_DTYPES, dtypes, strict=False))


_DTYPES = ("dtype", "out_dtype")


def _check_depths(layout: Layout, recorded: RecordedLayout, models: Models) -> None:
    """Check that each source has the recorded depth, or at least the layers that are taken from it.

    Raises:
        CheckpointError: A source has another depth, so it is not a source of this model.
    """
    known = recorded.manifest
    for i, model in enumerate(layout.models):
        depth = models.open(model).depth
        if known is not None and depth != known.depths[i]:
            raise CheckpointError(
                f"{model}: has {depth} layers, but {manifest.FILE} records {known.depths[i]} for "
                f"this source, {known.models[i]}",
                hint=" or ".join(
                    [f"pass the model that it was grown from: --against {known.models[i]}"]
                    + [f"--trained {bases}" for bases in _earlier_bases(known.content)]
                ),
            )
        taken = max(part.stop for part in layout.slices if part.model == model)
        if depth < taken:
            raise CheckpointError(
                f"{model}: has {depth} layers, but the layout takes layer {taken - 1} of it"
            )


def _earlier_bases(content: Mapping[str, Any]) -> list[str]:
    """Return the options that name the bases before the last growth, the latest bases first."""
    _, *earlier = lineage.generations(content)
    return [" ".join(f"--against {name}" for name in bases.names) for bases in earlier]


def _with_models(directive: Directive, against: Sequence[ModelRef]) -> Directive:
    """Replace the models of a directive, in the order of their first layers."""
    growth = directive.growth
    parts = growth.parts if isinstance(growth, Stack) else ()
    # None stands for the model of the `model` key.
    named = list(dict.fromkeys(part.model for part in parts)) or [None]
    if len(against) != len(named):
        raise DirectiveError(_wrong_number(len(named), len(against)))
    models = dict(zip(named, against, strict=True))
    if isinstance(growth, Stack):
        growth = growth.of({old: new for old, new in models.items() if old is not None})
    return dataclasses.replace(directive, growth=growth, model=models.get(None), models={})


def _wrong_number(expected: int, found: int) -> str:
    return f"--against: expected {expected} model{'' if expected == 1 else 's'}, found {found}"


def _expansion(recorded: RecordedLayout, against: Sequence[ModelRef], models: Models) -> Expansion:
    """Resolve the recorded layout with these models as its sources."""
    directive = recorded.directive
    if not isinstance(directive.growth, ExplicitSlices):
        wanted = _with_models(directive, against)
        return resolve(wanted, models, strict=True, allow_non_identity=True)
    written = mergekit_yaml.from_document(
        directive.growth.document, lambda _: models.open(against[0]).depth
    )
    keys = dict(directive.mergekit)
    base = parse_model(keys["base_model"], "base_model") if "base_model" in keys else None
    named = list(dict.fromkeys((*written.models, *([] if base is None else [base]))))
    if len(named) != len(against):
        raise DirectiveError(
            _wrong_number(len(named), len(against)),
            hint=f"in this order: {' '.join(f'--against {model}' for model in named)}",
        )
    known = dict(zip(named, against, strict=True))
    _check_against(known)
    if base is not None:
        keys["base_model"] = known[base].to_yaml()
    slices = (dataclasses.replace(part, model=known[part.model]) for part in written.slices)
    return Expansion(dataclasses.replace(directive, mergekit=keys), Layout(tuple(slices)))


def _check_against(known: Mapping[ModelRef, ModelRef]) -> None:
    """Check the models of `--against`, given for each model of the layout."""
    if len(set(known.values())) < len(known):
        raise DirectiveError("--against: a model is given twice", hint="give each model once")
    for name, model in known.items():
        if (name.lora is None) != (model.lora is None):
            used = "with" if name.lora else "without"
            raise CheckpointError(
                f"--against {model}: the layout uses {name.model} {used} a LoRA",
                hint=f"--against {'BASE+LORA' if name.lora else 'BASE'}",
            )


def _plain_zeros(specs: Sequence[TensorSpec], stored: Mapping[str, Tensor]) -> set[str]:
    """Return the zeroed projections that are stored without the quantization of their source."""
    return {
        spec.name.rpartition(".")[0]
        for spec in specs
        if spec.scale == 0
        and not _dtypes.is_float(spec.dtype)
        and spec.name in stored
        and _dtypes.is_float(stored[spec.name].dtype)
    }


def _unquantized(
    specs: Sequence[TensorSpec], plain: Collection[str], stored: Mapping[str, Tensor]
) -> Iterator[TensorSpec]:
    """Expect plain zeros of some projections, without scales and other companions."""
    for spec in specs:
        module = spec.name.rpartition(".")[0]
        found = stored.get(spec.name)
        if not {module, module.removesuffix(".weight")} & {*plain}:
            yield spec
        elif found is not None and spec.scale == 0:
            yield dataclasses.replace(
                spec,
                tensor=found,
                dtype=found.dtype,
                through=found.dtype,
                shape=found.shape,
                nbytes=found.nbytes,
                zero=0,
            )
        elif found is not None:
            yield spec


def of_itself(recorded: RecordedLayout, directory: Path, models: Models) -> ExpectedModel:
    """Derive what a model must contain from its own original layers.

    Args:
        recorded: Its recorded layout.
        directory: The model's directory.
        models: Opens the model.

    Raises:
        InterleaveError: The model cannot be read, or does not match its layout.
    """
    own = ModelRef(ModelPath(str(directory)))
    result, layout = models.open(own), recorded.layout
    if result.depth != len(layout):
        raise CheckpointError(
            f"{directory}: config.json states {result.depth} layers, expected {len(layout)}, as "
            f"{'in the recipe' if recorded.manifest is None else f'in {manifest.FILE}'}"
        )
    within = _within(layout, own)
    specs = assemble(within, {own: result}, kv_sharing_layers=_kv_sharing_layers(result, within))
    converted_late = "out_dtype" in recorded.directive.mergekit
    config = _own_config(result, within)
    plain = _plain_zeros(specs, result.tensors)
    if plain and config is not None:  # the quantization lists them
        config = {**config, KEY: result.config[KEY]}

    def unread(spec: TensorSpec) -> str | None:
        if spec.is_computed and converted_late:
            return ROUNDED
        return ORIGINAL if spec.is_whole and spec.source == spec.name else None

    return ExpectedModel(
        layout=layout,
        specs=[_unscaled(spec) for spec in _unquantized(specs, plain, result.tensors)],
        config=config,
        unread=unread,
    )


def _within(layout: Layout, own: ModelRef) -> Layout:
    """Return the layout with the result as its only source.

    The source of a layer is its unscaled original, or else the layer itself.
    """
    plain = {x.source: x.index for x in layout.layers if x.is_plain and not x.is_copy}
    slices = []
    for layer in layout.layers:
        origin = layout.original_of(layer)
        origin = origin if layout.layers[origin].is_plain else layer.index
        mean_with = None
        if layer.mean_with is not None and origin != layer.index:
            mean_with = plain.get(layer.mean_with)
            origin = origin if mean_with is not None else layer.index
        edit = (layer.scales, layer.constants)
        slices.append(Slice(own, origin, origin + 1, *edit, mean_with=mean_with))
    return Layout(tuple(slices))


def _unscaled(spec: TensorSpec) -> TensorSpec:
    """Drop the scale of a tensor that is its own source, unless the scale is zero.

    Such a tensor was scaled when the model was made. A zeroed tensor must still be zero.
    """
    if spec.source != spec.name:
        return spec
    scale = 0 if spec.scale == 0 else None
    return dataclasses.replace(spec, scale=scale, mean_with=None)


def _kv_sharing_layers(result: Checkpoint, within: Layout) -> frozenset[int]:
    """Find the layers, not listed in config.json, that lack tensors of their originals."""
    family = result.require_family()
    rules = [rule for rule in (family.indexer_sharing, family.kv_sharing) if rule is not None]

    def has(index: int, names: Collection[str]) -> bool:
        return any(name in tensor for name in names for tensor in result.layer_tensors(index))

    return frozenset(
        layer.index
        for layer in within.layers
        for rule in rules
        if has(layer.source, rule.absent_tensors) and not has(layer.index, rule.absent_tensors)
    )


def _own_config(result: Checkpoint, within: Layout) -> Mapping[str, Any] | None:
    """Return the config with the entries of each new layer taken from its original layer.

    Return None if config.json cannot represent the layout.
    """
    try:
        grown = grown_config.grow({within.models[0]: result}, within, only_stated=True)
    except RefusedError:
        return None
    return grown.config()
