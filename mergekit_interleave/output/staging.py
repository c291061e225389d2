"""Write OUT atomically: it appears complete, by one rename, or not at all.

Everything is written into a directory next to OUT that is locked while the run is active. A killed
run leaves that directory behind without a lock, and the next run removes it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from mergekit_interleave import _out_files
from mergekit_interleave._files import SUFFIXES, new_file_mode, sync
from mergekit_interleave._interrupts import uninterrupted
from mergekit_interleave.errors import OutputError
from mergekit_interleave.output import card_files, verification_text, weight_sample

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")


def check_vacant(out: Path, *, replace: bool) -> None:
    """Check that OUT may be written.

    Args:
        out: The path of the model.
        replace: Whether an existing model may be replaced.

    Raises:
        OutputError: OUT exists and must not be replaced.
    """
    if not os.path.lexists(out):
        return
    reason = _reason_to_stay(out)
    if not replace:
        hint = "name another OUT" + (", or use --force to replace it" if reason is None else "")
        raise OutputError(f"{out}: already exists", hint=hint)
    if reason is not None:
        raise OutputError(
            f"{out}: {reason}, so it is not replaced", hint="move it away, or name another OUT"
        )


def _reason_to_stay(out: Path) -> str | None:
    """Return why even `--force` must not replace OUT, or None if it may."""
    if out.is_symlink():
        return "is a link"
    if not out.is_dir():
        return "is not a directory"
    try:
        written = _written_by(out)
        names = files_below(out)
        foreign = [name for name in names if not written.has(name)]
        changed = next((name for name in names if written.changed(name)), None)
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror or error}") from error
    if foreign:
        first = min(foreign, key=_out_files.is_usual)  # a user's own file is the better reason
        return f"contains {first}, which {written.nobody}"
    if written.trained:
        return "holds a model that was trained after `run` wrote it"
    return changed and f"contains {changed}, which was changed since it was written"


def files_below(folder: Path) -> list[str]:
    """Return all files below a directory, sorted, with forward slashes."""
    return sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()
    )


class _Written(NamedTuple):
    """What a tool has written into a directory.

    Attributes:
        has: Returns whether the tool wrote a file.
        nobody: Which tool did not write another file, for the message.
        trained: Whether another tool has trained the weights since.
        changed: Returns whether weights, card or picture were changed since the tool wrote them.
    """

    has: Callable[[str], bool]
    nobody: str = "no run wrote"
    trained: bool = False
    changed: Callable[[str], bool] = lambda _: False


def _written_by(out: Path) -> _Written:
    """Find out from its records what this tool or mergekit has written into a directory.

    interleave.json lists the files of a run. mergekit lists none, but it leaves its config beside
    the usual files of a model; without that config, the model may be anyone's.
    """
    with suppress(FileNotFoundError, ValueError, AttributeError, LookupError, TypeError):
        manifest = json.loads((out / _out_files.MANIFEST).read_text(encoding="utf-8"))
        files, verified = set(manifest["files"]), manifest.get("verified") or {}
        return _Written(
            files.__contains__,
            trained=verification_text.TRAINED in verified,
            changed=_changed_since_run(out, manifest),
        )
    with suppress(FileNotFoundError, ValueError):
        if "merge_method" in (out / _out_files.RECIPE).read_text(encoding="utf-8"):
            return _Written(
                _out_files.is_usual,
                "neither mergekit nor a run wrote",
                changed=lambda name: (
                    (_out_files.is_weights(name) or name == _out_files.CARD)
                    and _is_newer(out / name, out / _out_files.RECIPE)
                ),
            )
    return _Written(lambda _: False, "no run wrote, and no mergekit_config.yml is beside it")


def _changed_since_run(out: Path, manifest: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return a function that tells whether a file differs from what interleave.json records."""
    edited = card_files.edited(out, manifest)
    sample = manifest.get(weight_sample.KEY)

    def changed(name: str) -> bool:
        if not _out_files.is_weights(name):
            return name in edited
        if sample is None:  # release 0.1 recorded none, and `card` did not see them written
            return _is_newer(out / name, out / _out_files.MANIFEST)
        return not is_as_written()

    @cache
    def is_as_written() -> bool:
        return weight_sample.are_those_of(manifest, out)

    return changed


def _is_newer(file: Path, record: Path) -> bool:
    """Return whether a file was written after the record, which a tool writes last."""
    return file.stat().st_mtime_ns > record.stat().st_mtime_ns


@dataclass(frozen=True)
class StagedResult(Generic[T]):
    """The result of writing OUT.

    Attributes:
        value: The return value of the function that wrote it.
        warnings: Warnings for the user, such as that the old model could not be removed.
    """

    value: T
    warnings: tuple[str, ...] = ()


def staged(out: Path, write: Callable[[Path], T], *, replace: bool) -> StagedResult[T]:
    """Call a function that writes into a directory, which becomes OUT when the function returns.

    This is not a context manager, because an interrupt between its entry and the block would leave
    the directory behind.

    Args:
        out: The path of the model.
        write: Called with an empty directory on the same filesystem as OUT.
        replace: Whether to replace an existing model.

    Returns:
        The return value of the function, and warnings.

    Raises:
        OutputError: OUT must not or cannot be written, or another run is writing it.
    """
    stage = _Stage(out, replace=replace)
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


class _Stage:
    """The directory next to OUT, from its creation to its renaming or removal.

    `open`, `commit` and `close` run uninterrupted, so that the attributes match the filesystem.
    """

    def __init__(self, out: Path, *, replace: bool) -> None:
        # Not resolve(), which would follow OUT if it is a link.
        self.out = Path(os.path.abspath(out))  # noqa: PTH100
        self.work, self._aside = (
            self.out.with_name(f".{self.out.name}{suffix}") for suffix in SUFFIXES
        )
        self.warnings: list[str] = []
        self._replace = replace
        self._made: list[Path] = []
        self._lock: int | None = None
        self._mode = 0o600

    def open(self) -> None:
        """Create and lock the directory.

        Raises:
            OSError: It cannot be created.
            OutputError: OUT must not be replaced, or another run is writing it.
        """
        self._mode = new_file_mode()
        self._make_parents()
        self._lock = _claim(self.work, self.out)
        self._recover()
        check_vacant(self.out, replace=self._replace)

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
        """Rename the directory to OUT."""
        check_vacant(self.out, replace=self._replace)  # again: OUT may have appeared meanwhile
        if self.out.exists():
            self.out.rename(self._aside)
        self.work.rename(self.out)

    def close(self) -> None:
        """Remove everything except OUT, and unlock; a second call does nothing."""
        if self._lock is None:
            _remove_empty(self._made)
            return
        try:
            if _is_at(self.out, self._lock):
                self._tidy()
            else:
                with suppress(OSError):
                    self._recover()
                if _is_at(self.work, self._lock):
                    shutil.rmtree(self.work, ignore_errors=True)
                _remove_empty(self._made)
        finally:
            os.close(self._lock)
            self._lock, self._made = None, []

    def _tidy(self) -> None:
        """Remove the old model after the new one is renamed to OUT."""
        with suppress(OSError):  # OUT is in place; only a power failure could lose it
            sync(self.out.parent)
        shutil.rmtree(self._aside, ignore_errors=True)
        if self._aside.exists():
            self.warnings.append(
                f"the previous model at {self.out} could not be removed; it is now at {self._aside}"
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

    def _recover(self) -> None:
        """Restore the old model if a run ended before its new model was in place."""
        if self._aside.exists():
            if self.out.exists():
                shutil.rmtree(self._aside, ignore_errors=True)
            else:
                self._aside.rename(self.out)


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
