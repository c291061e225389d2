"""Read the files of the base that are copied to OUT: tokenizer, license, custom code, and others.

They are copied unchanged, except that the local paths that some tools store in them are removed.
`_out_files` determines which files are copied.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_interleave import _out_files
from mergekit_interleave._files import SUFFIXES
from mergekit_interleave._units import amount
from mergekit_interleave.checkpoint.checkpoint import (
    Checkpoint,
    is_checkpoint,
)
from mergekit_interleave.checkpoint.hub import is_hub_id
from mergekit_interleave.checkpoint.safetensors_header import to_json
from mergekit_interleave.errors import CheckpointError, Warn

TOKENIZER_FILES = _out_files.patterns(lambda row: row.tokenizer)


_MAX_SIZE = 256 * 2**20

NAME_KEYS = ("name_or_path", "_name_or_path")
"""Keys under which tools store the name or path that a config or tokenizer was loaded from."""


def collect(
    base: Checkpoint, *, without: Sequence[str] = (), warn: Warn
) -> Iterator[tuple[str, Path]]:
    """Find the files of a base that are copied.

    Args:
        base: The checkpoint.
        without: Names of files to leave out.
        warn: Called with each warning.

    Yields:
        The path relative to the base, with forward slashes, and the file.

    Raises:
        CheckpointError: A directory cannot be read.
    """

    def unreadable(error: OSError) -> None:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from error

    for folder, folders, files in os.walk(base.path, onerror=unreadable):
        below = Path(folder).relative_to(base.path)
        folders[:] = sorted(
            name
            for name in folders
            if _out_files.is_copied((below / name / "x").as_posix())
            and not _is_apart(Path(folder, name))
        )
        for name in sorted(files):
            file, relative = Path(folder, name), (below / name).as_posix()
            if relative in without or not _out_files.is_copied(relative) or not file.is_file():
                continue
            if file.stat().st_size > _MAX_SIZE:
                warn(f"{relative} is not copied: it is too large (limit {amount(_MAX_SIZE)})")
            else:
                yield relative, file


def read(name: str, file: Path, base: Checkpoint, warn: Warn) -> bytes | None:
    """Read a file that is copied, and remove local paths from it.

    Args:
        name: Its path relative to the base, with forward slashes.
        file: The file.
        base: The checkpoint.
        warn: Called with each warning.

    Returns:
        The content, or None if a local path cannot be removed, for example from a recipe that
        names its model by its path.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from error
    if _out_files.states_path(name):
        content = _without_paths(content)
    # The model does not work without these files, so they are copied even with a local path.
    needed = name in TOKENIZER_FILES or file.suffix == ".py"
    if base.is_local and not needed and any(place.search(content) for place in _places(base)):
        warn(f"{name} is not copied: it contains the path of a local directory")
        return None
    return content


def parsed(content: bytes) -> dict[str, Any] | None:
    """Parse a file as a JSON object, or return None if it is not one.

    Raises:
        CheckpointError: The content is nested too deeply.
    """
    document = parsed_document(content)
    return document if isinstance(document, dict) else None


def parsed_document(content: bytes) -> object:
    """Parse a file as JSON, or return None if it is not JSON.

    Raises:
        CheckpointError: The content is nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise CheckpointError("a JSON file is nested too deeply") from error
    except ValueError:
        return None


def without_local_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object without the keys that name a local directory or file."""
    return {
        key: without_local_names(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not (key in NAME_KEYS and value != "" and not is_hub_id(str(value)))
        and not (key.endswith(("_file", "_dir")) and str(value).startswith("/"))
    }


def _without_paths(content: bytes) -> bytes:
    document = parsed(content)
    if document is None:
        return content
    cleaned = without_local_names(document)
    return content if cleaned == document else to_json(cleaned).encode()


def _places(base: Checkpoint) -> list[re.Pattern[bytes]]:
    """Return patterns that find the path of the base in the content of its files."""
    places = {os.fsencode(base.path.absolute()), os.fsencode(base.path.resolve())}
    return [
        re.compile(re.escape(place) + rb"(?![\w.-])")
        for place in places
        if place.count(b"/") > 1  # a path such as `/model` may also be an ordinary word
    ]


def _is_apart(folder: Path) -> bool:
    """Whether a folder in a checkpoint is not part of it: a link, a model or a staging folder."""
    return (
        folder.is_symlink()
        or (is_checkpoint(folder) and any(folder.glob("*.safetensors")))
        or folder.name.endswith(SUFFIXES)
    )
