"""Write the files of a GGUF model atomically: they appear complete, or not at all.

They are written into a locked directory beside OUT, as those of a model directory are, and then
renamed, the first split last: llama.cpp opens the others through it. A run that is killed between
the renames leaves splits without a first one, which the next run removes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.engines.gguf_splits import FINGERPRINT
from mergekit_interleave.errors import InterleaveError, OutputError
from mergekit_interleave.gguf import header
from mergekit_interleave.gguf.model import open_model, split_name, split_stem
from mergekit_interleave.output import gguf_card, gguf_record
from mergekit_interleave.output.stage import Stage, StagedResult, check_replaceable, run_staged

T = TypeVar("T")

SUFFIX = ".gguf"


def check_out(out: Path) -> None:
    """Check that a path can be that of a new GGUF model.

    Raises:
        OutputError: It has another suffix, or is the name of a split.
    """
    if out.suffix != SUFFIX:
        raise OutputError(
            f"{out}: the model is a GGUF file, so OUT must be one, too",
            hint=f"name {out}{SUFFIX}",
        )
    stem = split_stem(out.name)
    if stem is not None:
        raise OutputError(
            f"{out}: is the name of a split, which is derived from that of OUT",
            hint=f"name {stem}{SUFFIX}",
        )


def check_vacant(out: Path, *, replace: bool) -> None:
    """Check that OUT may be written.

    Args:
        out: The path of the model, without the number of a split.
        replace: Whether an existing model may be replaced.

    Raises:
        OutputError: OUT exists and must not be replaced.
    """
    for first in firsts(out):
        check_replaceable(first, _reason_to_stay(first), replace=replace)
    card = gguf_card.path_of(out)
    if os.path.lexists(card) and not gguf_card.is_generated(card):
        raise OutputError(
            f"{card}: already exists, and would be the model card of OUT",
            hint="move it away, or name another OUT",
        )


def firsts(out: Path) -> list[Path]:
    """Return what exists under the name of OUT: a file, or the first of several splits."""
    found = [out] if os.path.lexists(out) else []
    pattern = re.compile(re.escape(out.stem) + r"-00001-of-\d{5}\.gguf")
    with suppress(OSError):
        names = sorted(name for name in os.listdir(out.parent) if pattern.fullmatch(name))
        found += [out.with_name(name) for name in names]
    return found


def _reason_to_stay(first: Path) -> str | None:
    """Return why even `--force` must not replace a file, or None if it may."""
    if first.is_symlink():
        return "is a link"
    if not first.is_file():
        return "is not a file"
    try:
        model = open_model(ModelRef(ModelPath(str(first))))
        content = gguf_record.read(model)
    except InterleaveError:
        return "is not a file that a run wrote"
    if content is None:
        return "is not a file that a run wrote"
    if not gguf_record.is_as_written(model, content):
        return "was changed since a run wrote it"
    return None


def _files_of(first: Path) -> list[Path]:
    """Return a file, or all splits of which it is the first."""
    stem = split_stem(first.name)
    if stem is None:
        return [first]
    count = int(first.stem.rpartition("-")[2])
    names = (split_name(stem, index, count) for index in range(count))
    return [path for path in map(first.with_name, names) if os.path.lexists(path)]


def staged(out: Path, write: Callable[[Path], T], *, replace: bool) -> StagedResult[T]:
    """Call a function that writes the files of a model, which then appear beside OUT.

    Args:
        out: The path of the model, without the number of a split.
        write: Called with an empty directory on the same filesystem as OUT.
        replace: Whether to replace an existing model.

    Returns:
        The return value of the function, and warnings.

    Raises:
        OutputError: OUT must not or cannot be written, or another run is writing it.
    """
    return run_staged(_FileStage(out, replace=replace), write)


_MOVED = ".moved"
"""An empty file beside old files that were all moved away, so that new ones may be at OUT."""


class _FileStage(Stage):
    """The directory beside OUT in which its files are written."""

    def __init__(self, out: Path, *, replace: bool) -> None:
        super().__init__(out, replace=replace)
        self._new: list[Path] = []
        self._placed = False

    def check_vacant(self) -> None:
        check_vacant(self.out, replace=self.replaces)
        for stray in _strays(self.out):
            raise OutputError(
                f"{stray}: already exists, without the first split",
                hint="move it away, or name another OUT",
            )

    def place(self) -> None:
        old = _present(self.out)
        if old:
            self.aside.mkdir()
            for file in old:  # the first split is the first to go
                file.rename(self.aside / file.name)
            (self.aside / _MOVED).touch()
        for name in sorted(os.listdir(self.work), key=_last_to_place):
            (self.work / name).rename(self.out.with_name(name))
            self._new.append(self.out.with_name(name))
        self._placed = True

    @property
    def is_placed(self) -> bool:
        return self._placed

    def recover(self) -> None:
        moved = self.aside / _MOVED
        if moved.exists() and not self._new and firsts(self.out):
            self.remove_aside()  # a killed run has placed the new first split, and so all of them
            return
        if not self.aside.exists() or moved.exists():
            # No old file is at OUT, so what is there is new.
            strays = _strays(self.out) if self.follows_killed else []
            for file in (*self._new, *filter(_is_ours, strays)):
                file.unlink(missing_ok=True)
        self._new.clear()
        if self.aside.exists():
            moved.unlink(missing_ok=True)  # first, since old files will be at OUT again
            for name in sorted(os.listdir(self.aside), key=_last_to_place):
                (self.aside / name).rename(self.out.with_name(name))
            self.aside.rmdir()

    def remove_aside(self) -> None:
        with suppress(OSError):
            for name in sorted(os.listdir(self.aside), key=_MOVED.__eq__):
                (self.aside / name).unlink()  # the mark is the last to go
            self.aside.rmdir()


def _present(out: Path) -> list[Path]:
    """Return all files of a model that is replaced, with its card."""
    files = [file for first in firsts(out) for file in _files_of(first)]
    card = gguf_card.path_of(out)
    return [*files, *([card] if os.path.lexists(card) else [])]


def _last_to_place(name: str) -> int:
    """Return the place of a file in the order of renaming: the first split, then the card."""
    if not name.endswith(SUFFIX):
        return 2
    return int(split_stem(name) is None or "-00001-of-" in name)


def _strays(out: Path) -> list[Path]:
    """Return the splits of OUT that exist without the first one."""
    pattern = re.compile(re.escape(out.stem) + r"-\d{5}-of-(\d{5})\.gguf")
    found = []
    with suppress(OSError):
        for name in sorted(os.listdir(out.parent)):
            match = pattern.fullmatch(name)
            first = match and out.with_name(split_name(out.stem, 0, int(match[1])))
            if first and not os.path.lexists(first):
                found.append(out.with_name(name))
    return found


def _is_ours(split: Path) -> bool:
    """Whether a run has written a split."""
    with suppress(InterleaveError):
        return FINGERPRINT in header.read(split).metadata
    return False
