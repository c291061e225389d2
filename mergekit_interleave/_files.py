"""File operations that several packages need."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path

from mergekit_interleave._interrupts import uninterrupted
from mergekit_interleave.errors import DirectiveError, OutputError

SUFFIXES = (".mk-interleave", ".replaced")
"""The suffixes of the hidden directories that a run creates next to OUT."""


def read_text(file: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark; lines end with LF.

    Raises:
        DirectiveError: The file cannot be read, or is not UTF-8.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DirectiveError(f"{file}, line {line}: not UTF-8 text") from error
    except (OSError, ValueError) as error:  # ValueError: the path has a null character
        reason = getattr(error, "strerror", None) or "not a path"
        raise DirectiveError(f"{file}: {reason[0].lower()}{reason[1:]}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(file: Path, text: str) -> None:
    """Replace a file's content atomically: the old file stays until the new one is complete.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        uninterrupted(partial(_replace, file, text))
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror or error}") from error


def _replace(file: Path, text: str) -> None:
    # The name must not be predictable: somebody could have put a link there.
    import tempfile  # noqa: PLC0415 - not needed by `gen`

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
    """Return the mode of a file or, if the file does not exist, the mode that it would get."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(file.stat().st_mode)
    return new_file_mode()


def new_file_mode() -> int:
    """Return the mode that the umask gives to a new file.

    The umask can be read only by setting it, so call this only where no interrupt can occur.
    """
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
