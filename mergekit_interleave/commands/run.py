"""`run`: plan, write into a staging directory, check, and rename it to OUT."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_interleave._stored_tensor import check_unchanged
from mergekit_interleave._units import amount
from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.checkpoint import CONFIG, Checkpoint
from mergekit_interleave.checkpoint.class_loading import Form
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.safetensors_header import (
    iterate_tensors,
    read_json,
    read_tensors,
    to_json,
)
from mergekit_interleave.commands import gguf, inputs
from mergekit_interleave.commands._background import checking, stopped_by
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.inputs import DirectiveLike, StrPath
from mergekit_interleave.commands.run_report import RunReport
from mergekit_interleave.engines import mergekit_definitions, registry, select
from mergekit_interleave.engines.mergekit import mixes, quieten
from mergekit_interleave.engines.protocol import Bar, WriteOptions, WriteResult, no_bar
from mergekit_interleave.engines.writer import Writer
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    OutputError,
    RefusedError,
    UnrepresentableError,
    Warn,
    collected_warnings,
)
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.output import (
    card_files,
    manifest,
    recorded_layout,
    verification_text,
    weight_sample,
)
from mergekit_interleave.output.staging import check_vacant, files_below, staged
from mergekit_interleave.planning import computation_check, public_names, structure_check, suggest
from mergekit_interleave.planning import legacy_config as legacy_configs
from mergekit_interleave.planning.expansion_plan import (
    ExpansionPlan,
    check_out,
    plan_expansion,
    vocab_size,
)
from mergekit_interleave.planning.resolve import Expansion, models_for, resolve
from mergekit_interleave.planning.tensor_plan import TensorSpec
from mergekit_interleave.verification import files, forward
from mergekit_interleave.verification import report as verification
from mergekit_interleave.verification.expected import ExpectedModel
from mergekit_interleave.verification.tensors import Comparison, Tolerance, compare
from mergekit_interleave.verification.while_writing import RunningComparison

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergekit_interleave.commands.inputs import Words

_UNPICKLED = ".unpickled"
"""The directory for converted pickled weights, inside the staging directory."""


def run(  # noqa: PLR0913 - one parameter for each option
    directive: DirectiveLike | None = None,
    out: StrPath | None = None,
    *,
    engine: str | None = None,
    out_shard_size: int | str | None = None,
    reflink: bool = True,
    verify: bool = True,
    force: bool = False,
    base_model: str | None = None,
    repo: str | None = None,
    legacy_config: bool = False,
    allow_pickle: bool = False,
    allow_non_identity: bool = False,
    trust_remote_code: bool = False,
    cuda: bool = False,
    device: str | None = None,
    low_cpu_memory: bool = False,
    lazy_unpickle: bool = False,
    async_write: bool = False,
    mergekit: Mapping[str, object] | None = None,
    progress: Bar | None = None,
    **words: Unpack[Words],
) -> RunReport:
    """Write the deeper model to a directory, with config, tokenizer and model card.

    The directory appears when the model is complete and checked, or not at all. If the model is a
    GGUF file, so is the result, and its card lies beside it.

    Args:
        directive: Text, a path, an open file, a mapping, or a `Directive`. A mergekit passthrough
            config is a directive, too.
        out: The directory to write, or the GGUF file.
        engine: The engine that writes the weights: `auto` (the first that can), or its name. The
            default is the environment variable `MK_INTERLEAVE_ENGINE`, or else `auto`.
        out_shard_size: The maximum size of a shard: bytes, or text such as `5GB`.
        reflink: Let the stream engine share disk blocks with the base if the filesystem can.
        verify: Read the written weights back and compare them with the sources.
        force: Replace a model at `out` that `run` or mergekit wrote; nothing else is replaced.
        base_model: The Hub id of a local source model, for the model card and the recipe.
        repo: The Hub id under which you will publish the model, for the model card.
        legacy_config: Write into config.json and tokenizer_config.json what transformers 4 reads,
            beside what transformers 5 reads.
        allow_pickle: Read the tensors in pickled weights, and nothing else.
        allow_non_identity: Accept a `zero` list with which the new layers are not identities.
        trust_remote_code: Run code from the models. By default none is run.
        cuda: Let mergekit do arithmetic on the GPU.
        device: The device on which mergekit does arithmetic.
        low_cpu_memory: Let mergekit keep intermediate values on the device.
        lazy_unpickle: Let mergekit load pickles lazily.
        async_write: Let mergekit write shards in the background.
        mergekit: Other options of mergekit-yaml, by name.
        progress: Called with the number of bytes to write. It returns a context manager that yields
            a function, which is called with the number of bytes of each step.
        words: Keywords that take precedence over the directive; see `Words`.

    Returns:
        The report: the layers, the written bytes, and the comparison with the sources.

    Raises:
        InterleaveError: The model cannot be written exactly; nothing is written to `out`.
    """
    request = registry.requested(engine)
    if not out:
        raise DirectiveError("OUT is empty", hint="name the directory to write")
    if device is not None:
        _check_device(device)
    stated = {
        "cuda": cuda,
        "device": device,
        "low_cpu_memory": low_cpu_memory,
        "lazy_unpickle": lazy_unpickle,
        "async_write": async_write,
        "trust_remote_code": trust_remote_code,
    }
    given = {name: value for name, value in stated.items() if value}
    mergekit_options = given | dict(mergekit or {})
    wanted = inputs.parse(inputs.read(directive), words)
    options = _Options(
        weights=WriteOptions(
            request=request,
            shard_size=inputs.parse_size(out_shard_size, "--out-shard-size"),
            reflink=reflink,
            mergekit=mergekit_options,
            bar=progress or no_bar,
        ),
        replace=force,
        base_model=base_model,
        repo=None if repo is None else public_names.checked_id(repo, "repo"),
        legacy=legacy_config,
        verify=verify,
        allow_pickle=allow_pickle,
        allow_non_identity=allow_non_identity,
    )
    cache_dir = mergekit_options.get("transformers_cache")
    models = Models(
        cache_dir=None if cache_dir is None else str(cache_dir),
        trust_remote_code=trust_remote_code,
    )
    with restored_settings(bars=progress is not None), collected_warnings() as warnings:
        expansion = resolve(wanted, models, strict=True, allow_non_identity=allow_non_identity)
        if expansion.is_gguf:
            others = {"--legacy-config": legacy_config, "--allow-pickle": allow_pickle}
            others |= {f"--{key.replace('_', '-')}": True for key in mergekit_options}
            return gguf.run(
                expansion,
                Path(out),
                gguf.GgufOptions(
                    weights=options.weights,
                    replace=options.replace,
                    base_model=options.base_model,
                    repo=options.repo,
                    verify=options.verify,
                    others=[flag for flag, given in others.items() if given],
                ),
            )
        warnings.extend(expansion.warnings)
        try:
            return _run(expansion, models, Path(out), options, warnings)
        except UnrepresentableError as error:
            quieten(options.weights.mergekit.get("verbosity"))
            base = models.open(expansion.layout.models[0])
            works = suggest.suggestion(base, expansion.directive, expansion.layout)
            error.hint = f"this would do: {works}" if works else None
            raise


def _check_device(device: str) -> None:
    """Check that torch knows a device, whether or not this machine has it.

    Raises:
        DirectiveError: torch does not know it.
    """
    import torch  # noqa: PLC0415 - takes seconds to import

    try:
        torch.device(device)
    except RuntimeError as error:
        raise DirectiveError(
            f"--device: {device!r} is not a device of torch", hint="use cpu, cuda, cuda:1 or mps"
        ) from error


@dataclass(frozen=True)
class _Options:
    """The options of `run`.

    Attributes:
        weights: How to write the weights.
        replace: Whether to replace an existing model at OUT.
        base_model: The Hub id of a local source model.
        repo: The Hub id under which the model will be published.
        legacy: Whether to write config.json and the tokenizer also for transformers 4.
        verify: Whether to read the written weights back and compare them with the sources.
        allow_pickle: Whether to read pickled weights.
        allow_non_identity: See `resolve`, which is called again after pickled weights are read.
    """

    weights: WriteOptions
    replace: bool
    base_model: str | None
    repo: str | None
    legacy: bool
    verify: bool
    allow_pickle: bool
    allow_non_identity: bool


def _run(
    expansion: Expansion, models: Models, place: Path, options: _Options, warnings: list[str]
) -> RunReport:
    out = Path(os.path.abspath(place))  # noqa: PTH100 - resolve() would follow OUT if it is a link
    _check_no_gguf(out)
    for source in expansion.checkpoints.values():
        check_out(out, source)
    check_vacant(out, replace=options.replace)
    how = options.weights
    select.check(how, expansion)

    def write(work: Path) -> RunReport:
        nonlocal expansion, models
        scratch = work / _UNPICKLED
        if options.allow_pickle:
            models = models.unpickling_into(scratch)
            expansion = _unpickled(expansion, models, options)
        plan = plan_expansion(
            expansion,
            models,
            out,
            base_model=options.base_model,
            mix=mixes(how.mergekit),
            legacy=options.legacy,
        )
        warnings.extend((*plan.warnings, *manifest.check_sources(plan, options.base_model)))
        must_measure = _must_measure(plan)
        writer = Writer(plan, work, how)
        writer.check_room()
        _write_json(work / CONFIG, plan.config())
        _copy_small_files(plan, work, warnings.append)
        outcome, equal = _write_weights(
            writer,
            verify=options.verify,
            check=lambda: _check_class(plan, work, warnings.append, how=how, required=must_measure),
        )
        if options.legacy:  # mergekit may have written another tokenizer
            legacy_configs.rewrite_tokenizer(work)
        check_unchanged(spec.tensor for spec in plan.specs)
        written = _check_weights(plan, work, options, outcome, equal)
        verified: dict[str, Any] = {}
        if options.verify:
            against = [plan.public.title(model) for model in plan.sources]
            verified[verification_text.WEIGHTS] = verification.outcome(written, against, plan.specs)
        if must_measure:
            verified[verification_text.FORWARD] = _measure(plan, work)
        if mergekit_yaml.changes_vocabulary(plan.mergekit):
            found = read_tensors(work)
            result = Checkpoint(plan.base.ref, work, plan.config(), is_local=True)
            _write_json(work / CONFIG, plan.config(vocab_size(result)))
            _check_tensors(plan, work, structure_check.forms_of_tensors(found))
        shutil.rmtree(scratch, ignore_errors=True)
        warnings.extend((*_about_shards(plan, work, how.shard_size), *plan.client_warnings))
        (work / mergekit_yaml.FILE).write_text(plan.recipe, encoding="utf-8")
        content = manifest.describe(plan, outcome.engine, outcome.beyond, verified, warnings.append)
        content |= {weight_sample.KEY: weight_sample.digest(work)}
        content |= {manifest.REPO: options.repo} if options.repo else {}
        card = None
        try:
            card, content = card_files.write(work, content, plan.layout, name=out.name)
        except Exception as error:  # noqa: BLE001 - an error in the card must not lose the weights
            warnings.append(f"the model card could not be written: {error}")
        names = sorted({*files_below(work), manifest.FILE})
        _write_json(work / manifest.FILE, {**content, "files": names})
        _check_files(plan, work)
        return RunReport(
            out=place,
            layout=plan.layout,
            written=written,
            outcome=outcome,
            parameters=content.get("parameters"),
            name=None if card is None else card.name,
            warnings=tuple(dict.fromkeys(warnings)),
            notes=outcome.notes,
        )

    result = staged(out, write, replace=options.replace)
    return dataclasses.replace(result.value, warnings=(*result.value.warnings, *result.warnings))


def _check_no_gguf(out: Path) -> None:
    """Refuse the name of a GGUF file for a model directory."""
    if out.suffix.lower() == ".gguf" and not out.is_dir():
        raise RefusedError(
            f"{out}: is the name of a GGUF file, but the model is a directory",
            hint="name a directory, and convert it with convert_hf_to_gguf.py of llama.cpp",
        )


def _unpickled(expansion: Expansion, models: Models, options: _Options) -> Expansion:
    """Resolve again if weights were pickled, to check the names in `zero` and `scale`."""
    models = models_for(expansion.directive, models)
    checkpoints = [models.with_weights(model) for model in expansion.layout.models]
    if not any(checkpoint.unpickled for checkpoint in checkpoints):
        return expansion
    return resolve(
        expansion.directive,
        models,
        strict=True,
        allow_non_identity=options.allow_non_identity,
    )


def _about_shards(plan: ExpansionPlan, work: Path, limit: int | None) -> Iterator[str]:
    """Warn if the largest tensor exceeds the maximum size of a shard, as with a forgotten unit."""
    largest = max((spec.nbytes for spec in plan.specs), default=0)
    if limit is not None and limit < largest:
        shards = sum(1 for _ in work.glob("*.safetensors"))
        yield (
            f"--out-shard-size: {amount(limit)} is less than the largest tensor, "
            f"{amount(largest)}; {shards} shards were written"
        )


def _must_measure(plan: ExpansionPlan) -> bool:
    """Whether the result must be run and compared with its base.

    The residual writers of an unknown type are not known, so whether its zeroed layers are
    identities is measured. Plain copies claim nothing.

    Raises:
        RefusedError: It must, but it would not compute what its base computes.
    """
    zeroed = any(layer.zeroed or layer.constants for layer in plan.layout.new_layers)
    if not zeroed or not plan.first.require_family().is_unknown:
        return False
    if not plan.is_identity:
        raise RefusedError(
            f"model type {plan.first.model_type!r} is unknown: that its zeroed layers are "
            "identities can only be measured if the result keeps every layer of its base",
            hint="leave `zero` out, which makes plain copies, or keep every layer",
        )
    return True


def _write_weights(
    writer: Writer, *, verify: bool, check: Callable[[], None]
) -> tuple[WriteResult, Collection[str]]:
    """Write the weights while transformers is asked whether it would load them.

    Importing transformers takes longer than writing a small model, so both happen at once, unless
    the engine needs transformers too.

    Args:
        writer: Writes the weights.
        verify: Whether to compare them with the sources.
        check: Asks transformers.

    Returns:
        The result, and the names of the tensors that were compared while they were written.
    """
    plan, how = writer.plan, writer.how

    running = RunningComparison(plan.specs if verify else (), plan.reason_unread)
    with checking(check) as checked, closing(running):
        if how.loads_transformers:
            checked.result()
        how = dataclasses.replace(how, bar=stopped_by(checked, how.bar), written=running.written)
        outcome = dataclasses.replace(writer, how=how).write()
        checked.result()
    return outcome, running.equal


def _check_class(
    plan: ExpansionPlan, work: Path, warn: Warn, *, how: WriteOptions, required: bool
) -> None:
    """Check that the class loads every tensor, and that no layer computes something else.

    Args:
        plan: The plan.
        work: The directory with the new config.json.
        warn: Called with a warning if the class is not available.
        how: The options for writing.
        required: Whether the class must be available.

    Raises:
        InterleaveError: The class is not available although it must be, or it would load or compute
            something else.
    """
    quieten(how.mergekit.get("verbosity"))
    own_code = "auto_map" in plan.base.config
    has_class = meta_model.has_class(work, trusted=plan.first.trusted)
    if required and own_code and not has_class:
        raise RefusedError(
            f"{plan.first.ref}: model type {plan.first.model_type!r} is unknown, and its class is "
            "not built, so it cannot be measured whether the zeroed layers are identities",
            hint="pass --trust-remote-code to run the model's own code",
        )
    if not required and not has_class:
        why = ", because its code is not run without --trust-remote-code" if own_code else ""
        warn(
            f"the class of model type {plan.first.model_type!r} was not built{why}: layers were "
            "copied by their tensor names, and it is not checked that the class accepts them and "
            "that no layer computes with its index"
        )
        _check_definition(plan)
        return
    if not mergekit_yaml.changes_vocabulary(plan.mergekit):  # otherwise what was written is checked
        _check_tensors(plan, work, structure_check.forms_of(plan.specs))
    computation_check.check_plan(plan, work, warn, mix=mixes(how.mergekit))


def _check_definition(plan: ExpansionPlan) -> None:
    """Check the tensors by mergekit's definition of the class, if the class is not available.

    Raises:
        CheckpointError: A tensor is missing.
    """
    missing = mergekit_definitions.missing(plan)
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{plan.first.ref}: no tensor is stored for {missing[0]}{others}, which mergekit's "
            f"definition of model type {plan.first.model_type} requires"
        )


def _check_tensors(plan: ExpansionPlan, work: Path, forms: Mapping[str, Form]) -> None:
    structure_check.check(work, forms, [*plan.sources.values()], depth=len(plan.layout))


def _copy_small_files(plan: ExpansionPlan, work: Path, warn: Warn) -> None:
    for name, content in plan.carried(warn):
        target = work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _check_weights(
    plan: ExpansionPlan,
    work: Path,
    options: _Options,
    outcome: WriteResult,
    equal: Collection[str],
) -> Comparison:
    """Compare the written tensors with the planned ones, unless their bytes were found equal.

    Raises:
        OutputError: They differ.
    """
    any_dtype = plan.uses_lora and "lora_merge_dtype" in options.weights.mergekit
    new_vocabulary = mergekit_yaml.changes_vocabulary(plan.mergekit)

    def unread(spec: TensorSpec) -> str | None:
        # mergekit multiplies by 0, and infinity times 0 is NaN. The stream engine writes zeros.
        if options.verify or (registry.ENGINES[outcome.engine].multiplies and spec.scale == 0):
            return plan.reason_unread(spec)
        return "--no-verify"

    tolerance = Tolerance(
        unread=unread,
        any_dtype=lambda _: any_dtype,
        any_rows=lambda spec: new_vocabulary and spec.layer is None,
    )
    source_name = verification.source_name(plan)
    written = compare(iterate_tensors(work), plan.specs, tolerance, source_name, equal)
    if written.differences:
        first, *more = written.differences
        others = f", and {len(more)} more" if more else ""
        zeroed = any(spec.name == first.tensor and spec.scale == 0 for spec in plan.specs)
        multiplied = zeroed and registry.ENGINES[outcome.engine].multiplies
        raise OutputError(
            f"the written weights are wrong: {first}{others}",
            # Infinity or NaN in the base, times 0, is NaN.
            hint="if the base has infinity or NaN there, --engine stream writes zeros"
            if multiplied
            else None,
        )
    return written


def _check_files(plan: ExpansionPlan, work: Path) -> None:
    """Check the other files by the rules of `verify`.

    Raises:
        OutputError: `verify` would find a difference.
    """
    expected = ExpectedModel.of_plan(plan, read_json(work / CONFIG))
    differences = [
        *files.of_records(work, recorded_layout.read(work), expected, trained=False),
        *files.of_weights(work),
    ]
    for difference in differences:
        raise OutputError(f"the written model is inconsistent: {difference}")


def _measure(plan: ExpansionPlan, work: Path) -> dict[str, Any]:
    """Check that a result of unknown model type computes what its base computes.

    Raises:
        RefusedError: It does not, or the two models cannot be compared.
    """
    found = forward.compare(plan.first.store, work, trust_remote_code=plan.first.trusted)
    if not found.is_exact:
        raise RefusedError(
            f"model type {plan.first.model_type!r} is unknown, and the result does not compute "
            f"what its base computes: the logits differ by {found.relative:.0e} of their size; a "
            "tensor that writes to the residual stream is not zeroed"
        )
    return found.outcome(identity=True)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(to_json(content), encoding="utf-8")
