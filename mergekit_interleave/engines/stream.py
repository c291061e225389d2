"""Write the weights with this project's own engine, which copies bytes unchanged.

Almost every tensor of the result consists of bytes of a source tensor, zeros and given constants.
Blocks are shared if the filesystem can, other bytes are copied inside the kernel, zeros become
holes, and only the headers are kept in memory. The only arithmetic is that of damped and averaged
layers: factors that are powers of two, factors of gains, which mergekit cannot scale, and means.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import IO

from mergekit_interleave._files import sync
from mergekit_interleave._stored_tensor import Shard
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.safetensors_header import INDEX
from mergekit_interleave.engines import copy_range, sharding
from mergekit_interleave.engines.copy_range import Pair, Tick
from mergekit_interleave.engines.out_file import OutFile, Sharing, WriteStep
from mergekit_interleave.engines.protocol import Estimate, Traffic, WriteOptions, Written
from mergekit_interleave.engines.sharding import OutShard
from mergekit_interleave.errors import DirectiveError, OutputError, RefusedError
from mergekit_interleave.planning import arithmetic
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.planning.resolve import Expansion
from mergekit_interleave.planning.tensor_plan import TensorSpec

_AT_ONCE = 2
"""The number of files written at once. Two take 3/4 of the time of one; more hardly help."""

_LARGEST_SHARD = 50 * 10**9
"""The largest file that the Hub accepts, and the default limit of a shard. If no shard exceeds it,
the result has as many shards as the base."""

_PYTHON, _PER_TENSOR = 410 * 10**6, 4_200
"""The measured memory of the process, and of the entry of each tensor, in bytes. Most of it is
taken by transformers, which loads all names and shapes into the model's class."""

_PYTHON_FOR_GGUF = 60 * 10**6
"""The measured memory of the process for a GGUF file, which needs no transformers, in bytes."""

START, RATE = 4.7, 17 * 10**8
"""The measured seconds of `run` without the weights, and the bytes of weights that it then writes
and compares per second; see docs/performance.md."""

_COMPUTED = 2**22
"""The number of bytes that are computed at once, a multiple of the size of every element."""

_MERGEKITS_KEYS = ("tokenizer", "tokenizer_source", "chat_template", "parameters")
"""The keys of a directive that only mergekit can apply."""


def check(options: WriteOptions, expansion: Expansion) -> None:
    """Reject options that this engine would ignore; see `protocol.Engine`."""
    for name in options.mergekit:
        if name not in ("trust_remote_code", "allow_crimes"):  # these do not concern writing
            raise DirectiveError(
                f"the stream engine would ignore mergekit's option {name}",
                hint=f"leave out --mergekit {name}=..., or {options.request.remedy}",
            )
    reason = _needs_mergekit(expansion)
    if reason is not None:
        raise RefusedError(f"the stream engine {reason}", hint=options.request.remedy)


def unsupported(plan: ExpansionPlan) -> str | None:
    """Return why this engine cannot write a plan, as a predicate; see `protocol.Engine`."""
    reason = _arithmetic(plan.specs)
    if reason is not None:
        return f"does no such arithmetic: {reason}"
    return _needs_mergekit(plan.expansion)


def unsupported_type(first: Checkpoint) -> str | None:  # noqa: ARG001 - part of the protocol
    """Return None: bytes are copied the same way for every type; see `protocol.Engine`."""
    return None


def estimate_by_size(nbytes: int) -> Estimate | None:  # noqa: ARG001 - part of the protocol
    """Return None: what this engine needs depends on the tensors; see `protocol.Engine`."""
    return None


def _needs_mergekit(expansion: Expansion) -> str | None:
    """Return which key of the directive this engine cannot apply, as a predicate, or None."""
    for key in _MERGEKITS_KEYS:
        if key in expansion.directive.mergekit:
            return f"cannot apply `{key}`, which only mergekit can"
    return None


def _arithmetic(specs: Sequence[TensorSpec]) -> str | None:
    """Return which of these tensors needs arithmetic, and why; None if none does."""
    for spec in specs:
        if spec.scale is not None and not _is_scaled_here(spec.scale, spec.fixed):
            return f"{spec.name} is multiplied by {spec.scale:g}"
        if len(spec.dtypes) > 1:
            first, *others = spec.dtypes
            return f"{spec.name} is converted from {first} to {' and '.join(others)}"
        if spec.model.lora is not None:
            return f"{spec.name} is merged with a LoRA"
    return None


def _is_scaled_here(scale: float, fixed: float) -> bool:
    """Whether this engine multiplies by a factor.

    A power of two changes only the exponent. Numbers that become too small for their dtype are
    rounded as torch rounds them for mergekit.
    """
    return bool(fixed) or scale == 0 or abs(math.frexp(scale)[0]) == 0.5  # noqa: PLR2004


def estimate(plan: ExpansionPlan, folder: Path, options: WriteOptions) -> Estimate:
    """Estimate the needs of a plan; see `protocol.Engine`."""
    traffic = forecast(files(plan, folder, options), folder, reflink=options.reflink)
    seconds = START + traffic.written / RATE
    return Estimate(traffic, memory(len(plan.specs)), seconds)


def memory(tensors: int) -> int:
    """Return the approximate bytes of memory that a `run` takes.

    Args:
        tensors: The number of tensors.
    """
    return _PYTHON + tensors * _PER_TENSOR


def memory_of_gguf(tensors: int) -> int:
    """Return the approximate bytes of memory that a `run` takes for a GGUF file.

    Args:
        tensors: The number of tensors.
    """
    return _PYTHON_FOR_GGUF + tensors * _PER_TENSOR


def write(plan: ExpansionPlan, out: Path, options: WriteOptions) -> Traffic:
    """Write the weights of a plan; see `protocol.Engine`."""
    return write_shards(files(plan, out, options), out, options)


def write_shards(shards: Sequence[OutShard], out: Path, options: WriteOptions) -> Traffic:
    """Write some safetensors files and, if there are several, their index; see `write_files`."""
    traffic = write_files(shards, out, options)
    if len(shards) > 1:
        with (out / INDEX).open("w", encoding="utf-8") as file:
            file.writelines(_index(shards))
    return traffic


def files(plan: ExpansionPlan, folder: Path, options: WriteOptions) -> list[OutShard]:
    """Return the files that `write` writes; see `protocol.Engine`."""
    limit = options.shard_size or _LARGEST_SHARD
    return sharding.shards_of(plan.specs, limit, block_size(folder))


def block_size(folder: Path) -> int:
    """Return the block size for a directory, in bytes: its filesystem's, but from 4 to 64 KiB."""
    size = os.statvfs(folder).f_frsize if hasattr(os, "statvfs") else 0
    return min(max(size, 2**12), 2**16)


def forecast(files: Sequence[OutFile], folder: Path, *, reflink: bool = True) -> Traffic:
    """Return how the bytes of some files would be stored in a directory.

    Args:
        files: The files.
        folder: The directory; an unnamed file is created there for a moment.
        reflink: Whether to share blocks if the filesystem can.
    """
    sharing = {
        (source, block): reflink and copy_range.can_share(source.file, folder, block)
        for source, block in {(source, file.block) for file in files for source in file.sources}
    }
    traffic = Traffic()
    for file in files:
        header, block = len(file.header()), file.block
        traffic += Traffic(header)
        for step in file.steps(header, lambda source, block=block: sharing[source, block]):  # type: ignore[misc]
            traffic += _as_traffic(step.how, step.length)
    return traffic


def _as_traffic(how: str, length: int) -> Traffic:
    match how:
        case "share":
            return Traffic(shared=length)
        case "hole":
            return Traffic(holes=length)
    return Traffic(written=length)


def write_files(files: Sequence[OutFile], out: Path, options: WriteOptions) -> Traffic:
    """Write some files into a directory.

    Args:
        files: The files.
        out: The directory.
        options: The options for writing; only those that concern bytes are used.

    Returns:
        The numbers of bytes, split by how they are stored.

    Raises:
        CheckpointError: A source has changed.
        OutputError: A source cannot be read, or the disk failed or is full.
    """
    with options.bar(sum(file.nbytes for file in files)) as tick:
        return _write(files, out, options, tick)


def _write(files: Sequence[OutFile], out: Path, options: WriteOptions, tick: Tick) -> Traffic:
    gate = _Gate(tick)
    job = partial(_write_file, out=out, reflink=options.reflink, gate=gate, written=options.written)
    traffic = Traffic()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for done in as_completed([pool.submit(job, file) for file in files]):
                traffic += done.result()
        except BaseException as error:  # noqa: BLE001 - any error must stop the other threads
            first = gate.close(error)
            pool.shutdown(cancel_futures=True)
            raise first from None
    for file in files:
        sync(out / file.name)  # while the progress bar is shown, because this takes time
    return traffic


class _Gate:
    """Forwards the ticks of several threads, one at a time, until a thread fails.

    After the first failure, every tick raises an error, so that the other threads stop.
    """

    def __init__(self, tick: Tick) -> None:
        self._tick = tick
        self._lock = Lock()
        self._failure: BaseException | None = None

    def tick(self, nbytes: int) -> None:
        with self._lock:
            if self._failure is not None:
                raise InterruptedError
            self._tick(nbytes)

    def close(self, failure: BaseException) -> BaseException:
        """Make all further ticks fail, and return the first failure."""
        with self._lock:
            self._failure = self._failure or failure
            return self._failure


def _index(shards: Sequence[OutShard]) -> Iterator[str]:
    """Yield the lines of model.safetensors.index.json."""
    total = {"total_size": sum(shard.nbytes for shard in shards)}
    yield f'{{\n  "metadata": {json.dumps(total)},\n  "weight_map": {{'
    comma = ""
    for shard in shards:
        name = json.dumps(shard.name)
        for spec in shard.specs:
            yield f"{comma}\n    {json.dumps(spec.name)}: {name}"
            comma = ","
    yield "\n  }\n}\n"


def _write_file(
    file: OutFile, out: Path, *, reflink: bool, gate: _Gate, written: Written
) -> Traffic:
    path = out / file.name
    try:
        gate.tick(0)
        with path.open("wb", buffering=0) as target, closing(_Sources()) as sources:
            header = file.header()
            sharing = {
                source: reflink and copy_range.can_share(source.file, out, file.block)
                for source in file.sources
            }
            # Only a whole file can be asked which of its blocks are shared.
            report = _ignored if any(sharing.values()) else partial(written, path)
            ticks = _Ticks(gate.tick, report, len(header))
            pair = Pair(target.fileno(), target.fileno(), ticks.tick)
            return _fill(pair, file, header, sources, sharing.__getitem__, reflink=reflink)
    except OSError as error:
        reason = (
            f"{file.sources[0].file} cannot be copied to {file.name}: {error.strerror or error}"
        )
        raise gate.close(OutputError(reason)) from error
    except BaseException as error:  # noqa: BLE001 - any error must stop the other threads
        raise gate.close(error) from None


class _Sources:
    """The source files of a file, which are opened when they are needed."""

    def __init__(self) -> None:
        self._opened: dict[Shard, IO[bytes]] = {}

    def descriptor(self, source: Shard) -> int:
        """Return the descriptor of a source.

        Raises:
            CheckpointError: It has changed since its header was read.
        """
        if source not in self._opened:
            self._opened[source] = source.file.open("rb", buffering=0)
            source.check_unchanged(self._opened[source].fileno())
        return self._opened[source].fileno()

    def close(self) -> None:
        """Close all of them."""
        for file in self._opened.values():
            file.close()


def _ignored(_: int) -> None:
    """Do nothing."""


@dataclass
class _Ticks:
    """Reports each write to a file, which is written in order.

    Attributes:
        progress: Called with the number of bytes of the write.
        written: Called with the number of bytes that are in place.
        end: The number of bytes that are in place.
    """

    progress: Tick
    written: Tick
    end: int

    def tick(self, nbytes: int) -> None:
        """Report a write of some bytes."""
        self.progress(nbytes)
        self.end += nbytes
        self.written(self.end)


def _fill(  # noqa: PLR0913 - what `_write_file` has opened
    pair: Pair, file: OutFile, header: bytes, sources: _Sources, share: Sharing, *, reflink: bool
) -> Traffic:
    """Write the header and data of a file."""
    # Set the full size first: XFS reserves space for a growing file, which would fill the holes.
    os.truncate(pair.target, len(header) + file.nbytes)
    pair.put(header, 0)
    traffic = Traffic(len(header))
    for step in file.steps(len(header), share):
        if step.spec is not None:
            pair = replace(pair, source=sources.descriptor(step.spec.tensor.shard))
        if step.how == "compute" and step.spec is not None:
            _compute(pair, step.spec, step.at, sources)
            traffic += Traffic(step.length)
        else:
            traffic += _as_traffic(_take(pair, step, reflink=reflink), step.length)
    return traffic


def _take(pair: Pair, step: WriteStep, *, reflink: bool) -> str:
    """Perform a step, and return how it was done, in the words of `WriteStep.how`."""
    match step.how:
        case "hole":
            pair.tick(step.length)
        case "fill":
            pair.fill(step.data, step.at, step.length)
        case "share" if pair.share(step.start, step.at, step.length):
            pass
        case _:
            pair.copy(step.start, step.at, step.length, by_hand=not reflink)
            return "copy"
    return step.how


def _compute(pair: Pair, spec: TensorSpec, at: int, sources: _Sources) -> None:
    """Write an averaged, scaled or converted tensor at an offset."""
    mean = spec.mean_with
    behind = None if mean is None else replace(pair, source=sources.descriptor(mean.tensor.shard))
    for done in range(0, spec.tensor.nbytes, _COMPUTED):
        length = min(_COMPUTED, spec.tensor.nbytes - done)
        data, other = pair.read(spec.tensor.start + done, length), None
        if mean is not None and behind is not None:
            other = behind.read(mean.tensor.start + done, length)
        result = arithmetic.compute(data, spec.operation, other)
        pair.put(result, at)
        pair.tick(len(result))
        at += len(result)
