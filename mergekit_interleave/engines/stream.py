"""This project's own engine: bytes are moved as they are.

It does no arithmetic: every tensor of the result is made of bytes of a source tensor, zeros and
stated constants. Blocks are shared where the filesystem can, other bytes move inside the kernel,
zeros are holes, and nothing is kept in memory but the headers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

from mergekit_interleave._files import sync
from mergekit_interleave._units import amount
from mergekit_interleave.checkpoint.safetensors_header import INDEX
from mergekit_interleave.engines import copy_range
from mergekit_interleave.engines.copy_range import Pair, Tick
from mergekit_interleave.engines.sharding import OutShard, WriteStep
from mergekit_interleave.errors import OutputError
from mergekit_interleave.planning.tensor_plan import TensorSpec

_AT_ONCE = 2
"""Files written at the same time: two take three quarters of the time of one, three hardly less."""


def reason_against(specs: Sequence[TensorSpec]) -> str | None:
    """Why these tensors need arithmetic, if they do."""
    for spec in specs:
        if spec.scale not in (None, 0, 1):
            return f"{spec.name} is multiplied by {spec.scale:g}"
        if len(spec.dtypes) > 1:
            first, *others = spec.dtypes
            return f"{spec.name} is converted from {first} to {' and '.join(others)}"
        if spec.model.lora is not None:
            return f"{spec.name} is merged with a LoRA"
    return None


def block_size(folder: Path) -> int:
    """The block size of a directory's filesystem, in bytes, as far as data is aligned to it."""
    size = os.statvfs(folder).f_frsize if hasattr(os, "statvfs") else 0
    return min(max(size, 2**12), 2**16)


@dataclass(frozen=True)
class Traffic:
    """The bytes of some files, by how they come there.

    Attributes:
        written: Take room of their own.
        shared: Share their blocks with a source.
        holes: Zeros that take no room.
    """

    written: int = 0
    shared: int = 0
    holes: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether all was written."""
        return not self.shared and not self.holes

    def __str__(self) -> str:
        specs = [f"{amount(self.written)} written"]
        specs += [f"{amount(self.shared)} shared with the base"] if self.shared else []
        specs += [f"{amount(self.holes)} of zeros that take no room"] if self.holes else []
        return ", ".join(specs)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.written + other.written, self.shared + other.shared, self.holes + other.holes
        )


def forecast(shards: Sequence[OutShard], folder: Path, *, reflink: bool = True) -> Traffic:
    """What it takes to write some shards into a directory.

    Args:
        shards: What would be written.
        folder: Where; a file without a name is made there for a moment.
        reflink: Whether blocks are shared where that can be done.
    """
    sharing = {
        source: reflink and copy_range.can_share(source.file, folder, block)
        for source, block in {(shard.source, shard.block) for shard in shards}
    }
    traffic = Traffic()
    for shard in shards:
        header = len(shard.header())
        traffic += Traffic(header)
        for step in shard.steps(header, share=sharing[shard.source]):
            traffic += _as_traffic(step.how, step.length)
    return traffic


def _as_traffic(how: str, length: int) -> Traffic:
    match how:
        case "share":
            return Traffic(shared=length)
        case "hole":
            return Traffic(holes=length)
    return Traffic(written=length)


def write(
    shards: Sequence[OutShard],
    out: Path,
    *,
    reflink: bool = True,
    tick: Tick = lambda _: None,
) -> Traffic:
    """Write the weights into a directory.

    Args:
        shards: What is written.
        out: The directory.
        reflink: Share blocks with the sources where that can be done.
        tick: Is told of bytes that are in place.

    Returns:
        How its bytes came there.

    Raises:
        CheckpointError: A source has changed.
        OutputError: A source cannot be read, or the disk failed or is full.
    """
    gate = _Gate(tick)
    job = partial(_write_shard, out=out, reflink=reflink, gate=gate)
    traffic = Traffic()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for done in as_completed([pool.submit(job, shard) for shard in shards]):
                traffic += done.result()
        except BaseException as error:  # noqa: BLE001 - whatever stops one must stop the others
            first = gate.close(error)
            pool.shutdown(cancel_futures=True)
            raise first from None
    for shard in shards:
        sync(out / shard.name)  # here, so that whoever watches sees that it is not done
    if len(shards) > 1:
        with (out / INDEX).open("w", encoding="utf-8") as file:
            file.writelines(_index(shards))
    return traffic


class _Gate:
    """Passes ticks on, one at a time; after the first failure, all that still tick fail, too."""

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
        """Let no more ticks through; returns the first failure."""
        with self._lock:
            self._failure = self._failure or failure
            return self._failure


def _index(shards: Sequence[OutShard]) -> Iterator[str]:
    """model.safetensors.index.json, line for line."""
    total = {"total_size": sum(shard.nbytes for shard in shards)}
    yield f'{{\n  "metadata": {json.dumps(total)},\n  "weight_map": {{'
    comma = ""
    for shard in shards:
        name = json.dumps(shard.name)
        for spec in shard.specs:
            yield f"{comma}\n    {json.dumps(spec.name)}: {name}"
            comma = ","
    yield "\n  }\n}\n"


def _write_shard(shard: OutShard, out: Path, *, reflink: bool, gate: _Gate) -> Traffic:
    try:
        gate.tick(0)
        with (
            shard.source.file.open("rb", buffering=0) as source,
            (out / shard.name).open("wb", buffering=0) as target,
        ):
            shard.source.check_unchanged(source.fileno())
            pair = Pair(source.fileno(), target.fileno(), gate.tick)
            return _fill(pair, shard, reflink=reflink)
    except OSError as error:
        reason = f"{shard.source.file} cannot be copied to {shard.name}: {error.strerror or error}"
        raise gate.close(OutputError(reason)) from error
    except BaseException as error:  # noqa: BLE001 - whatever stops one must stop the others
        raise gate.close(error) from None


def _fill(pair: Pair, shard: OutShard, *, reflink: bool) -> Traffic:
    """Write header and data of a shard."""
    header = shard.header()
    # Its full size first: where a file grows, XFS takes room ahead, which would fill the holes.
    os.truncate(pair.target, len(header) + shard.nbytes)
    pair.put(header, 0)
    traffic = Traffic(len(header))
    for step in shard.steps(len(header), share=reflink):
        traffic += _as_traffic(_take(pair, step, reflink=reflink), step.length)
    return traffic


def _take(pair: Pair, step: WriteStep, *, reflink: bool) -> str:
    """Take a step, and say how."""
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
