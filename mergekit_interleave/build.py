"""`run`: preflight, staging, engine, config, small files, card, check, one rename."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_interleave import (
    card,
    manifest,
    measure,
    modelconfig,
    nearby,
    recipe,
    smallfiles,
    structure,
    yamltext,
)
from mergekit_interleave.assembly import check_written
from mergekit_interleave.checkpoint import CONFIG
from mergekit_interleave.engines import mergekit, stream
from mergekit_interleave.errors import (
    DirectiveError,
    OutputError,
    RefusedError,
    UnsayableError,
)
from mergekit_interleave.expand import Expansion, Models
from mergekit_interleave.layout import Layout
from mergekit_interleave.preflight import Preflight, preflight
from mergekit_interleave.shards import Tensor, read_tensors
from mergekit_interleave.staging import check_vacant, files_below, staged

log = logging.getLogger(__name__)

CARD_FILE = "README.md"


AUTO, MERGEKIT, STREAM = ENGINES = ("auto", "mergekit", "stream")


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        engine: `mergekit` or `stream` to insist on one, or `auto`.
        replace: Replace a model that stands at OUT.
        shard_size: The most bytes of one shard.
        base_model: The Hub id of the base, where its directory does not tell.
        mergekit: mergekit's own options.
    """

    engine: str = AUTO
    replace: bool = False
    shard_size: int = 5 * 10**9
    base_model: str | None = None
    mergekit: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What was made."""

    layout: Layout
    parameters: int
    nbytes: int


def run(expansion: Expansion, models: Models, out: Path, options: Options) -> Report:
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
        works = nearby.suggestion(base, expansion.directive, expansion.layout)
        error.hint = f"this would do: {works}" if works else None
        raise


def _run(expansion: Expansion, models: Models, out: Path, options: Options) -> Report:
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow OUT if it is a link
    check_vacant(out, replace=options.replace)
    streamed = options.engine == STREAM
    if streamed:
        _check_stream(options, expansion)
    else:
        mergekit.check_options(options.mergekit)
        mergekit.quieten(options.mergekit.get("verbosity"))
    plan = preflight(
        expansion,
        models,
        out,
        base_model=options.base_model,
        mix=not streamed and mergekit.mixes(options.mergekit),
    )
    with staged(out, replace=options.replace) as work:
        plan.check_room(out)
        _write_json(work / CONFIG, plan.config())
        _copy_small_files(plan, work)
        if not streamed or plan.first.require_family().measured:
            _check_classes(plan, work)
        if plan.first.require_family().measured and not plan.is_identity:
            raise RefusedError(
                f"nothing is known of model type {plan.first.model_type!r}: only an expansion "
                "that computes what its base computes can be measured",
                hint="zero the new layers' residual writers",
            )
        scratch = work / ".lora"
        job = mergekit.Job(
            layout=expansion.layout,
            parts=plan.parts,
            mergekit=plan.mergekit,
            modules=expansion.modules,
            checkpoints={**plan.sources, plan.base.ref: plan.base},
            options=options.mergekit,
            shard_size=options.shard_size,
            lora_cache=scratch,
        )
        beyond = _write_weights(job, work, engine=options.engine)
        shutil.rmtree(scratch, ignore_errors=True)
        written = read_tensors(work)
        new_vocabulary = recipe.changes_tokenizer(plan.mergekit)
        check_written(
            written,
            plan.parts,
            any_rows_outside=new_vocabulary,
            any_dtype=plan.uses_lora and "lora_merge_dtype" in options.mergekit,
        )
        if plan.first.require_family().measured:
            measure.check(plan.first.path, work, trust_remote_code=plan.first.trusted)
        if new_vocabulary:
            _write_json(work / CONFIG, plan.config(_vocab_size(written, plan)))
        (work / recipe.FILE).write_text(plan.recipe, encoding="utf-8")
        _write_card(plan, out.name, work / CARD_FILE, beyond)
        files = sorted({*files_below(work), manifest.FILE})
        _write_json(work / manifest.FILE, manifest.describe(plan, files))
    nbytes = sum(tensor.nbytes for tensor in written.values())
    return Report(plan.layout, sum(t.elements for t in written.values()), nbytes)


def _check_stream(options: Options, expansion: Expansion) -> None:
    """What the stream engine knows nothing of is refused, never ignored."""
    for name in options.mergekit:
        if name != "trust_remote_code":
            raise DirectiveError(f"--engine stream: mergekit's option {name} has no meaning there")
    for key in ("tokenizer", "tokenizer_source", "chat_template", "parameters"):
        if key in expansion.directive.mergekit:
            raise RefusedError(
                f"--engine stream: {key} is mergekit's, and only mergekit can do it",
                hint="leave --engine out",
            )


def _check_classes(plan: Preflight, work: Path) -> None:
    """What the class that loads the result makes of it; the data alone says it, if it is right.

    Loading transformers for it takes longer than the stream engine may, which does without.
    """
    if len(plan.sources) > 1:  # several are stacked only where all layers are alike
        structure.shapes(work, trusted=plan.first.trusted)
    else:
        structure.check(plan.first, plan.layout, work, plan.placement.borrowers)


def _copy_small_files(plan: Preflight, work: Path) -> None:
    for name, file in plan.small_files:
        content = smallfiles.read(name, file, plan.base)
        if content is not None:
            target = work / name
            target.parent.mkdir(parents=True, exist_ok=True)
            moved = modelconfig.moved_file(name, content, plan.first, plan.layout)
            target.write_bytes(moved)


def _write_weights(job: mergekit.Job, work: Path, *, engine: str) -> str | None:
    """By mergekit, and by the stream engine where mergekit cannot, or that is insisted on.

    Returns:
        Why mergekit could not, if it could not.
    """
    try:
        if engine == STREAM:
            arithmetic = stream.reason_against(job.parts)
            if arithmetic:
                raise RefusedError(f"--engine stream does no arithmetic: {arithmetic}")
            stream.write(job.parts, work, job.shard_size)
            return None
        return _written(job, work, engine=engine)
    except OSError as error:
        raise OutputError(f"the weights cannot be written: {error.strerror or error}") from error


def _written(job: mergekit.Job, work: Path, *, engine: str) -> str | None:
    try:
        mergekit.write(job, work)
    except RefusedError as refused:
        if engine == MERGEKIT or recipe.changes_tokenizer(job.mergekit):
            raise
        arithmetic = stream.reason_against(job.parts)
        if arithmetic:
            converts = recipe.dtype_of(job.mergekit) is not None
            raise RefusedError(
                f"{refused}; and the stream engine does no arithmetic: {arithmetic}",
                hint="leave `dtype` out: every tensor keeps its own" if converts else None,
            ) from refused
        log.info("written by the stream engine: %s", refused)
        stream.write(job.parts, work, job.shard_size)
        return str(refused)
    return None


def _vocab_size(written: Mapping[str, Tensor], plan: Preflight) -> int:
    """The rows of the embeddings that mergekit made for another tokenizer."""
    before = plan.first.require_family().before_layers
    if not before:
        raise RefusedError("which tensor holds the embeddings of this model type is not known")
    return written[before[0]].shape[0]


def _write_card(plan: Preflight, name: str, file: Path, beyond: str | None) -> None:
    """Write the card; a card that cannot be written never costs the model."""
    try:
        layout, public = plan.layout, plan.public
        origins = [public.origins[model] for model in layout.models if model in public.origins]
        facts = card.Facts(
            name=name,
            layout=layout,
            sources=list(dict.fromkeys(map(public.title, layout.models))),
            names=[public.title(model) for model in layout.models],
            base_models=list(dict.fromkeys(origin.path for origin in origins)),
            base_card=card.read_front_matter(plan.base.path),
            directive=yamltext.write(manifest.directive_of(plan)),
            recipe=plan.recipe,
            depth=plan.first.depth,
            parameters=(
                sum(part.tensor.elements for part in plan.parts),
                sum(tensor.elements for tensor in plan.first.tensors.values()),
            ),
            identities=plan.identities,
            identity=plan.is_identity,
            conversion=plan.conversion,
            fingerprint=manifest.fingerprint(layout),
            beyond_mergekit=beyond,
        )
        file.write_text(card.write(facts), encoding="utf-8")
    except Exception as error:  # noqa: BLE001 - whatever it is, the weights are worth more
        log.warning("the model card could not be written: %s", error)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
