"""Write files beside OUT, and move them to their place at once.

Everything is written into a directory next to OUT that is locked while the run is active. A killed
run leaves that directory behind without a lock, and the next run removes it.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from mergekit_interleave._files import SUFFIXES, new_file_mode, sync
from mergekit_interleave._interrupts import uninterrupted
from mergekit_interleave.errors import OutputError

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")


@dataclass(frozen=True)
class StagedResult(Generic[T]):
    """The result of writing OUT.

    Attributes:
        value: The return value of the function that wrote it.
        warnings: Warnings for the user, such as that the old model could not be removed.
    """

    value: T
    warnings: tuple[str, ...] = ()


def check_replaceable(path: Path, reason_to_stay: str | None, *, replace: bool) -> None:
    """Check that what exists at the place of a new model may be replaced.

    Args:
        path: What exists.
        reason_to_stay: Why even `--force` must not replace it, or None if it may.
        replace: Whether an existing model may be replaced.

    Raises:
        OutputError: It must not be replaced.
    """
    if not replace:
        hint = "name another OUT" + ("" if reason_to_stay else ", or use --force to replace it")
        raise OutputError(f"{path}: already exists", hint=hint)
    if reason_to_stay is not None:
        raise OutputError(
            f"{path}: {reason_to_stay}, so it is not replaced",
            hint="move it away, or name another OUT",
        )


class Stage(ABC):
    """The directory next to OUT, from its creation to its removal.

    `open`, `commit` and `close` run uninterrupted, so that the attributes match the filesystem.

    Attributes:
        out: The path of the model.
        work: The directory to write into.
        aside: The place of an old model while it is replaced.
        replaces: Whether an existing model may be replaced.
        warnings: Warnings for the user, one sentence each.
        follows_killed: Whether a killed run has left its directory there.
    """

    def __init__(self, out: Path, *, replace: bool) -> None:
        # Not resolve(), which would follow OUT if it is a link.
        self.out = Path(os.path.abspath(out))  # noqa: PTH100
        self.work, self.aside = (
            self.out.with_name(f".{self.out.name}{suffix}") for suffix in SUFFIXES
        )
        self.warnings: list[str] = []
        self.replaces = replace
        self.follows_killed = False
        self._made: list[Path] = []
        self._lock: int | None = None
        self._mode = 0o600

    @abstractmethod
    def check_vacant(self) -> None:
        """Check that OUT may be written.

        Raises:
            OutputError: It must not be replaced.
        """

    @abstractmethod
    def place(self) -> None:
        """Move the old model aside, and the new one to OUT."""

    @property
    @abstractmethod
    def is_placed(self) -> bool:
        """Whether the new model is at OUT."""

    @abstractmethod
    def recover(self) -> None:
        """Restore the old model if a run ended before its new model was in place."""

    def remove_aside(self) -> None:
        """Remove the old model, as far as that is possible."""
        shutil.rmtree(self.aside, ignore_errors=True)

    def has_work_at(self, path: Path) -> bool:
        """Whether the locked directory is at a path."""
        return self._lock is not None and _is_at(path, self._lock)

    def open(self) -> None:
        """Create and lock the directory.

        Raises:
            OSError: It cannot be created.
            OutputError: OUT must not be replaced, or another run is writing it.
        """
        self._mode = new_file_mode()
        self._make_parents()
        self.follows_killed = self.work.exists()
        self._lock = _claim(self.work, self.out)
        self.recover()
        self.check_vacant()

    def settle(self) -> None:
        """Give all files the mode that the umask gives, and flush them to disk.

        safetensors makes its files readable only by their owner, regardless of the umask.
        """
        for folder, _, files in os.walk(self.work, topdown=False):
            for name in files:
                file = Path(folder, name)
                file.chmod(self._mode)
                sync(file)
            sync(Path(folder))

    def commit(self) -> None:
        """Move the new model to OUT."""
        self.check_vacant()  # again: OUT may have appeared meanwhile
        self.place()

    def close(self) -> None:
        """Remove everything except OUT, and unlock; a second call does nothing."""
        if self._lock is None:
            _remove_empty(self._made)
            return
        try:
            if self.is_placed:
                self._tidy()
            else:
                with suppress(OSError):
                    self.recover()
            if self.has_work_at(self.work):
                shutil.rmtree(self.work, ignore_errors=True)
            if not self.is_placed:
                _remove_empty(self._made)
        finally:
            os.close(self._lock)
            self._lock, self._made = None, []

    def _tidy(self) -> None:
        """Remove the old model after the new one is at OUT."""
        with suppress(OSError):  # OUT is in place; only a power failure could lose it
            sync(self.out.parent)
        self.remove_aside()
        if self.aside.exists():
            self.warnings.append(
                f"the previous model at {self.out} could not be removed; it is now at {self.aside}"
            )

    def _make_parents(self) -> None:
        """Create the missing parents of OUT, and remember them for `close`."""
        parent = self.out.parent
        missing = [path for path in (parent, *parent.parents) if not path.exists()]
        existing = next(path for path in (parent, *parent.parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{existing} is not a directory")
        self._made = missing
        parent.mkdir(parents=True, exist_ok=True)


def run_staged(stage: Stage, write: Callable[[Path], T]) -> StagedResult[T]:
    """Call a function that writes into a directory, whose content is then moved to OUT.

    This is not a context manager, because an interrupt between its entry and the block would leave
    the directory behind.

    Args:
        stage: The directory.
        write: Called with the empty directory, which is on the same filesystem as OUT.

    Returns:
        The return value of the function, and warnings.

    Raises:
        OutputError: OUT must not or cannot be written, or another run is writing it.
    """
    try:
        try:
            uninterrupted(stage.open)
            value = write(stage.work)
            stage.settle()
            uninterrupted(stage.commit)
        except BaseException:
            uninterrupted(stage.close, drop=True)
            raise
        uninterrupted(stage.close)
    except BaseException as error:
        # Again, because an interrupt may have come just before the first call.
        uninterrupted(stage.close, drop=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise OutputError(f"{stage.out}: cannot be written: {reason}") from error
        raise
    return StagedResult(value, tuple(stage.warnings))


def _claim(work: Path, out: Path) -> int:
    """Create the directory, or empty that of a killed run; lock it and return its descriptor."""
    while True:
        is_new = _make(work)
        descriptor = os.open(work, os.O_RDONLY)
        try:
            if sys.platform != "win32":
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another run may have renamed or removed the directory before it was locked.
            if _is_at(work, descriptor):
                _empty(work)
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputError(f"{out}: another run is writing it") from error
        except OSError:
            os.close(descriptor)
            if is_new:
                _remove_empty([work])
            raise
        os.close(descriptor)


def _make(folder: Path) -> bool:
    """Create a directory, and return whether it did not exist before."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether a path leads to the directory of an open descriptor."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _remove_empty(made: list[Path]) -> None:
    """Remove the created parents, innermost first, unless they contain something."""
    for path in made:
        with suppress(OSError):
            path.rmdir()
