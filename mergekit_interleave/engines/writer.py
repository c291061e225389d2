"""Which engine writes the weights, whether there is room for them, and what became of the bytes."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mergekit_interleave._units import amount
from mergekit_interleave.architectures import family as families
from mergekit_interleave.engines import mergekit, sharding, stream
from mergekit_interleave.engines.copy_range import Tick
from mergekit_interleave.engines.sharding import OutShard
from mergekit_interleave.engines.stream import Traffic
from mergekit_interleave.errors import (
    DirectiveError,
    InterleaveError,
    OutputError,
    RefusedError,
)
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.planning.resolve import Expansion

log = logging.getLogger(__name__)

AUTO, MERGEKIT, STREAM = ENGINES = ("auto", "mergekit", "stream")

_SHARD_SIZE = 5 * 10**9
"""mergekit's."""

_LARGEST_SHARD = 50 * 10**9
"""The largest file that the Hub takes; below it, the stream engine has as many as the base."""


Bar = Callable[[int], AbstractContextManager[Tick]]
"""From how many bytes there will be, what is told of them as they come."""


def no_bar(_: int) -> AbstractContextManager[Tick]:
    """Shows nothing."""
    return nullcontext(lambda _: None)


@dataclass(frozen=True)
class WriteOptions:
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
        return bool(self.mergekit) and mergekit.mixes(self.mergekit)


@dataclass(frozen=True)
class WriteResult:
    """What was written.

    Attributes:
        engine: What wrote it.
        traffic: How its bytes came there.
        beyond: Why mergekit could not write it, if it could not.
        streamable: Whether mergekit wrote what the stream engine could have written.
    """

    engine: str
    traffic: Traffic
    beyond: str | None = None
    streamable: bool = False


def check(how: WriteOptions, expansion: Expansion) -> None:
    """Check, before anything is fetched, that the engine knows what it is told.

    Raises:
        DirectiveError: It has no such option.
        RefusedError: The stream engine cannot do what the directive says.
    """
    if how.streams:
        _check_stream(how, expansion)
        return
    if how.engine == MERGEKIT and not how.reflink:
        raise DirectiveError("--no-reflink: mergekit shares no blocks", hint="leave it out")
    if how.mergekit:  # to check them takes seconds
        mergekit.check_options(how.mergekit)


def _check_stream(how: WriteOptions, expansion: Expansion) -> None:
    """What the stream engine knows nothing of is refused, never ignored."""
    for name in how.mergekit:
        if name not in ("trust_remote_code", "allow_crimes"):  # which are not about writing
            raise DirectiveError(
                f"--engine stream: mergekit's option {name} has no meaning there",
                hint="leave either out",
            )
    for key in ("tokenizer", "tokenizer_source", "chat_template", "parameters"):
        if key in expansion.directive.mergekit:
            raise RefusedError(
                f"--engine stream: {key} is mergekit's, and only mergekit can do it",
                hint="leave --engine out",
            )


def mergekit_memory(nbytes: int) -> int:
    """About how many bytes of memory a `run` by mergekit takes: it holds one shard.

    Args:
        nbytes: The bytes of all tensors. docs/performance.md has what was measured.
    """
    libraries = 9 * 10**8
    return libraries + min(nbytes, _SHARD_SIZE)


def stream_memory(tensors: int) -> int:
    """The same by the stream engine, which knows only where each tensor is.

    Args:
        tensors: How many there are.
    """
    python, each = 32 * 10**6, 1_100
    return python + tensors * each


@dataclass(frozen=True)
class Writer:
    """Writes the weights, and the tokenizer where mergekit makes it.

    Attributes:
        plan: What is to be made.
        work: A directory to make it in, which holds the new config.json by the time of writing.
        how: How.
    """

    plan: ExpansionPlan
    work: Path
    how: WriteOptions

    def check_room(self) -> None:
        """Check that there is room for the result, by whichever engine needs less.

        Raises:
            OutputError: There is not.
        """
        files = sum(file.stat().st_size for _, file in self.plan.small_files)
        whole = self.whole + files
        if self.how.engine == MERGEKIT or self._arithmetic:
            self._check_free(whole, f"{amount(whole)} are needed")
            return
        needed = self.forecast.written + files
        words = f"{amount(needed)} are needed"
        if not self.how.streams:
            words += f" by the stream engine, {amount(whole)} by mergekit"
        self._check_free(needed, words)

    def write(self) -> WriteResult:
        """Write.

        Raises:
            RefusedError: The engine cannot do it, or neither can.
            OutputError: It stopped, or there is no room.
        """
        try:
            if self.how.streams:
                if self.against_stream is not None:
                    raise self.against_stream
                return WriteResult(STREAM, self._stream())
            return self._by_mergekit()
        except OSError as error:
            raise OutputError(
                f"the weights cannot be written: {error.strerror or error}"
            ) from error

    def _by_mergekit(self) -> WriteResult:
        plan, how, scratch = self.plan, self.how, self.work / ".lora"
        job = mergekit.Job(
            layout=plan.expansion.layout,
            specs=plan.specs,
            mergekit=plan.mergekit,
            modules=plan.expansion.modules,
            checkpoints={**plan.sources, plan.base.ref: plan.base},
            options=how.mergekit,
            shard_size=how.shard_size or _SHARD_SIZE,
            lora_cache=scratch,
        )
        try:
            targets = mergekit.plan(job, self.work)
        except RefusedError as refused:
            if how.engine == MERGEKIT or mergekit_yaml.changes_tokenizer(job.mergekit):
                raise
            if self._arithmetic:
                converts = mergekit_yaml.dtype_of(job.mergekit) is not None
                raise RefusedError(
                    f"{refused}; and the stream engine does no arithmetic: {self._arithmetic}",
                    hint="leave `dtype` out: every tensor keeps its own" if converts else None,
                ) from refused
            log.info("written by the stream engine: %s", refused)
            return WriteResult(STREAM, self._stream(), beyond=str(refused))
        self._check_free(
            self.whole,
            f"{amount(self.whole)} are needed",
            f"--engine stream needs {amount(self.forecast.written)}: it writes no zeros, and "
            "shares blocks where it can"
            if self.streamable
            else None,
        )
        mergekit.execute(targets, job)
        shutil.rmtree(scratch, ignore_errors=True)
        files = self.work.glob("*.safetensors")
        written = Traffic(sum(file.stat().st_size for file in files))
        return WriteResult(MERGEKIT, written, streamable=self.streamable)

    def _stream(self) -> Traffic:
        with self.how.bar(sum(shard.nbytes for shard in self._shards)) as tick:
            return stream.write(self._shards, self.work, reflink=self.how.reflink, tick=tick)

    @cached_property
    def against_mergekit(self) -> str | None:
        """Why mergekit cannot write it, as far as that is known without asking it."""
        reason = mergekit.reason_against(self.plan.specs)
        if reason is not None:
            return reason
        first = self.plan.first
        family = first.family
        if family and family.mergekit_result(first.layer_config) == families.WRONG_TENSORS:
            return f"write the right tensors of model type {first.model_type}"
        return None

    @cached_property
    def against_stream(self) -> InterleaveError | None:
        """Why `--engine stream` cannot do it, if it cannot."""
        try:
            _check_stream(self.how, self.plan.expansion)
        except InterleaveError as error:
            return error
        if self._arithmetic is None:
            return None
        return RefusedError(
            f"--engine stream does no arithmetic: {self._arithmetic}",
            hint="leave --engine out: mergekit can",
        )

    @cached_property
    def _arithmetic(self) -> str | None:
        return stream.reason_against(self.plan.specs)

    @property
    def streamable(self) -> bool:
        """Whether `--engine stream` could do the same."""
        return self.against_stream is None

    @cached_property
    def _shards(self) -> list[OutShard]:
        limit = self.how.shard_size or _LARGEST_SHARD
        return sharding.shards_of(self.plan.specs, limit, stream.block_size(self.work))

    @cached_property
    def forecast(self) -> Traffic:
        """How the stream engine's bytes will come there."""
        return stream.forecast(self._shards, self.work, reflink=self.how.reflink)

    @property
    def whole(self) -> int:
        """The bytes that mergekit writes: all tensors, and those that a LoRA is merged into."""
        merged = (model for reference, model in self.plan.sources.items() if reference.lora)
        return sum(part.nbytes for part in self.plan.specs) + sum(
            tensor.nbytes for model in merged for tensor in model.tensors.values()
        )

    def _check_free(self, needed: int, words: str, hint: str | None = None) -> None:
        free = shutil.disk_usage(self.work).free
        if needed > free:
            raise OutputError(
                f"{self.work.parent}: no room: {words}, {amount(free)} are free", hint=hint
            )
