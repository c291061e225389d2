"""Check that a model matches its layout: every byte of its tensors, its index, its config.json."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_interleave import _dtypes
from mergekit_interleave._stored_tensor import Tensor
from mergekit_interleave._units import amount
from mergekit_interleave._version import __version__
from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.checkpoint import CONFIG, Checkpoint
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.checkpoint.safetensors_header import iterate_tensors
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError, RefusedError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.output import lineage, manifest, recorded_layout, verification_text
from mergekit_interleave.output.lineage import Generation
from mergekit_interleave.output.manifest import Manifest
from mergekit_interleave.output.recorded_layout import RecordedLayout
from mergekit_interleave.planning.expansion_plan import TOKENIZER, ExpansionPlan
from mergekit_interleave.planning.tensor_plan import TensorSpec
from mergekit_interleave.verification import expected as expectations
from mergekit_interleave.verification import files as consistency
from mergekit_interleave.verification import forward
from mergekit_interleave.verification.expected import ExpectedModel
from mergekit_interleave.verification.stored_bytes import Difference
from mergekit_interleave.verification.tensors import Comparison, Tolerance, compare

TRAINED = "tensors of new layers, which may have been trained"
"""A reason why a tensor was not compared."""

NAMED = verification_text.NAMED

Named = Callable[[TensorSpec], bool]
"""Returns whether a tensor was trained although it is of no new layer."""


def _none(_: TensorSpec) -> bool:
    return False


@dataclass(frozen=True)
class VerifyReport:
    """The result of verifying a model.

    Attributes:
        out: The model's directory.
        against: The names of the sources; empty if the model was compared with itself.
        weights: The comparison of the tensors; None if they cannot be read.
        differences: All differences, including those in config.json.
        trained: Whether new layers were allowed to differ.
        expected: What the model must contain.
        kind: The key under which interleave.json stores the result.
        own: Its interleave.json, if the layout comes from that file.
        wider: The number of tensors that a trainer has stored in a wider dtype.
        changed: The new layers that differ from what the layout says, if that was compared.
        forward: The result of a forward pass, as interleave.json stores it; None without one.
        warnings: Warnings for the user, one sentence each.
        hint: What to do if the sources seem to be wrong; None if they do not.
    """

    out: Path
    against: tuple[str, ...]
    weights: Comparison | None
    differences: tuple[Difference, ...]
    trained: bool
    expected: ExpectedModel
    kind: str
    own: Manifest | None = None
    wider: int = 0
    changed: frozenset[int] = frozenset()
    forward: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    hint: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the model matches its layout and computes what its base computes."""
        return not self.differences and (self.forward or {}).get("exact") is not False

    def outcome(self) -> dict[str, Any]:
        """Return the result as interleave.json stores it."""
        specs = self.expected.specs
        found = outcome(self.weights, self.against, specs, self.differences)
        return {**found, "wider": self.wider} if self.wider else found

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return list(_lines(self))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, as `verify --json` prints it."""
        content = {**self.outcome(), "trained": self.trained}
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
            count = len(self.differences)
            places = "1 place" if count == 1 else f"{count} places"
            raise RefusedError(f"{self.out}: does not match its layout in {places}", hint=self.hint)
        if not self.is_exact:
            raise RefusedError(f"{self.out}: does not compute what its base computes")


def outcome(
    weights: Comparison | None,
    against: Sequence[str],
    specs: Sequence[TensorSpec],
    differences: Sequence[Difference] = (),
) -> dict[str, Any]:
    """Return the result of a comparison as interleave.json stores it.

    Args:
        weights: The comparison of the tensors; None if they could not be read.
        against: The names of the sources.
        specs: The expected tensors.
        differences: All differences, including those in other files.
    """
    computed = sum(spec.is_computed for spec in specs)
    found: dict[str, Any] = {"exact": not differences, "differences": len(differences)}
    found |= {"failed": Counter(map(_part, differences))} if differences else {}
    found |= {"against": list(against)} if against else {}
    if weights is not None:
        found |= {
            "tensors": weights.tensors,
            "bytes": weights.nbytes,
            "compared": weights.compared,
        }
        found |= {"not_compared": dict(weights.unread)} if weights.unread else {}
    found |= {"computed": computed} if computed else {}
    return found | {"tools": {"mergekit-interleave": __version__}}


def _part(difference: Difference) -> str:
    """Return the part of a model that differs, as interleave.json names it."""
    if difference.file is None:
        return verification_text.WEIGHTS
    known = (CONFIG, manifest.FILE, mergekit_yaml.FILE)
    return difference.file if difference.file in known else verification_text.OTHER_FILES


def verify(  # noqa: PLR0913 - one parameter for each option
    out: Path,
    models: Models,
    *,
    against: Sequence[ModelRef] = (),
    layout_from: Path | None = None,
    trained: bool = False,
    named: Named = _none,
) -> VerifyReport:
    """Compare a model with its sources, or with itself.

    Args:
        out: The model's directory.
        models: Opens its sources.
        against: Its sources, see `expected.of_sources`; empty to compare it with itself.
        layout_from: Another file that records the layers, see `recorded_layout.read`.
        trained: Whether a trainer has written the model, so that new layers may differ.
        named: The other tensors that may differ then.

    Raises:
        InterleaveError: The layout cannot be determined, or a source cannot be read.
    """
    recorded_layout.check_directory(out)
    trusted = models.trust_remote_code
    recorded = recorded_layout.read(out, layout_from)
    generation = _generation(recorded, against, models)
    expected = _expected(out, recorded, generation, against, models, trained=trained)
    differences: list[Difference] = []
    wider: dict[str, TensorSpec] = {}
    if layout_from is None:
        own = expected
        if generation is not None:  # the records describe the latest growth
            own = expectations.of_itself(recorded, out, models)
        differences += consistency.of_records(out, recorded, own, trained=trained)
    weights = None
    try:
        found = dict(iterate_tensors(out))
        differences += consistency.of_weights(out)
    except CheckpointError as error:
        differences.append(Difference(str(error)))
    else:
        reason = _reasons(expected, named) if trained else expected.unread
        wider = _wider(expected, found, reason) if trained else {}
        specs = [wider.get(spec.name, spec) for spec in expected.specs]
        may_lack = _may_lack(out, found, trusted=trusted) if trained else None
        weights = compare(
            found.items(), specs, _tolerance(expected, may_lack, reason), source_name(expected.plan)
        )
        differences += weights.differences
        expected = _with_vocabulary(expected, found, differences)
    stored = {spec.dtype for spec in wider.values()}
    differences += consistency.of_config(
        out, expected, trained=trained, trusted=trusted, stored=stored
    )
    differences.sort(key=lambda difference: not str(difference).startswith(_OTHER_TYPE))
    plan = expected.plan
    names = [] if plan is None else [plan.public.title(model) for model in plan.sources]
    return VerifyReport(
        out,
        tuple(names),
        weights,
        tuple(differences),
        trained,
        expected,
        verification_text.TRAINED if trained else verification_text.WEIGHTS,
        recorded.manifest if layout_from is None else None,
        len(wider),
        warnings=tuple(dict.fromkeys((*recorded.directive.warnings, *expected.warnings))),
        hint=None if plan is None else _doubt(plan, recorded, generation, differences, weights),
    )


_OTHER_TYPE = f"{CONFIG}: model_type is "
"""The start of the difference that comes first, because it explains the others."""


def _doubt(
    plan: ExpansionPlan,
    recorded: RecordedLayout,
    generation: Generation | None,
    differences: Sequence[Difference],
    weights: Comparison | None,
) -> str | None:
    """Return what to do if the sources seem to be the wrong ones, or in the wrong order.

    They do if their names are those in interleave.json in another order, or if the model types
    or most tensors differ.
    """
    if recorded.manifest is None or generation is not None:
        return None
    known = [*recorded.manifest.models]
    given = {plan.public.title(model): model for model in plan.sources}
    if [*given] != known and {*given} == {*known}:
        order = " ".join(f"--against {given[name]}" for name in known)
        return f"the sources are in another order in {manifest.FILE}: {order}"
    wrong = len(weights.differences) if weights else 0
    if wrong * 2 > len(plan.specs) or any(str(d).startswith(_OTHER_TYPE) for d in differences):
        right = " ".join(f"--against {name}" for name in known)
        return f"pass the model{'s' * (len(known) > 1)} that it was grown from: {right}"
    return None


def verify_as_found(
    out: Path,
    models: Models,
    *,
    against: Sequence[ModelRef] = (),
    layout_from: Path | None = None,
    named: Named = _none,
) -> VerifyReport:
    """Compare a model that may have been trained: first exactly, then except for its new layers.

    A model is compared exactly with its sources, or with itself if `against` is an earlier base or
    empty. Only if that finds a difference, new layers may differ.

    Args:
        out: See `verify`.
        models: See `verify`.
        against: See `verify`.
        layout_from: See `verify`.
        named: See `verify`.

    Returns:
        The report. Its `changed` is empty if no such layer was trained.

    Raises:
        InterleaveError: See `verify`.
    """
    recorded = recorded_layout.read(out, layout_from)
    is_earlier = _generation(recorded, against, models) is not None
    exactly = () if is_earlier else against
    exact = verify(out, models, against=exactly, layout_from=layout_from)
    if not exact.differences and not is_earlier:
        return exact
    report = verify(
        out, models, against=against, layout_from=layout_from, trained=True, named=named
    )
    reason = _reasons(exact.expected, named)
    new = {spec.layer for spec in exact.expected.specs if reason(spec) in _OF_TRAINING}
    changed = frozenset(
        d.layer for d in exact.differences if d.layer is not None and d.layer in new
    )
    kind = verification_text.LINEAGE if is_earlier and not changed else report.kind
    return dataclasses.replace(report, changed=changed, kind=kind)


def _expected(  # noqa: PLR0913 - the parameters of `verify`, after reading
    out: Path,
    recorded: RecordedLayout,
    generation: Generation | None,
    against: Sequence[ModelRef],
    models: Models,
    *,
    trained: bool,
) -> ExpectedModel:
    """Derive what a model must contain from an earlier base, its sources, or itself.

    Raises:
        RefusedError: An earlier base is given for a model that may not have been trained.
    """
    if generation is not None and not trained:
        raise RefusedError(
            f"{out}: {' and '.join(map(str, against))} is an earlier base, and layers that were "
            "new in an earlier growth may have been trained since",
            hint="pass --trained to compare only the layers of the earlier base",
        )
    if generation is not None:
        return expectations.of_generation(generation, against, models)
    if not against:
        return expectations.of_itself(recorded, out, models)
    expected = expectations.of_sources(recorded, against, models)
    if recorded.manifest is not None and recorded.manifest.content.get("engine") == manifest.SAVED:
        _check_comparable(models.open(ModelRef(ModelPath(str(out)))), expected)
    return expected


def _check_comparable(result: Checkpoint, expected: ExpectedModel) -> None:
    """Check that a model was not quantized after its sources were loaded.

    Raises:
        RefusedError: It was, so no stored number of the one is in the other.
    """
    plan = expected.plan
    if plan is not None and result.is_quantized and not plan.first.is_quantized:
        raise RefusedError(
            f"{result.ref} is quantized, and {plan.first.ref} is not, so their tensors cannot be "
            "compared",
            hint=f"`mk-interleave verify {result.path}` compares the model with itself",
        )


def _generation(
    recorded: RecordedLayout, against: Sequence[ModelRef], models: Models
) -> Generation | None:
    """Return the earlier bases in a model's lineage that `--against` names, by number and depth.

    Several that fit are told apart by their names. The result is None for the sources themselves,
    and if no bases fit.
    """
    content = {} if recorded.manifest is None else recorded.manifest.content
    if not against or lineage.KEY not in content:
        return None
    depths = [models.open(model).depth for model in against]
    fitting = [
        (number, generation)
        for number, generation in enumerate(lineage.generations(content))
        if [entry["layers"] for entry in generation.sources.values()] == depths
    ]
    named = [
        (number, generation)
        for number, generation in fitting
        if all(
            model in generation.named(str(ref.model))
            for model, ref in zip(generation.layout.models, against, strict=True)
        )
    ]
    for number, generation in named or fitting:
        return generation if number else None
    return None


def source_name(plan: ExpansionPlan | None) -> Callable[[ModelRef], str]:
    """Return a function that names a source model within a sentence."""
    if plan is None:
        return lambda _: "the same model"
    return plan.public.title if len(plan.sources) > 1 else lambda _: "the base"


_OF_TRAINING = (TRAINED, NAMED)


def _reasons(expected: ExpectedModel, named: Named) -> Callable[[TensorSpec], str | None]:
    """Return a function that tells why a tensor of a trained model cannot be compared."""
    new = {layer.index for layer in expected.layout.new_layers}

    def reason(spec: TensorSpec) -> str | None:
        return TRAINED if spec.layer in new else NAMED if named(spec) else expected.unread(spec)

    return reason


def _wider(
    expected: ExpectedModel,
    found: Mapping[str, Tensor],
    reason: Callable[[TensorSpec], str | None],
) -> dict[str, TensorSpec]:
    """Find the tensors that a trainer has stored in a wider dtype; their values must be equal."""
    wider = {}
    for spec in expected.specs:
        tensor = found.get(spec.name)
        if tensor is None or reason(spec) in _OF_TRAINING or not spec.is_whole:
            continue
        if tensor.dtype in _dtypes.wider(spec.dtype):
            nbytes = spec.tensor.elements * tensor.width
            wider[spec.name] = dataclasses.replace(spec, dtype=tensor.dtype, nbytes=nbytes)
    return wider


def _with_vocabulary(
    expected: ExpectedModel, found: Mapping[str, Tensor], differences: list[Difference]
) -> ExpectedModel:
    """Adapt the expected config if mergekit made embeddings and a head for another tokenizer."""
    plan = expected.plan
    if plan is None or not mergekit_yaml.changes_vocabulary(plan.mergekit):
        return expected
    resized = [spec.name for spec in plan.specs if plan.reason_unread(spec) == TOKENIZER]
    rows = {found[name].shape[0] for name in resized if name in found}
    if len(rows) > 1:
        differences.append(Difference("embeddings and head have different numbers of rows"))
    if len(rows) != 1:
        return expected
    return dataclasses.replace(expected, config=plan.config(rows.pop()))


def _tolerance(
    expected: ExpectedModel,
    may_lack: Callable[[str], bool] | None,
    reason: Callable[[TensorSpec], str | None],
) -> Tolerance:
    """Return the allowed differences.

    Args:
        expected: What the model must contain.
        may_lack: Returns whether transformers omits a tensor of this name; None if not trained.
        reason: Returns why a tensor cannot be compared, or None if it can.
    """
    return Tolerance(
        unread=reason,
        any_dtype=lambda spec: reason(spec) in _OF_TRAINING or spec.model.lora is not None,
        any_rows=lambda spec: spec.layer is None and expected.unread(spec) == TOKENIZER,
        may_lack=may_lack or (lambda _: False),
    )


def _may_lack(out: Path, found: Mapping[str, Tensor], *, trusted: bool) -> Callable[[str], bool]:
    """Return a function that tells whether transformers omits a tensor that the base stores.

    transformers saves the tensors that its class has in memory, and one tensor of each tied group.
    """
    known: list[Mapping[str, frozenset[str]]] = []

    def may_lack(name: str) -> bool:
        if not known:  # loading takes seconds, and most models lack no tensor
            known.append(meta_model.ties(out, trusted=trusted))
        return name not in known[0] or any(other in found for other in known[0][name])

    return may_lack


def measure(out: Path, report: VerifyReport, max_memory: int | None = None) -> dict[str, Any]:
    """Compare what a model computes with what its base computes.

    Args:
        out: The model's directory.
        report: The report on its weights, compared with its sources.
        max_memory: The maximum memory for weights in bytes, see `forward.compare`.

    Raises:
        RefusedError: The two models cannot be compared.
    """
    plan = report.expected.plan
    if plan is None:
        raise TypeError("a forward pass needs a report with sources")
    if mergekit_yaml.changes_tokenizer(plan.mergekit):
        raise RefusedError(
            f"{out}: has another tokenizer than its base, so their logits cannot be compared"
        )
    found = forward.compare(
        plan.base.store,
        out,
        lora=plan.base.ref.lora,
        trust_remote_code=plan.base.trusted,
        max_memory=max_memory,
    )
    identity = plan.is_identity and plan.conversion is None and not report.trained
    outcome = found.outcome(identity=identity)
    return outcome | ({"base": plan.public.title(plan.base.ref)} if len(plan.sources) > 1 else {})


_SHOWN = 10
"""The maximum number of differences in a report as text."""


def _lines(report: VerifyReport) -> Iterator[str]:
    layout, weights = report.expected.layout, report.weights
    for difference in report.differences[:_SHOWN]:
        yield str(difference)
    if len(report.differences) > _SHOWN:
        yield f"and {len(report.differences) - _SHOWN} more"
    if not report.differences:
        new = f"{len(layout)} layers, {len(layout.new_layers)} of them new"
        yield f"{report.out}: {new}; {_conclusion(report)}"
    if weights is not None:
        against = " and ".join(report.against) or "the model itself"
        compared = weights.tensors - sum(weights.unread.values())
        yield (
            f"weights: {compared:,} of {weights.tensors:,} tensors compared with {against}, "
            f"{amount(weights.compared)}"
        )
        for reason, count in weights.unread.items():
            yield f"         {count:,} not compared: {reason}"
    if report.forward is not None:
        yield f"forward: {verification_text.forward(report.forward)}"


def _conclusion(report: VerifyReport) -> str:
    """Return the conclusion of a report without differences."""
    weights = report.weights
    if weights is None or not weights.compared:
        return "no tensor could be compared"
    if not report.against:
        return "no inconsistencies found (pass --against BASE for a full check)"
    if weights.unread and not report.trained:
        return "matches its layout in all compared tensors"
    return "matches its layout exactly"
