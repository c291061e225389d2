"""Write a model directory atomically: it appears complete, by one rename, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mergekit_interleave import _out_files
from mergekit_interleave.errors import OutputError
from mergekit_interleave.output import card_files, verification_text, weight_sample
from mergekit_interleave.output.stage import Stage, StagedResult, check_replaceable, run_staged

T = TypeVar("T")


def check_vacant(out: Path, *, replace: bool) -> None:
    """Check that OUT may be written.

    Args:
        out: The path of the model.
        replace: Whether an existing model may be replaced.

    Raises:
        OutputError: OUT exists and must not be replaced.
    """
    if os.path.lexists(out):
        check_replaceable(out, _reason_to_stay(out), replace=replace)


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


def staged(out: Path, write: Callable[[Path], T], *, replace: bool) -> StagedResult[T]:
    """Call a function that writes into a directory, which becomes OUT when the function returns.

    Args:
        out: The path of the model.
        write: Called with an empty directory on the same filesystem as OUT.
        replace: Whether to replace an existing model.

    Returns:
        The return value of the function, and warnings.

    Raises:
        OutputError: OUT must not or cannot be written, or another run is writing it.
    """
    return run_staged(_DirectoryStage(out, replace=replace), write)


class _DirectoryStage(Stage):
    """The directory that is renamed to OUT."""

    def check_vacant(self) -> None:
        check_vacant(self.out, replace=self.replaces)

    def place(self) -> None:
        if self.out.exists():
            self.out.rename(self.aside)
        self.work.rename(self.out)

    @property
    def is_placed(self) -> bool:
        return self.has_work_at(self.out)

    def recover(self) -> None:
        if self.aside.exists():
            if self.out.exists():
                shutil.rmtree(self.aside, ignore_errors=True)
            else:
                self.aside.rename(self.out)
