"""Derive the tensors and the config that a model must contain from its recorded layout.

If the sources are available, the model is checked against them. Otherwise it is checked against
itself: each new layer must be a copy of the original layer in the same model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import ExplicitSlices, Stack
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, parse_model
from mergekit_interleave.errors import CheckpointError, DirectiveError, RefusedError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout, Slice
from mergekit_interleave.output import manifest
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
    """

    layout: Layout
    specs: Sequence[TensorSpec]
    config: Mapping[str, Any] | None
    unread: Callable[[TensorSpec], str | None]
    plan: ExpansionPlan | None = None
    warnings: tuple[str, ...] = ()


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
    fetched = opener.fetch_small_files(opener.open(expansion.base))
    legacy = recorded.manifest is not None and bool(recorded.manifest.content.get(manifest.LEGACY))
    plan = plan_expansion(expansion, models, None, mix=True, legacy=legacy)
    if recorded.manifest is not None:
        for model, depth in zip(plan.layout.models, recorded.manifest.depths, strict=True):
            if plan.sources[model].depth != depth:
                raise CheckpointError(
                    f"{model}: has {plan.sources[model].depth} layers, but {manifest.FILE} records "
                    f"{depth} for this source"
                )
    return ExpectedModel(
        layout=plan.layout,
        specs=plan.specs,
        config=plan.config(),
        unread=plan.reason_unread,
        plan=plan,
        warnings=(*plan.warnings, *fetched),
    )


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
    if len(set(against)) < len(against):
        raise DirectiveError("--against: a model is given twice", hint="give each model once")
    for name, model in known.items():
        if (name.lora is None) != (model.lora is None):
            used = "with" if name.lora else "without"
            raise CheckpointError(
                f"--against {model}: the layout uses {name.model} {used} a LoRA",
                hint=f"--against {'BASE+LORA' if name.lora else 'BASE'}",
            )
    if base is not None:
        keys["base_model"] = known[base].to_yaml()
    slices = (dataclasses.replace(part, model=known[part.model]) for part in written.slices)
    return Expansion(dataclasses.replace(directive, mergekit=keys), Layout(tuple(slices)))


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

    def unread(spec: TensorSpec) -> str | None:
        if spec.is_computed and converted_late:
            return ROUNDED
        return ORIGINAL if spec.is_whole and spec.source == spec.name else None

    return ExpectedModel(
        layout=layout,
        specs=[_unscaled(spec) for spec in specs],
        config=_own_config(result, within),
        unread=unread,
    )


def _within(layout: Layout, own: ModelRef) -> Layout:
    """Return the layout with the result as its only source. An original layer is its own source."""
    originals = {
        (layer.model, layer.source): layer.index for layer in layout.layers if not layer.new
    }
    slices = []
    for layer in layout.layers:
        origin = originals.get((layer.model, layer.source), layer.index)
        slices.append(Slice(own, origin, origin + 1, layer.scales, layer.constants))
    return Layout(tuple(slices))


def _unscaled(spec: TensorSpec) -> TensorSpec:
    """Drop the scale of a tensor that is its own source, unless the scale is zero.

    Such a tensor was scaled when the model was made. A zeroed tensor must still be zero.
    """
    if spec.source != spec.name or spec.scale in (None, 0):
        return spec
    return dataclasses.replace(spec, scale=None)


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
