"""`load`: build the deeper model in memory, with layers that share the tensors of its sources."""

from __future__ import annotations

import dataclasses
import warnings as python_warnings
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_interleave import _dtypes
from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave.checkpoint.checkpoint import CONFIG
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.safetensors_header import to_json
from mergekit_interleave.commands import inputs
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.inputs import DirectiveLike, ModelLike
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import DirectiveError, RefusedError, Warn, collected_warnings
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.output import manifest, recorded_layout, weight_sample
from mergekit_interleave.planning import computation_check, structure_check
from mergekit_interleave.planning.expansion_plan import ExpansionPlan, plan_expansion
from mergekit_interleave.planning.resolve import resolve
from mergekit_interleave.training import freeze
from mergekit_interleave.verification import expected
from mergekit_interleave.virtual import model as shared_model
from mergekit_interleave.virtual import quantized_modules, saving, sources


def load(  # noqa: PLR0913 - one parameter for each option
    directive: DirectiveLike | None = None,
    *,
    model: ModelLike | None = None,
    base: Any = None,
    dtype: Any = "auto",
    device_map: Any = None,
    allow_non_identity: bool = False,
    trust_remote_code: bool = False,
    trainable: bool = False,
) -> Any:
    """Build the deeper model of a directive in memory. Nothing is written.

    The model has the class that would load what `run` writes, and computes the same. Its layers
    share the tensors of the source models, so that a repeated layer takes no memory; only scaled,
    converted and filled tensors take their own. `save_pretrained` stores every layer.

    If the base is quantized, the new layers share its quantized weights, and zeroed projections are
    not quantized. What would change a quantized weight is refused.

    Args:
        directive: Text, a path, an open file, a mapping, or a `Directive`.
        model: The source model, if the directive names none: a directory or a Hub id.
        base: The source model, loaded already by transformers on one device, and perhaps quantized
            by it. It stays unchanged. If the directive and `model` name none, the model is its.
        dtype: The dtype to load in, as for `from_pretrained`. `base` already has one.
        device_map: The one device to load to, as for `from_pretrained`. `base` already has one.
        allow_non_identity: Accept a `zero` list with which the new layers are not identities.
        trust_remote_code: Run code from the models. By default none is run.
        trainable: Let the new layers be trained: they get their own memory, and all other
            parameters are frozen. Otherwise all parameters are frozen.

    Returns:
        A model of transformers in evaluation mode.

    Raises:
        InterleaveError: `run` would refuse the directive, or the layers cannot be shared.
        DirectiveError: The directive is invalid, or belongs to another model than `base`.
    """
    wanted = named(inputs.parse(inputs.read(directive), {"model": model}), base)
    if base is not None and (dtype != "auto" or device_map is not None):
        raise DirectiveError(
            "dtype and device_map cannot be combined with base, which is loaded already",
            hint="load the base in that dtype, or leave base out",
        )
    with restored_settings(), collected_warnings() as warnings:
        plan = planned(
            wanted,
            Models(trust_remote_code=trust_remote_code),
            allow_non_identity=allow_non_identity,
            warn=warnings.append,
        )
        known = {} if base is None else {sources.source_of(base, plan.sources).ref: base}
        found = built(plan, known, dtype=dtype, device_map=device_map, warn=warnings.append)
        if trainable and quantized_modules.is_quantized(found):
            raise RefusedError(
                "the new layers are quantized, so their weights cannot be trained",
                hint="write the model with `run`, load it quantized, and train a LoRA of PEFT",
            )
        if trainable:
            freeze.freeze(found, plan.layout)
    for warning in dict.fromkeys(warnings):
        python_warnings.warn(warning, stacklevel=2)
    return found


def named(directive: Directive, base: Any) -> Directive:
    """Return a directive that names its model: if it names none, that of a loaded base.

    Raises:
        DirectiveError: `base` is no model, or does not record where it was loaded from.
    """
    if base is None:
        return directive
    sources.check_model(base)
    if directive.model is not None or (directive.growth and directive.growth.models):
        return directive
    return directive.replaced_by(inputs.parse(None, {"model": sources.place_of(base)}))


def planned(
    directive: Directive, models: Models, *, allow_non_identity: bool = False, warn: Warn
) -> ExpansionPlan:
    """Plan the model of a directive.

    Args:
        directive: The directive.
        models: Opens the source models.
        allow_non_identity: Whether zeroed layers may change the result.
        warn: Called with each warning.

    Raises:
        InterleaveError: `run` would refuse it, or it can only be written.
    """
    expansion = resolve(directive, models, strict=True, allow_non_identity=allow_non_identity)
    plan = plan_expansion(expansion, models, None)
    for warning in plan.warnings:
        warn(warning)
    reason = _only_written(plan)
    if reason is not None:
        raise RefusedError(f"{reason}, which needs written weights", hint="use `run`")
    return plan


def _only_written(plan: ExpansionPlan) -> str | None:
    """Return why a model cannot be built in memory, as a clause, or None if it can."""
    if plan.uses_lora:
        return "mergekit merges a LoRA into a source"
    if mergekit_yaml.changes_tokenizer(plan.mergekit):
        return "mergekit makes another tokenizer"
    zeroed = any(layer.zeroed or layer.constants for layer in plan.layout.new_layers)
    if zeroed and plan.first.require_family().is_unknown:
        return f"model type {plan.first.model_type!r} is unknown, so zeroed layers are measured"
    return None


def built(
    plan: ExpansionPlan,
    known: Mapping[ModelRef, Any],
    *,
    dtype: Any = "auto",
    device_map: Any = None,
    warn: Warn,
) -> Any:
    """Build the model of a plan.

    Args:
        plan: The plan.
        known: The source models that are loaded already, as `sources.source_of` accepts them.
        dtype: The dtype to load the other source models in.
        device_map: The device to load them to.
        warn: Called with each warning.

    Raises:
        InterleaveError: The model cannot be built.
    """
    models = _loaded(plan, known, dtype, device_map)
    with scratch_directory() as folder:
        (folder / CONFIG).write_text(to_json(plan.config()), encoding="utf-8")
        for name, content in plan.carried(warn):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        found, loading = shared_model.build(plan, models, folder)
        structure_check.check_loading(loading, [*plan.sources.values()], depth=len(plan.layout))
        computation_check.check_plan(plan, folder, warn)
    if plan.first.require_family().facts.changes_weights:
        shared_model.unshare(found, range(len(plan.layout)), len(plan.layout))

    setattr(found, freeze.GROWN, plan.layout)
    return saving.saving_every_layer(found, partial(_record, plan, found, warn=warn))


def _record(
    plan: ExpansionPlan, model: Any, out: Path, files: Collection[str], *, warn: Warn
) -> None:
    """Write interleave.json beside the weights of a model that was saved."""
    is_quantized = quantized_modules.is_quantized(model) or plan.first.is_quantized
    stored = plan if is_quantized else _stored_as(plan, str(model.dtype).removeprefix("torch."))
    content = manifest.describe(stored, manifest.SAVED, None, {}, warn)
    content |= {weight_sample.KEY: weight_sample.digest(out)}
    content |= {"files": sorted({*files, manifest.FILE})}
    manifest.write(out, content)
    if is_quantized:
        own = expected.of_itself(recorded_layout.read(out, None), out, Models())
        for key in ("parameters", "new_parameters"):  # a stored integer contains several
            content.pop(key, None)
        manifest.write(out, content | manifest.totals(own.layout, own.specs, packed=True))


def _stored_as(plan: ExpansionPlan, dtype: str) -> ExpansionPlan:
    """Return the plan of a model that transformers saves in a dtype."""
    if plan.dtype == dtype:
        return plan
    directive = plan.expansion.directive
    is_stated = mergekit_yaml.dtype_of(directive.mergekit) is not None
    keys = {**directive.mergekit, "out_dtype" if is_stated else "dtype": dtype}
    models = Models(trust_remote_code=plan.first.trusted)
    converted = dataclasses.replace(directive, mergekit=keys)
    expansion = resolve(converted, models, strict=True, allow_non_identity=True)
    return plan_expansion(expansion, models, None)


def _check_dtype(plan: ExpansionPlan, dtype: Any) -> None:
    """Check that the loaded dtype represents what a directive converts the weights to.

    Raises:
        DirectiveError: It does not.
    """
    stated, loaded = mergekit_yaml.dtype_of(plan.mergekit), str(dtype).removeprefix("torch.")
    if stated is None or loaded == stated:
        return
    if loaded not in map(_dtypes.name_of, _dtypes.wider(_dtypes.NAMED[stated].stored)):
        raise DirectiveError(
            f"the directive converts the model to {stated}, but it is loaded in {loaded}",
            hint=f"load it in {stated}, or leave the dtype out of the directive",
        )


def _loaded(
    plan: ExpansionPlan, known: Mapping[ModelRef, Any], dtype: Any, device_map: Any
) -> dict[ModelRef, Any]:
    """Return the loaded source models; those that are not known are loaded alike.

    Raises:
        RefusedError: One of them cannot be loaded, or cannot share its layers.
    """
    like = None
    for ref, like in known.items():
        own = plan.sources[ref]
        if own.require_family().facts.changes_weights:
            raise RefusedError(
                f"{own.ref}: the class of model type {own.model_type} changes its weights when it "
                "runs, so they cannot be shared",
                hint="leave base out, so that the model gets its own weights",
            )
        dtype, device_map = like.dtype, {"": next(like.parameters()).device}
    if dtype == "auto":
        dtype = plan.dtype or dtype
    _check_dtype(plan, dtype)
    return {
        ref: known[ref]
        if ref in known
        else sources.load_source(checkpoint, dtype, device_map, like)
        for ref, checkpoint in plan.sources.items()
    }
