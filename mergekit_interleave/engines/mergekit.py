"""Write the weights with mergekit's own planner and executor.

mergekit writes only tensors. This project writes config.json, the card and other small files, so
that mergekit cannot fail after the weights are written. The workarounds are:

- `_fresh_loaders`: mergekit caches every opened model for the lifetime of the process. Without
  this function, another model at the same path would later be read with the old index.
- `_local`: mergekit asks the Hub for a list of files even if all of them are cached, and parses `+`
  and `@` in the name of a directory as a LoRA and a revision. Therefore each directory is passed
  as a mapping.
- `clone_tensors`: without it, the first attempt at saving fails with a warning if a source layer
  is copied twice.
"""

from __future__ import annotations

import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergekit_interleave import _dtypes
from mergekit_interleave._units import amount
from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.engines import registry, sharding
from mergekit_interleave.engines.protocol import (
    Estimate,
    Traffic,
    WriteOptions,
    check_free,
    no_bar,
)
from mergekit_interleave.engines.sharding import OutShard
from mergekit_interleave.errors import DirectiveError, OutputError, RefusedError, nearest
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.planning.resolve import Expansion
from mergekit_interleave.planning.tensor_plan import TensorSpec

_SHARD_SIZE = 5 * 10**9
"""mergekit's default shard size."""

_LIBRARIES = 9 * 10**8
"""The measured memory of torch and transformers, in bytes."""

START, RATE = 6.5, 4 * 10**8
"""The measured seconds of `run` without the weights, most of them imports, and the bytes of weights
that it then writes and compares per second; see docs/performance.md."""

DECIDED_HERE = {
    "write_model_card": "the model card is written by this tool",
    "copy_tokenizer": "the tokenizer's files are always copied",
    "safe_serialization": "weights are always written as safetensors",
    "out_shard_size": "this tool has its own, --out-shard-size, which accepts 5B and 5GB alike",
}
"""The options of mergekit that are rejected, each with the reason."""


@dataclass(frozen=True)
class Job:
    """The input of mergekit for one model.

    Attributes:
        layout: The layers.
        specs: Every tensor that the result must have.
        mergekit: The directive's keys that belong to mergekit.
        modules: See `mergekit_yaml.to_document`.
        architectures: See `mergekit_yaml.to_document`.
        checkpoints: The source models.
        options: mergekit's options by name, as text or as values.
        shard_size: The maximum bytes of one shard.
        lora_cache: A directory for the models into which LoRAs are merged.
        quiet: Whether to hide progress bars.
    """

    layout: Layout
    specs: Sequence[TensorSpec]
    mergekit: Mapping[str, object]
    modules: Mapping[str, int | None]
    architectures: Mapping[ModelRef, str]
    checkpoints: Mapping[ModelRef, Checkpoint]
    options: Mapping[str, object] = field(default_factory=dict)
    shard_size: int = _SHARD_SIZE
    lora_cache: Path | None = None
    quiet: bool = True


def check(options: WriteOptions, expansion: Expansion) -> None:  # noqa: ARG001 - part of the protocol
    """Check the options before anything is fetched; see `protocol.Engine`."""
    if options.engine == registry.MERGEKIT and not options.reflink:
        raise DirectiveError(
            "reflink cannot be turned off for mergekit, which never shares blocks",
            hint="leave out --no-reflink",
        )
    if options.mergekit:  # checking them takes seconds
        check_options(options.mergekit)


def unsupported(plan: ExpansionPlan) -> str | None:
    """Return why mergekit cannot write a plan, as a predicate; see `protocol.Engine`."""
    reason = _reason_against(plan.specs)
    return f"cannot {reason}" if reason else None


def unsupported_type(first: Checkpoint) -> str | None:
    """Return why mergekit cannot write models of a type, as far as that is known."""
    family = first.family
    if family and family.mergekit_result(first.layer_config) == families.WRONG_TENSORS:
        return f"cannot write the right tensors of model type {first.model_type}"
    return None


def estimate(plan: ExpansionPlan, folder: Path, options: WriteOptions) -> Estimate:  # noqa: ARG001
    """Estimate what mergekit writes: all tensors, and the models into which it merges a LoRA."""
    merged = (model for reference, model in plan.sources.items() if reference.lora)
    nbytes = sum(spec.nbytes for spec in plan.specs) + sum(
        tensor.nbytes for model in merged for tensor in model.tensors.values()
    )
    return estimate_by_size(nbytes)


def estimate_by_size(nbytes: int) -> Estimate:
    """Estimate the needs from the bytes of all tensors; mergekit keeps one shard in memory.

    docs/performance.md lists the measured memory.
    """
    memory = _LIBRARIES + min(nbytes, _SHARD_SIZE)
    return Estimate(Traffic(nbytes), memory, seconds=START + nbytes / RATE)


def files(plan: ExpansionPlan, folder: Path, options: WriteOptions) -> list[OutShard]:  # noqa: ARG001
    """Return the files that mergekit is expected to write; see `protocol.Engine`.

    safetensors sorts the tensors of each shard.
    """
    parts = sharding.cut(plan.specs, options.shard_size or _SHARD_SIZE)
    ordered = (sorted(part, key=lambda spec: (-spec.tensor.width, spec.name)) for part in parts)
    return [OutShard(f"model-{i}.safetensors", part, 8) for i, part in enumerate(ordered, 1)]


def write(plan: ExpansionPlan, out: Path, options: WriteOptions) -> Traffic:
    """Write the weights of a plan with mergekit; see `protocol.Engine`."""
    scratch = out / ".lora"
    job = Job(
        layout=plan.expansion.layout,
        specs=plan.specs,
        mergekit=plan.mergekit,
        modules=plan.expansion.modules,
        architectures=plan.expansion.architectures,
        checkpoints={**plan.sources, plan.base.ref: plan.base},
        options=options.mergekit,
        shard_size=options.shard_size or _SHARD_SIZE,
        lora_cache=scratch,
        quiet=options.bar is no_bar or not sys.stderr.isatty(),
    )
    with _same_handlers():
        targets = plan_tensors(job, out)
        needed = estimate(plan, out, options).traffic.written
        check_free(out, needed, f"{amount(needed)} needed")
        execute(targets, job)
    shutil.rmtree(scratch, ignore_errors=True)
    return Traffic(sum(file.stat().st_size for file in out.glob("*.safetensors")))


def check_options(options: Mapping[str, object]) -> None:
    """Check mergekit's options.

    Raises:
        DirectiveError: mergekit has no such option or does not accept its value, or this project
            sets the option itself.
    """
    import torch  # noqa: PLC0415 - takes seconds
    from mergekit.common import dtype_from_name  # noqa: PLC0415
    from mergekit.options import MergeOptions  # noqa: PLC0415
    from pydantic import ValidationError  # noqa: PLC0415

    for name in options:
        if name in DECIDED_HERE:
            raise DirectiveError(f"mergekit option {name}: {DECIDED_HERE[name]}")
        if name not in MergeOptions.model_fields:
            close = nearest(name, MergeOptions.model_fields)
            raise DirectiveError(
                f"mergekit has no such option: {name}",
                hint=f"did you mean {close}?"
                if close
                else f"known options: {', '.join(MergeOptions.model_fields.keys() - DECIDED_HERE)}",
            )
    try:
        merge_options = MergeOptions(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "option"
        raise DirectiveError(f"mergekit option {name}: {first['msg']}") from error
    try:
        dtype_from_name(merge_options.lora_merge_dtype)
        torch.device(merge_options.device)
    except RuntimeError as error:
        reason = _sentence(error).partition(" at start")[0]
        raise DirectiveError(f"mergekit options: {reason}") from error


def quieten(verbosity: object) -> None:
    """Hide the log messages of mergekit and transformers unless mergekit's `verbosity` is set.

    The caller must restore the levels of the loggers.
    """
    import transformers  # noqa: PLC0415 - takes seconds

    if not int(str(verbosity or 0)):
        transformers.logging.set_verbosity_error()
        for name in (None, "mergekit"):
            logging.getLogger(name).setLevel(logging.ERROR)


def mixes(options: Mapping[str, object]) -> bool:
    """Return whether the options allow stacking models that do not fit together."""
    if not options:
        return False
    from mergekit.options import MergeOptions  # noqa: PLC0415

    return bool(MergeOptions(**options).allow_crimes)


def plan_tensors(job: Job, out: Path) -> Sequence[Any]:
    """Plan the weights with mergekit, and write the tokenizer if the directive changes it.

    Args:
        job: The model to write.
        out: A directory that already contains the new config.json.

    Returns:
        mergekit's tasks.

    Raises:
        RefusedError: mergekit would write other tensors than the layout requires.
    """
    options = _merge_options(job)
    options.apply_global_options()
    quieten(options.verbosity)  # again: the line above turns on the log of every library
    with _quiet():
        try:
            plan = _with_means if any(s.mean_with is not None for s in job.specs) else _targets
            targets = plan(job, options, out)
        except Exception as error:
            raise RefusedError(f"mergekit cannot plan this model: {_sentence(error)}") from error
    _check_plan(targets, job)
    return targets


def execute(targets: Sequence[Any], job: Job) -> None:
    """Write the planned tensors with mergekit.

    Raises:
        OutputError: Writing failed.
    """
    options = _merge_options(job)
    with _quiet():
        try:
            for _ in _executor(targets, options).run(quiet=options.quiet):
                pass
        except OSError:
            raise
        except Exception as error:
            raise OutputError(f"mergekit failed: {_sentence(error)}") from error
        finally:
            _fresh_loaders(options)


@contextmanager
def _same_handlers() -> Iterator[None]:
    """Remove, when the block ends, the log handlers that `apply_global_options` has added in it."""
    root = logging.getLogger()
    handlers = [*root.handlers]
    try:
        yield
    finally:
        root.handlers[:] = handlers


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers warns about mergekit's calls
        yield


def _reason_against(specs: Sequence[TensorSpec]) -> str | None:
    """Return what mergekit cannot do with these tensors, as words that follow `cannot`, or None."""
    for spec in specs:
        if spec.constant is not None:
            return f"fill {spec.name} with {spec.constant.value:g}"
        if spec.fixed:
            return f"multiply the gain {-spec.fixed:g} + {spec.name} by {spec.scale:g}"
        if spec.packing is not None:
            return f"rearrange the blocks of {spec.name}, one for each layer"
        if spec.scale is not None and not _dtypes.is_float(spec.tensor.dtype):
            return f"scale {spec.name}, which is stored as {spec.tensor.dtype}"
    return None


def _targets(job: Job, options: Any, out: Path) -> Sequence[Any]:
    import transformers  # noqa: PLC0415
    from mergekit.architecture import get_architecture_info  # noqa: PLC0415
    from mergekit.config import MergeConfiguration  # noqa: PLC0415
    from mergekit.plan import MergePlanner  # noqa: PLC0415

    config = MergeConfiguration.model_validate(_local(job))
    out_config = transformers.AutoConfig.from_pretrained(
        str(out), trust_remote_code=options.trust_remote_code
    )
    architecture = get_architecture_info(config, options)
    _fresh_loaders(options)
    if mergekit_yaml.changes_tokenizer(job.mergekit):
        _write_tokenizer(config, options, out)
    planner = MergePlanner(config, architecture, options=options, out_model_config=out_config)
    targets: Sequence[Any] = planner.plan_to_disk(out_path=str(out))
    return targets


def _with_means(job: Job, options: Any, out: Path) -> Sequence[Any]:
    """Plan copies by passthrough and means by a linear merge.

    A linear merge adds each tensor to zero, which changes -0.0 to 0.0, so it only writes the means.
    """
    from mergekit.io.tasks import FinalizeModel, SaveTensor  # noqa: PLC0415

    slices = (replace(part, mean_with=None) for part in job.layout.slices)
    copies = _targets(replace(job, layout=Layout(tuple(slices))), options, out)
    means = {spec.name for spec in job.specs if spec.mean_with is not None}
    averaged = {
        target.tensor_name: target
        for target in _targets(job, options, out)
        if isinstance(target, SaveTensor) and target.tensor_name in means
    }
    saved = [
        averaged.get(target.tensor_name, target)
        for target in copies
        if isinstance(target, SaveTensor)
    ]
    final = [
        target.model_copy(update={"tensor_save_tasks": tuple(saved)})
        for target in copies
        if isinstance(target, FinalizeModel)
    ]
    return [*saved, *final]


def _executor(targets: Sequence[Any], options: Any) -> Any:
    from mergekit.graph import Executor  # noqa: PLC0415
    from mergekit.multigpu_executor import MultiGPUExecutor  # noqa: PLC0415

    if options.multi_gpu:
        return MultiGPUExecutor(
            targets=targets, storage_device=None if options.low_cpu_memory else "cpu"
        )
    return Executor(
        targets=targets,
        math_device=options.device,
        storage_device=options.device if options.low_cpu_memory else "cpu",
    )


def _merge_options(job: Job) -> Any:
    from mergekit.options import MergeOptions  # noqa: PLC0415

    repeats = len({(layer.model, layer.source) for layer in job.layout.layers}) < len(job.layout)
    lora_dtypes = {spec.tensor.dtype for spec in job.specs if spec.model.lora}
    decided: dict[str, object] = {
        "clone_tensors": repeats,
        "lora_merge_cache": None if job.lora_cache is None else str(job.lora_cache),
        "lora_merge_dtype": _dtypes.name_of(lora_dtypes.pop()) if len(lora_dtypes) == 1 else None,
        "out_shard_size": job.shard_size,
        "quiet": job.quiet,
    }
    return MergeOptions(**{**decided, **job.options})


def _fresh_loaders(options: Any) -> None:
    from mergekit.io.tasks import LoaderCache  # noqa: PLC0415

    cache = LoaderCache()
    cache.loaders.clear()
    cache.setup(options=options)


def _local(job: Job) -> dict[str, object]:
    """Return the recipe, with each model named by the directory from which it is read."""

    def local(ref: ModelRef) -> dict[str, object]:
        checkpoint = job.checkpoints.get(ref)
        reference: dict[str, object] = {
            "model": {"path": str(checkpoint.store)} if checkpoint else ref.model.to_mapping()
        }
        if ref.lora is not None:
            reference["lora"] = ref.lora.to_mapping()
        if ref.override_architecture is not None:
            reference["override_architecture"] = ref.override_architecture
        return reference

    return mergekit_yaml.to_document(
        job.layout, job.mergekit, local, job.modules, job.architectures
    )


def _check_plan(targets: Sequence[Any], job: Job) -> None:
    """Compare the tensors that mergekit would write with those that the layout requires.

    Raises:
        RefusedError: They differ.
    """
    from mergekit.io.tasks import SaveTensor  # noqa: PLC0415

    planned: dict[str, list[tuple[str, set[str]]]] = {}
    for target in targets:
        if isinstance(target, SaveTensor):
            gather = target.tensor_task.arguments()["tensors"]
            gather = getattr(gather, "gather_tensors", gather)
            planned[target.tensor_name] = [
                (
                    model.model.path,
                    {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())},
                )
                for model, weight in gather.weight_info.items()
            ]

    def is_planned(spec: TensorSpec) -> bool:
        found, store = planned.get(spec.name, []), str(job.checkpoints[spec.model].store)
        sources = [spec.source, *([spec.mean_with.source] if spec.mean_with is not None else [])]
        return len(found) == len(sources) and all(
            path == store and source in names
            for (path, names), source in zip(found, sources, strict=True)
        )

    wrong = [spec.name for spec in job.specs if not is_planned(spec)]
    wrong += sorted(planned.keys() - {spec.name for spec in job.specs})
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")  # noqa: PLR2004
        raise RefusedError(
            f"mergekit would drop, rename or misplace {len(wrong)} tensors: {shown}; its "
            "definition of this architecture does not fit this checkpoint"
        )


def _write_tokenizer(config: Any, options: Any, out: Path) -> None:
    """Write the tokenizer before the weights, so that a bad chat template is detected early."""
    from mergekit.merge import _set_chat_template  # noqa: PLC0415 - mergekit has no public function
    from mergekit.tokenizer import BuildTokenizer  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source is None:
        donor = config.base_model or config.slices[0].sources[0].model
        tokenizer = AutoTokenizer.from_pretrained(
            donor.model.path, trust_remote_code=options.trust_remote_code
        )
    else:
        tokens = (config.tokenizer.tokens or {}) if config.tokenizer else {}
        tokenizer = (
            BuildTokenizer(
                base_model=config.base_model,
                referenced_models=tuple(config.referenced_models()),
                tokenizer_source=source,
                trust_remote_code=options.trust_remote_code,
                add_tokens=tuple(tokens),
            )
            .execute()
            .tokenizer
        )
    _set_chat_template(tokenizer, config)
    tokenizer.save_pretrained(str(out))


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
