"""`verify`: compare a model with its layout, its sources, and the logits of its base."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands import gguf, inputs
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.inputs import ModelLike, StrPath
from mergekit_interleave.commands.record import record
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import DirectiveError, RefusedError
from mergekit_interleave.gguf.header import is_gguf
from mergekit_interleave.output import recorded_layout
from mergekit_interleave.planning.tensor_plan import TensorSpec
from mergekit_interleave.training import selection
from mergekit_interleave.verification import report as reports
from mergekit_interleave.verification.gguf import GgufVerifyReport
from mergekit_interleave.verification.report import VerifyReport


def verify(  # noqa: PLR0913 - one parameter for each option
    out: StrPath,
    *,
    against: ModelLike | Sequence[ModelLike] | None = None,
    forward: bool = False,
    trained: bool = False,
    layers: str | None = None,
    also: Sequence[str] = (),
    recipe: StrPath | None = None,
    max_memory: int | str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> VerifyReport | GgufVerifyReport:
    """Check that a model matches its layout: every tensor, byte for byte, and config.json.

    Of a GGUF file, every key of the metadata is checked, and nothing is recorded.

    The report lists the differences; `VerifyReport.check` raises an error if there are any. With
    `against`, the result is recorded in the model's interleave.json, if there is one, and in its
    card.

    Args:
        out: A model that `run` or mergekit-yaml wrote.
        against: Its base: a directory or a Hub id. If there are several sources, a list of them in
            the order of interleave.json. With `trained`, it may be any model of its lineage. By
            default, the model is compared with itself.
        forward: Load both models, and compare their logits and their greedily generated text.
        trained: Accept any values in new layers; all other tensors must equal the base's, bit for
            bit.
        layers: The layers that were trained besides the new ones, in the words of `train`.
        also: The modules outside the layers that were trained too, such as `lm_head`.
        recipe: The file that records the layout, if the model has none: an interleave.json, a
            mergekit config, a directive, or the directory of a model that has one of them.
        max_memory: The maximum memory for weights in the forward pass, in bytes or as text such as
            `8GB`; the rest stays on disk.
        allow_pickle: Read the tensors of a base from pickled weights, and nothing else.
        trust_remote_code: Run code from the models. By default none is run.

    Returns:
        The differences, and the number of compared tensors and bytes.

    Raises:
        DirectiveError: `forward` or `trained` is given without `against`, `max_memory` without
            `forward`, or `layers` or `also` without `trained`. Or `layers` has an unknown word, or
            the model has no module that `also` names.
        CheckpointError: A model cannot be read, or no file records its layout.
        RefusedError: The forward passes cannot be compared, or the tensors of a model that was
            grown several times with those of an earlier base, or no tensor of a trained one.
    """
    if max_memory is not None and not forward:
        raise DirectiveError("--max-memory limits the forward pass only", hint="pass --forward too")
    if forward and not against:
        raise DirectiveError("--forward needs the base", hint="pass it with --against MODEL")
    if trained and not against:
        raise DirectiveError("--trained needs the base", hint="pass it with --against MODEL")
    if (layers or also) and not trained:
        raise DirectiveError(
            "--layers and --also name what was trained", hint="pass --trained --against MODEL too"
        )
    if is_gguf(os.fspath(out)):
        given = {"--trained": trained, "--max-memory": max_memory, "--allow-pickle": allow_pickle}
        return gguf.verify(
            Path(out),
            Models(),
            against=inputs.parse_models(against, "--against"),
            forward=forward,
            recipe=None if recipe is None else Path(recipe),
            others=[flag for flag, value in given.items() if value],
        )
    memory = inputs.parse_size(max_memory, "--max-memory")
    place, sources = Path(out), inputs.parse_models(against, "--against")
    with restored_settings(), _scratch(wanted=allow_pickle) as scratch:
        models = Models(trust_remote_code=trust_remote_code, unpickle_into=scratch)
        file = None if recipe is None else Path(recipe)
        if trained:
            named = _named(place, file, models, layers, also)
            report = reports.verify_as_found(
                place, models, against=sources, layout_from=file, named=named
            )
        else:
            report = reports.verify(place, models, against=sources, layout_from=file)
        if trained:
            _check_compared(report)
        warnings = record(place, report) if sources else ()
        if forward and report.is_exact:
            measured = reports.measure(place, report, memory)
            warnings += record(place, report, measured)
            report = dataclasses.replace(report, forward=measured)
    return dataclasses.replace(report, warnings=tuple(dict.fromkeys((*report.warnings, *warnings))))


def _check_compared(report: VerifyReport) -> None:
    """Check that a comparison after training has compared a tensor.

    Raises:
        RefusedError: It has not, so it proves nothing.
    """
    weights = report.weights
    if weights is not None and not weights.compared and not report.differences:
        reasons = "; ".join(weights.unread) or "there is none"
        against = " and ".join(report.against)
        raise RefusedError(f"{report.out}: no tensor can be compared with {against}: {reasons}")


def _named(
    place: Path, file: Path | None, models: Models, words: str | None, also: Sequence[str]
) -> Callable[[TensorSpec], bool]:
    """Return a function that tells whether a tensor was named as trained."""
    chosen: Sequence[int] = ()
    if words is not None:
        recorded_layout.check_directory(place)
        layout = recorded_layout.read(place, file).layout
        family = models.open(ModelRef(ModelPath(str(place)))).family
        chosen = selection.select(layout, family, words, model=str(place))
    outside: Collection[str] = ()
    if also:
        built = meta_model.build(place, trusted=models.trust_remote_code)
        stored = meta_model.stored_names(built)
        outside = {stored[name] for name in selection.parameters_outside(built, also)}
    return lambda spec: spec.layer in chosen or spec.name in outside


@contextmanager
def _scratch(*, wanted: bool) -> Iterator[Path | None]:
    """Create a temporary directory for tensors read from pickles."""
    if not wanted:
        yield None
        return
    with scratch_directory() as folder:
        yield folder
