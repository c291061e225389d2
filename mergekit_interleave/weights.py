"""Which engine writes the weights, whether there is room for them, and what became of the bytes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_interleave import recipe
from mergekit_interleave.amounts import amount
from mergekit_interleave.engines import mergekit, sharding, stream
from mergekit_interleave.engines.moving import Tick
from mergekit_interleave.engines.sharding import OutShard
from mergekit_interleave.engines.stream import Traffic
from mergekit_interleave.errors import (
    DirectiveError,
    InterleaveError,
    OutputError,
    RefusedError,
)
from mergekit_interleave.expand import Expansion
from mergekit_interleave.preflight import Preflight

log = logging.getLogger(__name__)

AUTO, MERGEKIT, STREAM = ENGINES = ("auto", "mergekit", "stream")

_SHARD_SIZE = 5 * 10**9
"""mergekit's."""


Bar = Callable[[int], AbstractContextManager[Tick]]
"""From how many bytes there will be, what is told of them as they come."""


def no_bar(_: int) -> AbstractContextManager[Tick]:
    """Shows nothing."""
    return nullcontext(lambda _: None)


@dataclass(frozen=True)
class How:
    """How to write the weights.

    Attributes:
        engine: `mergekit` or `stream` to insist on one, or `auto`.
        shard_size: The most bytes of one shard; None for what is usual.
        reflink: Share blocks with the sources where that can be done.
        mergekit: mergekit's own options.
        bar: Shows how far the stream engine is.
    """

    engine: str = AUTO
    shard_size: int | None = None
    reflink: bool = True
    mergekit: Mapping[str, object] = field(default_factory=dict)
    bar: Bar = no_bar

    @property
    def streams(self) -> bool:
        """Whether it is the stream engine and no other."""
        return self.engine == STREAM

    @property
    def mixes(self) -> bool:
        """Whether models are stacked that do not fit."""
        return not self.streams and mergekit.mixes(self.mergekit)


@dataclass(frozen=True)
class Outcome:
    """What was written.

    Attributes:
        traffic: How its bytes came there.
        beyond: Why mergekit could not write it, if it could not.
        streamable: Whether mergekit wrote what the stream engine could have written.
    """

    traffic: Traffic
    beyond: str | None = None
    streamable: bool = False


def check(how: How, expansion: Expansion) -> None:
    """Check, before anything is fetched, that the engine knows what it is told.

    Raises:
        DirectiveError: It has no such option.
        RefusedError: The stream engine cannot do what the directive says.
    """
    if how.streams:
        _check_stream(how, expansion)
    else:
        mergekit.check_options(how.mergekit)
        mergekit.quieten(how.mergekit.get("verbosity"))


def _check_stream(how: How, expansion: Expansion) -> None:
    """What the stream engine knows nothing of is refused, never ignored."""
    for name in how.mergekit:
        if name != "trust_remote_code":
            raise DirectiveError(f"--engine stream: mergekit's option {name} has no meaning there")
    for key in ("tokenizer", "tokenizer_source", "chat_template", "parameters"):
        if key in expansion.directive.mergekit:
            raise RefusedError(
                f"--engine stream: {key} is mergekit's, and only mergekit can do it",
                hint="leave --engine out",
            )


def check_room(plan: Preflight, work: Path, how: How) -> None:
    """Check that there is room for the weights, by whichever engine needs less.

    Args:
        plan: What is to be made.
        work: A directory where it is to be made.
        how: How.

    Raises:
        OutputError: There is not.
    """
    needed = _all(plan)
    if how.engine != MERGEKIT and _streamable(plan, how):
        needed = _forecast(plan, work, how).written
    _check_free(needed + sum(file.stat().st_size for _, file in plan.small_files), work)


def write(plan: Preflight, work: Path, how: How) -> Outcome:
    """Write the weights, and the tokenizer where mergekit makes it, into a directory.

    Args:
        plan: What is to be made.
        work: A directory that holds the new config.json already.
        how: How.

    Raises:
        RefusedError: The engine cannot do it, or neither can.
        OutputError: It stopped, or there is no room.
    """
    try:
        if how.streams:
            arithmetic = stream.reason_against(plan.parts)
            if arithmetic:
                raise RefusedError(f"--engine stream does no arithmetic: {arithmetic}")
            return Outcome(_stream(plan, work, how))
        return _by_mergekit(plan, work, how)
    except OSError as error:
        raise OutputError(f"the weights cannot be written: {error.strerror or error}") from error


def _by_mergekit(plan: Preflight, work: Path, how: How) -> Outcome:
    scratch = work / ".lora"
    job = mergekit.Job(
        layout=plan.expansion.layout,
        parts=plan.parts,
        mergekit=plan.mergekit,
        modules=plan.expansion.modules,
        checkpoints={**plan.sources, plan.base.ref: plan.base},
        options=how.mergekit,
        shard_size=how.shard_size or _SHARD_SIZE,
        lora_cache=scratch,
    )
    try:
        targets = mergekit.plan(job, work)
    except RefusedError as refused:
        if how.engine == MERGEKIT or recipe.changes_tokenizer(job.mergekit):
            raise
        arithmetic = stream.reason_against(job.parts)
        if arithmetic:
            converts = recipe.dtype_of(job.mergekit) is not None
            raise RefusedError(
                f"{refused}; and the stream engine does no arithmetic: {arithmetic}",
                hint="leave `dtype` out: every tensor keeps its own" if converts else None,
            ) from refused
        log.info("written by the stream engine: %s", refused)
        return Outcome(_stream(plan, work, how), beyond=str(refused))
    streamable = _streamable(plan, how)
    less = _forecast(plan, work, how).written if streamable else None
    _check_free(_all(plan), work, less)
    mergekit.execute(targets, job)
    shutil.rmtree(scratch, ignore_errors=True)
    files = work.glob("*.safetensors")
    return Outcome(Traffic(sum(file.stat().st_size for file in files)), streamable=streamable)


def _streamable(plan: Preflight, how: How) -> bool:
    """Whether `--engine stream` could do the same."""
    try:
        _check_stream(how, plan.expansion)
    except InterleaveError:
        return False
    return stream.reason_against(plan.parts) is None


def _shards(plan: Preflight, work: Path, how: How) -> list[OutShard]:
    in_one = len({part.tensor.shard for part in plan.parts}) == 1
    usual = sum(part.nbytes for part in plan.parts) if in_one else _SHARD_SIZE
    return sharding.shards_of(plan.parts, how.shard_size or usual, stream.block_size(work))


def _forecast(plan: Preflight, work: Path, how: How) -> Traffic:
    return stream.forecast(_shards(plan, work, how), work, reflink=how.reflink)


def _stream(plan: Preflight, work: Path, how: How) -> Traffic:
    shards = _shards(plan, work, how)
    with how.bar(sum(shard.nbytes for shard in shards)) as tick:
        return stream.write(shards, work, reflink=how.reflink, tick=tick)


def _all(plan: Preflight) -> int:
    """The bytes of all tensors, and of those that a LoRA is merged into on the way."""
    merged = (model for reference, model in plan.sources.items() if reference.lora)
    return sum(part.nbytes for part in plan.parts) + sum(
        tensor.nbytes for model in merged for tensor in model.tensors.values()
    )


def _check_free(needed: int, work: Path, less: int | None = None) -> None:
    """Check that so many bytes are free, or that fewer would do with the stream engine."""
    free = shutil.disk_usage(work).free
    if needed > free:
        raise OutputError(
            f"{work.parent}: no room: {amount(needed)} are needed, {amount(free)} are free",
            hint=f"--engine stream needs {amount(less)}: it writes no zeros, and shares blocks "
            "with the base where the filesystem can"
            if less is not None and less <= free
            else None,
        )
