"""`run`: preflight, staging, engine, config, small files, card, check, one rename."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.checkpoint import CONFIG
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.safetensors_header import (
    check_unchanged,
    iterate_tensors,
    read_tensors,
    to_json,
)
from mergekit_interleave.engines import mergekit, registry, select
from mergekit_interleave.engines.protocol import WriteOptions, WriteResult
from mergekit_interleave.engines.writer import Writer
from mergekit_interleave.errors import (
    OutputError,
    RefusedError,
    UnsayableError,
)
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import card_data, manifest, verification_text
from mergekit_interleave.output.staging import check_vacant, files_below, staged
from mergekit_interleave.planning import structure_check, suggest
from mergekit_interleave.planning.expansion_plan import ExpansionPlan, plan_expansion, vocab_size
from mergekit_interleave.planning.resolve import Expansion, resolve
from mergekit_interleave.planning.tensor_plan import TensorSpec
from mergekit_interleave.verification import forward
from mergekit_interleave.verification import report as verification
from mergekit_interleave.verification.tensors import Comparison, Tolerance, compare

log = logging.getLogger(__name__)

_UNPICKLED = ".unpickled"
"""Where pickled weights are written as safetensors, within the directory that becomes OUT."""


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        weights: How to write the weights.
        replace: Replace a model that stands at OUT.
        base_model: The Hub id of the base, where its directory does not tell.
        verify: Read back what was written, and compare it with the sources.
        allow_pickle: Read pickled weights.
        allow_non_identity: See `expand.resolve`, which is asked again once they are read.
    """

    weights: WriteOptions = field(default_factory=WriteOptions)
    replace: bool = False
    base_model: str | None = None
    verify: bool = True
    allow_pickle: bool = False
    allow_non_identity: bool = False


@dataclass(frozen=True)
class RunReport:
    """What was made.

    Attributes:
        layout: Its layers.
        written: What came of reading it back.
        outcome: How it came there.
        parameters: How many numbers it holds; None where integers hold several each.
        name: The name that is suggested for it; None where its card could not be written.
    """

    layout: Layout
    written: Comparison
    outcome: WriteResult
    parameters: int | None
    name: str | None


def run(expansion: Expansion, models: Models, out: Path, options: Options) -> RunReport:
    """Make the deeper model.

    Args:
        expansion: What to make.
        models: Where its source models are opened.
        out: Where it is to appear.
        options: How.

    Raises:
        InterleaveError: It cannot be made, and nothing is at OUT.
    """
    try:
        return _run(expansion, models, out, options)
    except UnsayableError as error:
        base = models.open(expansion.layout.models[0])
        with mergekit.quiet(options.weights.mergekit.get("verbosity")):
            works = suggest.suggestion(base, expansion.directive, expansion.layout)
        error.hint = f"this would do: {works}" if works else None
        raise


def _run(expansion: Expansion, models: Models, out: Path, options: Options) -> RunReport:
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow OUT if it is a link
    check_vacant(out, replace=options.replace)
    how = options.weights
    select.check(how, expansion)

    def write(work: Path) -> RunReport:
        nonlocal expansion
        scratch = work / _UNPICKLED
        if options.allow_pickle:
            expansion = _unpickled(expansion, models, scratch, options)
        plan = plan_expansion(
            expansion, models, out, base_model=options.base_model, mix=mergekit.mixes(how.mergekit)
        )
        measured = plan.first.require_family().measured
        writer = Writer(plan, work, how)
        writer.check_room()
        _write_json(work / CONFIG, plan.config())
        _copy_small_files(plan, work)
        if measured or how.loads_transformers:
            with mergekit.quiet(how.mergekit.get("verbosity")):
                _check_classes(plan, work)
        if measured and not plan.is_identity:
            raise RefusedError(
                f"nothing is known of model type {plan.first.model_type!r}: only an expansion "
                "that computes what its base computes can be measured",
                hint="zero the new layers' residual writers",
            )
        outcome = writer.write()
        for note in outcome.notes:
            log.info("%s", note)
        check_unchanged(spec.tensor for spec in plan.specs)
        written = _check_weights(plan, work, options, outcome)
        verified: dict[str, Any] = {}
        if options.verify:
            against = [plan.public.title(model) for model in plan.sources]
            verified[verification_text.WEIGHTS] = verification.outcome(written, against, plan.specs)
        if measured:
            verified[verification_text.FORWARD] = _measure(plan, work)
        if mergekit_yaml.changes_vocabulary(plan.mergekit):
            _write_json(work / CONFIG, plan.config(vocab_size(read_tensors(work), plan)))
        shutil.rmtree(scratch, ignore_errors=True)
        (work / mergekit_yaml.FILE).write_text(plan.recipe, encoding="utf-8")
        content = manifest.describe(plan, outcome.engine, outcome.beyond, verified)
        name = card_data.write(work, out.name, content)
        files = sorted({*files_below(work), manifest.FILE})
        _write_json(work / manifest.FILE, {**content, "files": files})
        return RunReport(plan.layout, written, outcome, content.get("parameters"), name)

    result = staged(out, write, replace=options.replace)
    for warning in result.warnings:
        log.warning("%s", warning)
    return result.value


def _unpickled(expansion: Expansion, models: Models, scratch: Path, options: Options) -> Expansion:
    """The same, where names were not yet checked against tensors that were pickled."""
    models.unpickle_into = scratch
    found = [models.with_weights(model) for model in expansion.layout.models]
    if not any(checkpoint.unpickled for checkpoint in found):
        return expansion
    return resolve(
        expansion.directive,
        models,
        strict=True,
        allow_non_identity=options.allow_non_identity,
    )


def _check_classes(plan: ExpansionPlan, work: Path) -> None:
    """What the class that loads the result makes of it; the data alone says it, if it is right.

    Loading transformers for it takes longer than the stream engine may, which does without.
    """
    if len(plan.sources) > 1:  # several are stacked only where all layers are alike
        meta_model.shapes(work, trusted=plan.first.trusted)
    else:
        structure_check.check(plan.first, plan.layout, work, plan.placement.kv_sharing_layers)


def _copy_small_files(plan: ExpansionPlan, work: Path) -> None:
    for name, content in plan.carried():
        target = work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _check_weights(
    plan: ExpansionPlan, work: Path, options: Options, outcome: WriteResult
) -> Comparison:
    """Compare what was written with what was to be written.

    Raises:
        OutputError: They differ.
    """
    any_dtype = plan.uses_lora and "lora_merge_dtype" in options.weights.mergekit
    new_vocabulary = mergekit_yaml.changes_vocabulary(plan.mergekit)

    def unread(spec: TensorSpec) -> str | None:
        # mergekit multiplies: an infinity times 0 is no zero. The other engine writes zeros.
        if options.verify or (registry.ENGINES[outcome.engine].multiplies and spec.scale == 0):
            return plan.reason_unread(spec)
        return "not asked for"

    leeway = Tolerance(
        unread=unread,
        any_dtype=lambda _: any_dtype,
        any_rows=lambda spec: new_vocabulary and spec.layer is None,
    )
    written = compare(iterate_tensors(work), plan.specs, leeway)
    if written.differences:
        first, *more = written.differences
        others = f", and {len(more)} more are wrong" if more else ""
        raise OutputError(
            f"the weights came out wrong: {first}{others}",
            hint="does the base hold an infinity or NaN there? times 0 that is NaN"
            if first.what.startswith("is not zero")
            else None,
        )
    return written


def _measure(plan: ExpansionPlan, work: Path) -> dict[str, Any]:
    """Whether the result computes what its base computes, where nothing is known of the type.

    Raises:
        RefusedError: It does not, or that cannot be told.
    """
    found = forward.compare(plan.first.store, work, trust_remote_code=plan.first.trusted)
    if not found.is_exact:
        raise RefusedError(
            "nothing is known of this model type, and the result does not compute what its "
            f"base: its logits differ by {found.relative:.0e} of their size",
            hint="perhaps with other names: all that writes to the residual stream must be zero",
        )
    return found.outcome(identity=True)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(to_json(content), encoding="utf-8")
