"""Write, verify and describe grown GGUF models, for the commands of the same names."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._stored_tensor import check_unchanged
from mergekit_interleave._units import amount
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands.card_report import CardReport
from mergekit_interleave.commands.run_report import RunReport
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.growth import ExplicitSlices
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.engines import registry, stream
from mergekit_interleave.engines.gguf_splits import OutSplit, splits_of
from mergekit_interleave.engines.protocol import WriteOptions, WriteResult, check_free
from mergekit_interleave.errors import CheckpointError, DirectiveError, OutputError, RefusedError
from mergekit_interleave.gguf import header
from mergekit_interleave.gguf.model import GgufModel, open_model, split_stem
from mergekit_interleave.layout import describe
from mergekit_interleave.output import gguf_card, gguf_record, gguf_staging, verification_text
from mergekit_interleave.output.gguf_card import GgufCard
from mergekit_interleave.planning.gguf_plan import GgufPlan, plan_gguf
from mergekit_interleave.planning.resolve import Expansion, resolve
from mergekit_interleave.verification import gguf as verification
from mergekit_interleave.verification import llama_cpp
from mergekit_interleave.verification import report as reports
from mergekit_interleave.verification.gguf import GgufVerifyReport
from mergekit_interleave.verification.tensors import Comparison, compare
from mergekit_interleave.verification.while_writing import RunningComparison


@dataclass(frozen=True)
class GgufOptions:
    """The options of `run` that apply to GGUF files.

    Attributes:
        weights: How to write the files.
        replace: Whether to replace an existing model at OUT.
        base_model: The Hub id of the only source model.
        repo: The Hub id under which the model will be published.
        verify: Whether to read the written tensors back and compare them with the sources.
        others: The given options that do not apply, by their flags.
    """

    weights: WriteOptions
    replace: bool
    base_model: str | None
    repo: str | None
    verify: bool
    others: Collection[str] = ()


def run(expansion: Expansion, place: Path, options: GgufOptions) -> RunReport:
    """Write a grown GGUF model.

    Args:
        expansion: The directive and its layout.
        place: The path of the result.
        options: The options.

    Raises:
        InterleaveError: The model cannot be written exactly; nothing is written.
    """
    _check_options(options)
    gguf_staging.check_out(place)
    out = Path(os.path.abspath(place))  # noqa: PTH100 - resolve() would follow OUT if it is a link
    plan = plan_gguf(expansion, base_model=options.base_model)
    _check_no_source(out, plan)
    gguf_staging.check_vacant(out, replace=options.replace)

    def write(work: Path) -> RunReport:
        content = _content(plan, options)
        files = _files(plan, out.stem, content, work, options.weights)
        card_data = GgufCard(files[0].name, content, files[0].metadata)
        card_file = work / gguf_card.path_of(out).name
        traffic = stream.forecast(files, work, reflink=options.weights.reflink)
        check_free(work, traffic.written, f"{amount(traffic.written)} needed")
        running = RunningComparison(
            plan.specs if options.verify else (), read=lambda path: header.read(path).tensors
        )
        with closing(running):
            how = dataclasses.replace(options.weights, written=running.written)
            traffic = stream.write_files(files, work, how)
        check_unchanged(spec.tensor for spec in plan.specs)
        written = _check(plan, work / files[0].name, running.equal, verify=options.verify)
        card_file.write_text(gguf_card.render(card_data), encoding="utf-8")
        return RunReport(
            out=place.with_name(files[0].name),
            layout=plan.layout,
            written=written,
            outcome=WriteResult(registry.STREAM, traffic),
            parameters=plan.parameters,
            name=None,
            warnings=tuple(dict.fromkeys((*plan.warnings, *_about_limit(plan, options.weights)))),
        )

    result = gguf_staging.staged(out, write, replace=options.replace)
    return dataclasses.replace(result.value, warnings=(*result.value.warnings, *result.warnings))


def verify(  # noqa: PLR0913 - the options of `verify` that apply
    out: Path,
    models: Models,
    *,
    against: Sequence[ModelRef],
    forward: bool,
    recipe: Path | None,
    others: Collection[str] = (),
) -> GgufVerifyReport:
    """Check a GGUF model.

    Args:
        out: Its file, or its first split.
        models: Opens its sources.
        against: Its sources.
        forward: Run it and its base in llama.cpp.
        recipe: A file with its directive, if it does not record one.
        others: The given options that do not apply, by their flags.

    Raises:
        InterleaveError: The layout cannot be determined, or a source cannot be read.
    """
    for flag in others:
        raise RefusedError(f"{flag} has no effect on GGUF files", hint="leave it out")
    model = open_model(ModelRef(ModelPath(str(out))))
    opened = [models.open_source(ref) for ref in against]
    sources = verification.check_sources(against, opened)
    expansion = None if recipe is None else _recipe(recipe, models, against)
    report = verification.verify(model, sources, expansion)
    if not forward or report.plan is None or report.differences:
        return report
    measured = llama_cpp.measure(report.plan.base, model, identity=report.plan.is_identity)
    return dataclasses.replace(report, forward=measured)


def _recipe(file: Path, models: Models, against: Sequence[ModelRef]) -> Expansion:
    """Return the layers of a directive, or of a mergekit config, on the base that is named.

    Raises:
        DirectiveError: It names several models, or there is no base or several.
    """
    directive = directives.load_file(file)
    if len(against) != 1:
        raise DirectiveError(
            "--recipe: a directive is compared with one base", hint="pass --against BASE once"
        )
    directive = dataclasses.replace(directive, model=against[0])
    return resolve(directive, models, strict=True, allow_non_identity=True)


def card(out: Path, *, repo: str | None, base_model: str | None, force: bool) -> CardReport:
    """Write the card of a GGUF model again.

    Args:
        out: Its file, or its first split.
        repo: The Hub id under which it will be published.
        base_model: The Hub id of its only source.
        force: Replace a card that was edited or that another tool wrote.

    Raises:
        CheckpointError: The model does not record how it was grown.
        OutputError: The card was edited, or cannot be written.
    """
    model = open_model(ModelRef(ModelPath(str(out))))
    content = recorded(model)
    if base_model is not None and len(content["models"]) > 1:
        raise DirectiveError(
            "base_model: there are several source models, and it can name only one"
        )
    data = GgufCard(model.path.name, content, model.metadata, repo, base_model)
    stem = split_stem(out.name)
    file = gguf_card.path_of(out if stem is None else out.with_name(f"{stem}.gguf"))
    gguf_card.write(file, data, force=force)
    ids = [entry["hub_id"] for entry in data.sources if "hub_id" in entry]
    return CardReport(files=(file.name,), name=model.path.stem, base_models=tuple(ids))


def recorded(model: GgufModel) -> dict[str, Any]:
    """Return the record of a grown model.

    Raises:
        CheckpointError: It has none.
    """
    content = gguf_record.read(model)
    if content is None:
        raise CheckpointError(
            f"{model.path}: does not record that it was grown",
            hint=f"grow it first: mk-interleave run 'append: 1' OUT.gguf --model {model.path}",
        )
    return content


def explain(file: Path) -> str:
    """Return the directive of a grown GGUF model, with a comment that describes it.

    Raises:
        CheckpointError: It records none.
    """
    content = recorded(open_model(ModelRef(ModelPath(str(file)))))
    layout = gguf_record.layout_of(content)
    growth = directives.from_document(dict(content["directive"])).growth
    depth = int(content["models"][0]["layers"]) if len(content["models"]) == 1 else None
    line = None if isinstance(growth, ExplicitSlices) else growth
    sentence = describe.sentence(layout, line, depth, content["identities"])
    return f"# {sentence}\n{yaml_io.write_lines(content['directive'])}"


def _check_options(options: GgufOptions) -> None:
    """Refuse options that would have no effect."""
    engine = options.weights.engine
    if engine not in (registry.AUTO, registry.STREAM):
        raise RefusedError(
            f"{registry.ENGINES[engine].title} reads no GGUF files",
            hint=options.weights.request.remedy,
        )
    for flag in options.others:
        raise RefusedError(f"{flag} has no effect on GGUF files", hint="leave it out")


def _check_no_source(out: Path, plan: GgufPlan) -> None:
    """Refuse an OUT that is a file of a source."""
    sources = {file.path.resolve() for m in (*plan.sources.values(), plan.base) for file in m.files}
    for first in (out, *gguf_staging.firsts(out)):
        if first.resolve() in sources:
            raise OutputError(f"{first}: is the source model", hint="choose another OUT")


def _content(plan: GgufPlan, options: GgufOptions) -> dict[str, Any]:
    """Return the record of a result, which is true once the result is at its place."""
    comparison = Comparison(plan.parameters, plan.nbytes, len(plan.specs), plan.nbytes, {}, ())
    against = [plan.title(model) for model in plan.sources]
    found = reports.outcome(comparison, against, plan.specs)
    verified = {verification_text.WEIGHTS: found} if options.verify else {}
    return gguf_record.describe(plan, verified, options.repo)


def _files(
    plan: GgufPlan, stem: str, content: Mapping[str, Any], folder: Path, options: WriteOptions
) -> list[OutSplit]:
    block = stream.block_size(folder)
    return splits_of(plan, stem, gguf_record.to_metadata(content), options.shard_size, block)


def _check(plan: GgufPlan, first: Path, equal: Collection[str], *, verify: bool) -> Comparison:
    """Compare the written files with the plan.

    Raises:
        OutputError: They differ.
    """
    found = open_model(ModelRef(ModelPath(str(first))))
    tolerance = verification.UNREAD if not verify else verification.EXACT
    written = compare(found.tensors.items(), plan.specs, tolerance, equal=equal)
    differences = [
        *written.differences,
        *verification.metadata_differences(found.metadata, plan.metadata),
    ]
    if differences:
        others = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise OutputError(f"the written model is wrong: {differences[0]}{others}")
    return written


def _about_limit(plan: GgufPlan, options: WriteOptions) -> Sequence[str]:
    """Warn if the largest tensor exceeds the maximum size of a file, as with a forgotten unit."""
    largest = max(spec.nbytes for spec in plan.specs)
    limit = options.shard_size
    if limit is None or limit >= largest:
        return ()
    return (
        f"--out-shard-size: {amount(limit)} is less than the largest tensor, {amount(largest)}",
    )
