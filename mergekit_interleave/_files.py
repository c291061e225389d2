"""Small operations on files that every package needs."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from mergekit_interleave.errors import OutputError

SUFFIXES = (".mk-interleave", ".replaced")
"""How the hidden directories end that a run keeps beside OUT."""


def sync(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(file: Path, text: str) -> None:
    """Write a file anew; the old one stays whole until the new one is.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        # A name that none can guess: what stands under one that they can may be a link.
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
    except OSError as error:
        raise OutputError(f"{file}: cannot be written: {error.strerror or error}") from error


def _mode_of(file: Path) -> int:
    """The mode of a file; of one that is not there, what the umask asks for."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(file.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
