"""Define the protocol that every engine follows, its options and its results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mergekit_interleave._units import amount
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.engines import registry
from mergekit_interleave.engines.copy_range import Tick
from mergekit_interleave.engines.out_file import OutFile
from mergekit_interleave.engines.registry import Request
from mergekit_interleave.errors import OutputError
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.planning.resolve import Expansion

Bar = Callable[[int], AbstractContextManager[Tick]]
"""A function that takes the number of bytes to write and returns a context manager, which yields
the function to call after each write."""


def no_bar(_: int) -> AbstractContextManager[Tick]:
    """Show no progress."""
    return nullcontext(lambda _: None)


Written = Callable[[Path, int], None]


def _ignored(_: Path, __: int) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class WriteOptions:
    """The options for writing the weights.

    Attributes:
        request: The requested engine.
        shard_size: The maximum bytes of one shard; None for the engine's default.
        reflink: Whether to share blocks with the sources if the filesystem can.
        mergekit: The options of mergekit.
        bar: A function that shows the progress of an engine.
        written: Called by an engine that writes each file in order, after each piece, with the file
            and the number of bytes that are in place. Engines may skip it.
    """

    request: Request = registry.NO_REQUEST
    shard_size: int | None = None
    reflink: bool = True
    mergekit: Mapping[str, object] = field(default_factory=dict)
    bar: Bar = no_bar
    written: Written = _ignored

    @property
    def engine(self) -> str:
        """The name of the requested engine, or `auto`."""
        return self.request.name

    @property
    def loads_transformers(self) -> bool:
        """Whether an engine that may write the weights loads transformers anyway."""
        return any("transformers" in row.packages for row in registry.rows(self.engine))


@dataclass(frozen=True)
class Traffic:
    """The numbers of bytes of some files, split by how the bytes are stored.

    Attributes:
        written: Bytes that take disk space of their own.
        shared: Bytes whose blocks are shared with a source.
        holes: Zeros that take no disk space.
    """

    written: int = 0
    shared: int = 0
    holes: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether every byte is written."""
        return not self.shared and not self.holes

    def __str__(self) -> str:
        parts = [f"{amount(self.written)} written"]
        parts += [f"{amount(self.shared)} shared with the base"] if self.shared else []
        parts += [f"{amount(self.holes)} of zeros that take no disk space"] if self.holes else []
        return ", ".join(parts)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.written + other.written, self.shared + other.shared, self.holes + other.holes
        )


@dataclass(frozen=True)
class Estimate:
    """The disk space, memory and time that writing some weights takes.

    Attributes:
        traffic: The numbers of bytes, split by how they are stored.
        memory: The approximate bytes of memory.
        seconds: The approximate time of a whole `run`, from the rates in docs/performance.md.
    """

    traffic: Traffic
    memory: int
    seconds: float = 0.0


@dataclass(frozen=True)
class WriteResult:
    """The result of writing the weights.

    Attributes:
        engine: The engine that wrote them.
        traffic: The numbers of bytes, split by how they are stored.
        beyond: Why mergekit could not write them, if it could not.
        saving: The estimated seconds that the stream engine would have saved; 0 if it could not
            have written what another engine wrote.
        notes: Facts for the user, such as why another engine was used.
    """

    engine: str
    traffic: Traffic
    beyond: str | None = None
    saving: float = 0.0
    notes: tuple[str, ...] = ()


class NoRoomError(OutputError):
    """The disk has too little free space."""


def check_free(folder: Path, needed: int, words: str) -> None:
    """Check that a filesystem has enough free space.

    Args:
        folder: A directory on it; the message names the parent of this directory.
        needed: The number of bytes that are needed.
        words: The needed space as text for the message, such as `5 GB needed`.

    Raises:
        NoRoomError: The filesystem has too little.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoRoomError(
            f"{folder.parent}: not enough free disk space: {words}, {amount(free)} free"
        )


class Engine(Protocol):
    """A module that writes weights: it has these functions, and a row in the registry."""

    def check(self, options: WriteOptions, expansion: Expansion) -> None:
        """Check the options before anything is fetched.

        Raises:
            DirectiveError: An option is unknown to this engine.
            RefusedError: The directive requires something that this engine cannot do.
        """

    def unsupported(self, plan: ExpansionPlan) -> str | None:
        """Return why this engine cannot write a plan, or None if it can.

        The reason is a predicate, such as `cannot scale x`. `Writer` calls this before `write`,
        which need not check it again.
        """

    def unsupported_type(self, first: Checkpoint) -> str | None:
        """Return why this engine is expected to fail for a type, as far as config.json shows it.

        `--engine auto` starts with this engine anyway if it comes first, so `write` must refuse
        what it cannot write.

        Args:
            first: The model of the first layer. Its weights may not be available.
        """

    def estimate_by_size(self, nbytes: int) -> Estimate | None:
        """Estimate the needs from the bytes of all tensors; None if that is not possible."""

    def estimate(self, plan: ExpansionPlan, folder: Path, options: WriteOptions) -> Estimate:
        """Estimate the disk space and memory that writing a plan into a directory takes."""

    def files(self, plan: ExpansionPlan, folder: Path, options: WriteOptions) -> Sequence[OutFile]:
        """Return the weight files that this engine would write, with their tensors in order."""

    def write(self, plan: ExpansionPlan, out: Path, options: WriteOptions) -> Traffic:
        """Write the weights into a directory that already contains the new config.json.

        Raises:
            RefusedError: This engine cannot do it; nothing was written.
            OutputError: Writing failed, or there is too little free space.
        """
