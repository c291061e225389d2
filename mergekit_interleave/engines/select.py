"""Choose the engine for a plan, and check the free disk space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit_interleave._units import amount
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.engines import registry
from mergekit_interleave.engines.protocol import Estimate, WriteOptions, check_free
from mergekit_interleave.engines.registry import EngineRow, Request
from mergekit_interleave.errors import InterleaveError, RefusedError
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.planning.resolve import Expansion


@dataclass(frozen=True)
class Choice:
    """The engine that `--engine auto` selects.

    Attributes:
        engine: Its name.
        why: The reason, in words that follow the name and a comma.
        estimates: The needs of each engine that can write the plan, by name.
    """

    engine: str
    why: str
    estimates: Mapping[str, Estimate]


def check(options: WriteOptions, expansion: Expansion) -> None:
    """Check, before anything is fetched, that the first engine to try accepts its options.

    Raises:
        DirectiveError: There is no such engine, or it has no such option.
        RefusedError: The directive requires something that the engine cannot do.
    """
    registry.rows(options.engine)[0].load().check(options, expansion)


def choose(plan: ExpansionPlan, folder: Path, request: Request) -> Choice:
    """Choose the engine for a plan.

    Args:
        plan: The plan to write.
        folder: The directory to write into.
        request: The requested engine.

    Raises:
        RefusedError: The requested engine cannot write the plan.
    """
    options = WriteOptions(request)
    return _choice(
        {row: expected_refusal(row, plan) for row in registry.rows(registry.AUTO)},
        lambda row: row.load().estimate(plan, folder, options),
        request,
    )


def expected_refusal(row: EngineRow, plan: ExpansionPlan) -> str | None:
    """Return why an engine cannot write a plan, or would probably write it wrong."""
    engine = row.load()
    return engine.unsupported(plan) or engine.unsupported_type(plan.first)


def choose_by_config(first: Checkpoint, nbytes: int, request: Request) -> Choice:
    """Choose the engine by config.json alone.

    Args:
        first: The model of the first layer.
        nbytes: The approximate size of all tensors in bytes.
        request: The requested engine.

    Raises:
        RefusedError: The requested engine cannot write models of this type.
    """
    return _choice(
        {row: row.load().unsupported_type(first) for row in registry.rows(registry.AUTO)},
        lambda row: row.load().estimate_by_size(nbytes),
        request,
    )


def _choice(
    reasons: Mapping[EngineRow, str | None],
    estimate: Callable[[EngineRow], Estimate | None],
    request: Request,
) -> Choice:
    """Choose the requested engine, or the first that can write the plan, or else the last one.

    Args:
        reasons: Why each engine cannot write the plan; None if it can.
        estimate: Estimates the needs of an engine; None if they are unknown.
        request: The requested engine.
    """
    able = [row for row, reason in reasons.items() if reason is None]
    chosen = able[0] if able else [*reasons][-1]
    against = [
        f"{row.title} {reason}" for row, reason in reasons.items() if reason and row != chosen
    ]
    estimates = {row.name: estimate(row) for row in able}
    why = f"because {'; '.join(against)}" if against else "the default"
    if request.name != registry.AUTO:
        (chosen,), why = registry.rows(request.name), f"set by {request.source}"
        if reasons[chosen]:
            raise RefusedError(f"{chosen.title} {reasons[chosen]}", hint=request.remedy)
    return Choice(
        chosen.name,
        why,
        {name: needs for name, needs in estimates.items() if needs is not None},
    )


def is_streamable(plan: ExpansionPlan, options: WriteOptions) -> bool:
    """Return whether `--engine stream` could write the same tensors with the same options."""
    stream = registry.ENGINES[registry.STREAM].load()
    try:
        stream.check(options, plan.expansion)
    except InterleaveError:
        return False
    return stream.unsupported(plan) is None


def check_room(plan: ExpansionPlan, folder: Path, options: WriteOptions) -> None:
    """Check that there is enough free disk space for the engine that needs the least.

    Args:
        plan: The plan to write.
        folder: The directory to write into.
        options: The options for writing.

    Raises:
        OutputError: There is too little for every engine that may write the plan.
    """
    files = sum(file.stat().st_size for _, file in plan.small_files)
    needs = sorted(
        (row.load().estimate(plan, folder, options).traffic.written + files, row.title)
        for row in registry.rows(options.engine)
        if expected_refusal(row, plan) is None
    )
    if not needs:
        return  # writing fails with the reason
    (least, title), *more = needs
    words = f"{amount(least)} needed"
    if more:
        words += f" by {title}" + "".join(f", {amount(size)} by {other}" for size, other in more)
    check_free(folder, least, words)
