"""`scan --for training`: rank the layers of a model, and say after which to put new ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_interleave._files import replace_file
from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.meta_model import hide_bars, memory_errors
from mergekit_interleave.commands import inputs
from mergekit_interleave.commands._settings import restored_settings
from mergekit_interleave.commands.inputs import ModelLike, StrPath
from mergekit_interleave.commands.plan import plan
from mergekit_interleave.commands.scan_job import (
    BATCH,
    GROUP,
    Job,
    check_place,
    to_check,
)
from mergekit_interleave.commands.scan_plans import Outcomes, Planner, accepted, with_model
from mergekit_interleave.commands.scan_sequences import read_content, scored_sequences
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import After
from mergekit_interleave.engines.protocol import Bar, no_bar
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    InterleaveError,
    LayoutError,
    OutputError,
    Warn,
    collected_warnings,
)
from mergekit_interleave.scanning import allocator, paths, spaces
from mergekit_interleave.scanning.batches import Batch, batches
from mergekit_interleave.scanning.block_influence import block_influence
from mergekit_interleave.scanning.layer_major import NotLayerMajorError
from mergekit_interleave.scanning.measure import Measure, to_compare
from mergekit_interleave.scanning.results import Floats
from mergekit_interleave.scanning.spaces import Candidate
from mergekit_interleave.virtual.sampling import tokens_of

NUMBERS, DIRECTIVE = "training.json", "training.yml"


@dataclass(frozen=True)
class RankedLayer:
    """How much a model needs one of its layers.

    Attributes:
        layer: The index of the layer.
        influence: Its Block Influence; None if it cannot be measured.
        change: The change of the log-likelihood when the layer is left out, in nats per scored
            token; None if there is none.
        rank: The place among the layers, from 1, which the model needs least; None without a
            change.
        reason: Why there is no change, such as that `run` refuses the model without the layer.
    """

    layer: int
    influence: float | None
    change: float | None
    rank: int | None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON values; numbers that are not finite are None."""
        return {
            "layer": self.layer,
            "block_influence": _finite(self.influence),
            "change": self.change,
            "rank": self.rank,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class TrainingScanReport:
    """Where to put new layers that will be trained.

    Attributes:
        layers: The layers of the model, in order.
        after: The layers to put a new one after, ascending.
        directive: The directive that does so; None if `run` refuses it, as a warning says.
        tokens: The number of scored tokens.
        warnings: Warnings, one sentence each.
    """

    layers: tuple[RankedLayer, ...]
    after: tuple[int, ...]
    directive: str | None
    tokens: int
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return list(_lines(self))

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, as `scan --for training --json` prints it."""
        return {
            "directive": self.directive,
            "after": list(self.after),
            "tokens": self.tokens,
            "layers": [each.as_dict() for each in self.layers],
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        return "\n".join(self.lines())


def scan_for_training(  # noqa: PLR0913 - one parameter for each option
    *,
    model: ModelLike | None = None,
    add: int | str | None = None,
    text: StrPath | None = None,
    items: StrPath | None = None,
    tokens: int | str | None = None,
    out: StrPath | None = None,
    dtype: str = "float32",
    device: str | None = None,
    max_memory: int | str | None = None,
    trust_remote_code: bool = False,
    progress: Bar | None = None,
) -> TrainingScanReport:
    """Rank the layers of a model by how much it needs them, and say after which to put new ones.

    The model is measured without each layer in turn. New layers go after those that it needs least,
    as in ADEPT (arXiv 2510.10071). The Block Influence of each layer (ShortGPT, arXiv 2403.03853)
    is reported beside it.

    Args:
        model: The model: a directory or a Hub id.
        add: The number of new layers; by default, a quarter of the layers.
        text: A file with text, as for `scan`.
        items: A file with items, as for `scan`.
        tokens: The maximum number of tokens of the text; by default 4096.
        out: The directory for `training.json`, the numbers, and `training.yml`, the directive.
        dtype: The dtype to compute in.
        device: The device to compute on; by default, a GPU if there is one.
        max_memory: The maximum memory for weights and states, as for `scan`.
        trust_remote_code: Run code from the model. By default none is run.
        progress: As for `scan`.

    Raises:
        InterleaveError: The model cannot be measured, or has fewer layers than `add`.
    """
    content = read_content(text, items, tokens)
    wanted = None if add is None else inputs.parse_count(add, "--add")
    nbytes = inputs.parse_size(max_memory, "--max-memory")
    check_place(dtype, device)
    with (
        restored_settings(),
        allocator.restored(),
        collected_warnings() as warnings,
        memory_errors(),
        scratch_directory() as scratch,
    ):
        planner = Planner(model, trust_remote_code, scratch)
        first = planner.base()
        outcomes = planner.outcomes(_candidates(first.depth))
        plans = accepted(outcomes)
        _count(wanted, len(plans), first)
        hide_bars()
        scored = scored_sequences(first, content, warnings.append)
        if out is not None:
            _create(Path(out))
        parts = batches(scored, BATCH)
        layouts = {each.directive: plan for each, plan in plans.items()}
        job = Job(
            planner, next(iter(layouts)), to_compare(layouts), to_check(parts),
            dtype, device, None, nbytes,
        )  # fmt: skip
        measure = job.start(warnings.append)
        influences = _influences(measure, parts, warnings.append)
        base = np.hstack([measure.base_scores(batch) for batch in parts])
        if not np.isfinite(base).all():
            raise CheckpointError(f"{first.ref}: its log-likelihood is not a finite number")
        changes = _changes(measure, [*layouts], parts, base, progress or no_bar)
        layers = _ranked(outcomes, influences, dict(zip(plans, changes, strict=True)))
        count = _count(wanted, sum(each.rank is not None for each in layers), first)
        after = tuple(each.layer for each in layers if each.rank and each.rank <= count)
        directive = _directive(after, model, warnings.append, trusted=trust_remote_code)
    total = sum(each.scored for each in scored)
    report = TrainingScanReport(layers, after, directive, total, tuple(dict.fromkeys(warnings)))
    if out is not None:
        _write(Path(out), report, model)
    return report


def _candidates(depth: int) -> list[Candidate]:
    """Return the layouts that leave out one layer.

    Raises:
        LayoutError: There is only one.
    """
    every = spaces.SPACES["drops"].layouts(depth)
    found = [each for each in every if each.cell and each.cell[1] - each.cell[0] == 1]
    if not found:
        raise LayoutError("the model has only one layer, which cannot be left out")
    return found


def _count(wanted: int | None, most: int, first: Checkpoint) -> int:
    """Return the number of new layers: by default, a quarter of the layers.

    Raises:
        LayoutError: There are fewer layers to put one after.
    """
    if not most:
        raise LayoutError(f"{first.ref}: no log-likelihood without a layer is a finite number")
    if wanted is None:
        return min(max(1, (first.depth + 2) // 4), most)
    if wanted > most:
        raise LayoutError(
            f"--add is {wanted}, but only {most} layers of {first.ref} can be ranked",
            hint=f"add at most {most}: `--add {most}`",
        )
    return wanted


def _influences(measure: Measure, parts: Sequence[Batch], warn: Warn) -> list[float] | None:
    """Return the Block Influence of each layer; None if it cannot be measured."""
    try:
        apart = [part for batch in parts for _, part in measure.parts(batch)]
        return block_influence(measure.base, measure.depth, apart)
    except NotLayerMajorError as error:
        warn(f"the Block Influence is not measured: {error}")
        return None


def _changes(
    measure: Measure, layouts: Sequence[str], parts: Sequence[Batch], base: Floats, bar: Bar
) -> list[float]:
    """Return the change of the log-likelihood of each layout, in nats per scored token."""
    found = np.empty((len(layouts), base.shape[1]))
    with bar(len(found)) as tick:
        for group in paths.groups(len(found), GROUP):
            wanted = [layouts[row] for row in group]
            found[group] = np.hstack([measure.scores(wanted, batch) for batch in parts])
            tick(len(group))
    tokens = sum(each.scored for batch in parts for each in batch.sequences)
    return [math.fsum(row) / tokens for row in found - base]


def _ranked(
    outcomes: Outcomes, influences: Sequence[float] | None, changes: Mapping[Candidate, float]
) -> tuple[RankedLayer, ...]:
    """Return the layers in order; of equal ones, the model needs the first least."""
    finite = {each: change for each, change in changes.items() if math.isfinite(change)}
    ranks = {each: rank for rank, each in enumerate(sorted(finite, key=lambda i: -finite[i]), 1)}
    return tuple(
        RankedLayer(
            layer,
            None if influences is None else influences[layer],
            finite.get(each),
            ranks.get(each),
            str(one) if isinstance(one, InterleaveError) else _why_not(each, finite),
        )
        for layer, (each, one) in enumerate(outcomes.items())
    )


def _why_not(each: Candidate, finite: Mapping[Candidate, float]) -> str | None:
    return None if each in finite else "the log-likelihood without it is not a finite number"


def _directive(
    after: Sequence[int], model: ModelLike | None, warn: Warn, *, trusted: bool
) -> str | None:
    """Return the directive for new layers; None if `run` refuses it."""
    directive = yaml_io.write_inline(Directive(growth=After(tuple(after))).to_document())
    try:
        plan(directive, model=model, trust_remote_code=trusted)
    except InterleaveError as error:
        warn(f"`run` refuses `{directive}`: {error}")
        return None
    return directive


def _create(out: Path) -> None:
    """Create the directory.

    Raises:
        DirectiveError: It contains something else.
        OutputError: It cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if {file.name for file in out.iterdir()} - {NUMBERS, DIRECTIVE}:
            raise DirectiveError(
                f"{out}: contains files, but no scan for training", hint="name another --out"
            )
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror or error}") from error


def _write(out: Path, report: TrainingScanReport, model: ModelLike | None) -> None:
    """Write the numbers, and the directive if `run` takes it."""
    replace_file(out / NUMBERS, json.dumps(report.as_dict(), indent=2) + "\n")
    if report.directive is None:
        (out / DIRECTIVE).unlink(missing_ok=True)
    else:
        replace_file(out / DIRECTIVE, with_model(report.directive, model))


def _lines(report: TrainingScanReport) -> Iterator[str]:
    """Yield the directive, and a table with the layer first that the model needs least."""
    if report.directive is not None:
        yield f"Put new layers after those that the model needs least: `{report.directive}`."
        yield ""
    yield (
        f"Measured on {tokens_of(report.tokens)}. Rank 1 is the layer without which the "
        "log-likelihood is highest; its change is in nats per scored token."
    )
    yield ""
    rows = [("layer", "Block Influence", "change without it", "rank", "")]
    rows += [
        (
            str(each.layer),
            _number(each.influence, ""),
            _number(each.change, "+"),
            str(each.rank or "-"),
            each.reason or "",
        )
        for each in sorted(report.layers, key=lambda each: each.rank or math.inf)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for *cells, reason in rows:
        yield "  ".join([*map(str.rjust, cells, widths), reason]).rstrip()


def _number(number: float | None, sign: str) -> str:
    return "-" if number is None else f"{number:{sign}.4f}"


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
