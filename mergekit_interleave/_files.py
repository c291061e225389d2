"""Small operations on files that every package needs."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path

from mergekit_interleave._interrupts import uninterrupted
from mergekit_interleave.errors import OutputError

SUFFIXES = (".mk-interleave", ".replaced")
"""The suffixes of the hidden directories that a run keeps beside OUT."""


def sync(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(file: Path, text: str) -> None:
    """Replace a file's content; the old file stays whole until the new one is.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        uninterrupted(partial(_replace, file, text))
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror or error}") from error


def _replace(file: Path, text: str) -> None:
    # A name that nobody can guess: at a name that can be guessed, a link may wait.
    import tempfile  # noqa: PLC0415 - `gen` writes no file

    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    work = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(text)
        work.chmod(_mode_of(file))
        work.replace(file)
    except BaseException:
        work.unlink(missing_ok=True)
        raise


def _mode_of(file: Path) -> int:
    """The mode of a file; if there is none, the mode that the umask gives to a new file."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(file.stat().st_mode)
    return new_file_mode()


def new_file_mode() -> int:
    """The mode that the umask gives to a new file.

    The umask can only be read by setting it: call this where no interrupt can come in between.
    """
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
