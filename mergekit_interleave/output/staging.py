"""OUT appears whole, by one rename, or not at all.

Everything is written into a directory beside OUT that holds a lock while its run lives. A run
that was killed leaves that directory without a lock, and the next run clears it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mergekit_interleave._files import SUFFIXES, sync
from mergekit_interleave.errors import OutputError

log = logging.getLogger(__name__)

if sys.platform != "win32":
    import fcntl


_MANIFEST = "interleave.json"


def check_vacant(out: Path, *, replace: bool) -> None:
    """Check that OUT may be written.

    Args:
        out: Where the model is to appear.
        replace: Whether a model that stands there may be replaced.

    Raises:
        OutputError: Something stands there that must stay.
    """
    if not os.path.lexists(out):
        return
    reason = _reason_to_stay(out)
    if not replace:
        hint = "name another OUT, or --force to replace" if reason is None else "name another OUT"
        raise OutputError(f"{out}: exists already", hint=hint)
    if reason is not None:
        raise OutputError(
            f"{out}: {reason}, and is not replaced", hint="move it away, or name another OUT"
        )


def _reason_to_stay(out: Path) -> str | None:
    """Why not even --force replaces what stands there, if it does not."""
    if out.is_symlink() or not out.is_dir():
        return "is no directory"
    try:
        own = _own_files(out)
        strange = [name for name in files_below(out) if name not in own]
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror or error}") from error
    return f"holds {strange[0]}, which no run has written" if strange else None


def files_below(folder: Path) -> list[str]:
    """All files below a directory, with forward slashes, in order."""
    return sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()
    )


def _own_files(out: Path) -> set[str]:
    """What a directory may hold and still be replaced: the files that its manifest lists.

    Where there is none, a model's usual files.
    """
    with suppress(FileNotFoundError, ValueError, AttributeError, TypeError):
        return set(json.loads((out / _MANIFEST).read_text(encoding="utf-8")).get("files"))
    if not (out / "config.json").is_file():
        return set()
    return {*_USUAL_FILES, *(file.name for file in out.glob("model*.safetensors"))}


_USUAL_FILES = (
    "README.md", "LICENSE", ".gitattributes", "mergekit_config.yml", "config.json",
    "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@contextmanager
def staged(out: Path, *, replace: bool) -> Iterator[Path]:
    """A directory to write into, which becomes OUT when the block ends without an error.

    Args:
        out: Where the model is to appear.
        replace: Whether a model that stands there is replaced.

    Yields:
        An empty directory on the same filesystem as OUT.

    Raises:
        OutputError: OUT may not or cannot be written, or another run is writing it.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow OUT if it is a link
    work, aside = (out.with_name(f".{out.name}{suffix}") for suffix in SUFFIXES)
    made: list[Path] = []
    try:
        made = _make_parents(out.parent)
        lock = _claim(work, out)
    except OSError as error:
        _remove_empty(made)
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}") from error
    try:
        _recover(out, aside)
        check_vacant(out, replace=replace)
        try:
            yield work
            _settle(work)
            check_vacant(out, replace=replace)  # again: others may have made it meanwhile
            if out.exists():
                out.rename(aside)
            work.rename(out)
        except OSError as error:
            raise OutputError(f"{out}: cannot be written: {error.strerror or error}") from error
    except BaseException:
        with _undisturbed():
            _recover(out, aside)
            shutil.rmtree(work, ignore_errors=True)
            _remove_empty(made)
        raise
    finally:
        os.close(lock)
    with suppress(OSError):  # the model is there; only where the power fails now, it may not be
        sync(out.parent)
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        log.warning("what %s held before could not be removed; it is at %s", out, aside)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Take no signals: a second Ctrl-C must not leave gigabytes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), signal.SIG_IGN) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            # None: one that Python knows nothing of.
            signal.signal(getattr(signal, name), handler or signal.SIG_DFL)


def _claim(work: Path, out: Path) -> int:
    """Make the directory, or take over what a dead run left; returns its locked descriptor."""
    while True:
        work.mkdir(exist_ok=True)
        descriptor = os.open(work, os.O_RDONLY)
        if sys.platform != "win32":
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise OutputError(f"{out}: another run is writing it") from error
        # Between opening and locking it, its run may have ended and renamed or removed it.
        if work.exists() and work.stat().st_ino == os.fstat(descriptor).st_ino:
            for entry in work.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            return descriptor
        os.close(descriptor)


def _settle(work: Path) -> None:
    """Give all files the modes the user's umask asks for, and wait until they are on disk.

    safetensors makes its files readable to their owner alone, whatever the umask says.
    """
    umask = os.umask(0)
    os.umask(umask)
    for folder, _, files in os.walk(work, topdown=False):
        for name in files:
            file = Path(folder, name)
            file.chmod(0o666 & ~umask)
            sync(file)
        sync(Path(folder))


def _recover(out: Path, aside: Path) -> None:
    """Put back what was moved aside by a run that ended before its own model was in place."""
    if aside.exists():
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(out)


def _make_parents(parent: Path) -> list[Path]:
    """Make the missing parents; returns those made, the innermost first."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    ground = next(path for path in (parent, *parent.parents) if path.exists())
    if not ground.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{ground} is not a directory")
    parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(made: list[Path]) -> None:
    with suppress(OSError):
        for path in made:
            path.rmdir()
