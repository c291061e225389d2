"""Check that a GGUF model matches its layout: every byte of its tensors, and its metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave._units import amount
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import CheckpointError, RefusedError
from mergekit_interleave.gguf.model import SPLIT, SPLIT_TENSORS, SPLITS, GgufModel
from mergekit_interleave.gguf.values import Value
from mergekit_interleave.layout.layout import Layout, Slice
from mergekit_interleave.output import gguf_record, verification_text
from mergekit_interleave.planning.gguf_metadata import PROVENANCE
from mergekit_interleave.planning.gguf_plan import GgufPlan, plan_gguf
from mergekit_interleave.planning.resolve import Expansion
from mergekit_interleave.planning.tensor_plan import TensorSpec, assemble
from mergekit_interleave.verification import report as reports
from mergekit_interleave.verification.stored_bytes import Difference
from mergekit_interleave.verification.tensors import Comparison, Tolerance, compare

EXACT = Tolerance()
"""Every tensor is compared."""

UNREAD = Tolerance(unread=lambda _: "--no-verify")
"""Only the names, types and shapes of tensors are compared."""

METADATA = "metadata"
"""The part of a model that differs, if that is not a tensor."""

_SHOWN = 10


@dataclass(frozen=True)
class GgufVerifyReport:
    """The result of verifying a GGUF model.

    Attributes:
        out: Its file, or its first split.
        layout: Its layers.
        against: The names of the sources; empty if the model was compared with itself.
        weights: The comparison of the tensors.
        differences: All differences, including those of the metadata.
        specs: The expected tensors.
        plan: The plan of the model; None if it was compared with itself.
        keys: The number of compared keys of the metadata.
        forward: The result of a forward pass in llama.cpp; None without one.
        warnings: Warnings for the user, one sentence each.
    """

    out: Path
    layout: Layout
    against: tuple[str, ...]
    weights: Comparison
    differences: tuple[Difference, ...]
    specs: Sequence[TensorSpec]
    plan: GgufPlan | None = None
    keys: int = 0
    forward: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether the model matches its layout and computes what its base computes."""
        return not self.differences and (self.forward or {}).get("exact") is not False

    def outcome(self) -> dict[str, Any]:
        """Return the result as the record of a model stores it."""
        return reports.outcome(self.weights, self.against, self.specs, self.differences)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return list(_lines(self))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, as `verify --json` prints it."""
        content = {**self.outcome(), "metadata_keys": self.keys}
        content["differences"] = [difference._asdict() for difference in self.differences]
        if self.forward is not None:
            content["forward"] = dict(self.forward)
        return {**content, "warnings": list(self.warnings)}

    def check(self) -> None:
        """Check that the model is exact.

        Raises:
            RefusedError: It is not; see `is_exact`.
        """
        if self.differences:
            places = f"{len(self.differences)} place{'s' * (len(self.differences) > 1)}"
            raise RefusedError(f"{self.out}: does not match its layout in {places}")
        if not self.is_exact:
            raise RefusedError(f"{self.out}: does not compute what its base computes")


def verify(
    out: GgufModel, against: Sequence[GgufModel] = (), expansion: Expansion | None = None
) -> GgufVerifyReport:
    """Compare a model with its sources, or with itself.

    Args:
        out: The model.
        against: Its sources, in the order of its record; empty to compare it with itself.
        expansion: Its layers on its sources, if its record is not to be used.

    Raises:
        InterleaveError: The layout cannot be determined, or a source cannot be read.
    """
    content = gguf_record.read(out)
    if expansion is None and content is None:
        raise CheckpointError(
            f"{out.path}: does not record that it was grown: its metadata has no keys "
            f"{PROVENANCE}*",
            hint="state the directive: --recipe FILE, with --against BASE",
        )
    if expansion is None and content is not None and against:
        expansion = _expansion(out, content, against)
    if expansion is None:
        return _of_itself(out, content or {})
    plan = plan_gguf(expansion)
    weights = compare(out.tensors.items(), plan.specs, source_name=_source_name(plan))
    differences = [*weights.differences, *metadata_differences(out.metadata, plan.metadata)]
    return GgufVerifyReport(
        out=out.path,
        layout=plan.layout,
        against=tuple(plan.title(model) for model in plan.sources),
        weights=weights,
        differences=tuple(differences),
        specs=plan.specs,
        plan=plan,
        keys=len(plan.metadata),
        warnings=plan.warnings,
    )


def _source_name(plan: GgufPlan) -> Any:
    """Return a function that names a source model within a sentence."""
    return plan.title if len(plan.sources) > 1 else lambda _: "the base"


def _expansion(
    out: GgufModel, content: Mapping[str, Any], against: Sequence[GgufModel]
) -> Expansion:
    """Return the recorded layers on the given sources.

    Raises:
        RefusedError: There are more or fewer sources than recorded, or one of another depth.
    """
    entries = content["models"]
    if len(entries) != len(against):
        raise RefusedError(
            f"{out.path}: was made from {_models(len(entries))}, and {len(against)} are given",
            hint="give --against once for each, in the order in which the card lists them",
        )
    for entry, model in zip(entries, against, strict=True):
        if entry["layers"] != model.depth:
            raise RefusedError(
                f"{model.path}: has {model.depth} layers, but {out.path} was made from a model of "
                f"{entry['layers']}"
            )
    recorded = gguf_record.layout_of(content)
    refs = dict(zip(recorded.models, (model.ref for model in against), strict=True))
    layout = Layout(
        tuple(dataclasses.replace(part, model=refs[part.model]) for part in recorded.slices)
    )
    base = against[content.get("base", 0)].ref
    keys = {} if base == layout.models[0] else {"base_model": base.to_yaml()}
    return Expansion(Directive(mergekit=keys), layout, {model.ref: model for model in against})


def _models(count: int) -> str:
    return "1 model" if count == 1 else f"{count} models"


def _of_itself(out: GgufModel, content: Mapping[str, Any]) -> GgufVerifyReport:
    """Compare a model with its record, its copies with their originals, and zeros with zeros."""
    layout = gguf_record.layout_of(content)
    if len(layout) != out.depth:
        raise RefusedError(
            f"{out.path}: its record lists {len(layout)} layers, but it has {out.depth}"
        )
    plain = {layer.index for layer in layout.layers if layer.is_plain}
    slices = []
    for layer in layout.layers:
        original = layout.original_of(layer)
        source = original if original in plain else layer.index
        edit = layer.edit if source != layer.index or layer.edit.zeroes else None
        slices.append(
            Slice(
                out.ref,
                source,
                source + 1,
                () if edit is None else edit.scales,
                () if edit is None else edit.constants,
            )
        )
    specs = assemble(Layout(tuple(slices)), {out.ref: out})
    weights = compare(out.tensors.items(), specs, source_name=lambda _: "the same model")
    differences = [*weights.differences, *_recorded_differences(out, content)]
    return GgufVerifyReport(out.path, layout, (), weights, tuple(differences), specs)


def _recorded_differences(out: GgufModel, content: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield what the record of a model says otherwise."""
    if not gguf_record.has_recorded_tensors(out, content):
        yield Difference("the names, types or shapes of tensors are not those that were recorded")
    if not gguf_record.has_recorded_metadata(out, content):
        what = f"{METADATA}: not every key is as it was recorded"
        yield Difference(what, file=METADATA)


_NOT_COMPARED = (SPLIT, SPLITS, SPLIT_TENSORS)


def metadata_differences(
    found: Mapping[str, Value], expected: Mapping[str, Value]
) -> Iterator[Difference]:
    """Yield the differences of metadata, except those of the record and of the splits."""
    for key in sorted(found.keys() | expected.keys()):
        if key.startswith(PROVENANCE) or key in _NOT_COMPARED:
            continue
        one, other = found.get(key), expected.get(key)
        if one != other:
            what = f"{METADATA}: {key} is {_short(one)}, expected {_short(other)}"
            yield Difference(what, file=METADATA)


def _short(value: Value | None) -> str:
    if value is None:
        return "missing"
    text = repr(value.decoded()) if len(value.data) < _LONGEST else f"{len(value.data)} bytes"
    return text if len(text) < _LONGEST else f"{text[:_LONGEST]}…"


_LONGEST = 100


def _lines(report: GgufVerifyReport) -> Iterator[str]:
    layout, weights = report.layout, report.weights
    for difference in report.differences[:_SHOWN]:
        yield str(difference)
    if len(report.differences) > _SHOWN:
        yield f"and {len(report.differences) - _SHOWN} more"
    if not report.differences:
        new = f"{len(layout)} layers, {len(layout.new_layers)} of them new"
        conclusion = (
            "matches its layout exactly"
            if report.against
            else "no inconsistencies found (pass --against BASE for a full check)"
        )
        yield f"{report.out}: {new}; {conclusion}"
    against = " and ".join(report.against) or "the model itself"
    compared = weights.tensors - sum(weights.unread.values())
    yield (
        f"weights: {compared:,} of {weights.tensors:,} tensors compared with {against}, "
        f"{amount(weights.compared)}"
    )
    if report.against:
        yield f"metadata: {report.keys} keys compared"
    if report.forward is not None:
        yield f"forward: {verification_text.llama_cpp(report.forward)}"


def check_sources(refs: Sequence[ModelRef], models: Sequence[object]) -> list[GgufModel]:
    """Check that the sources of a GGUF model are GGUF files.

    Raises:
        RefusedError: One of them is not.
    """
    found = []
    for ref, model in zip(refs, models, strict=True):
        if not isinstance(model, GgufModel):
            raise RefusedError(f"{ref}: is not a GGUF file, and cannot be compared with one")
        found.append(model)
    return found
