"""The small files of a base that every copy of it carries: tokenizer, license, custom code, ...

They are copied as they are, but for the names of directories of this machine, which some tools
leave in them.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_interleave._files import SUFFIXES
from mergekit_interleave.checkpoint.checkpoint import (
    CONFIG,
    WEIGHT_PATTERNS,
    Checkpoint,
    is_checkpoint,
)
from mergekit_interleave.checkpoint.hub import is_hub_id
from mergekit_interleave.checkpoint.safetensors_header import to_json
from mergekit_interleave.errors import CheckpointError

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

# Names without a star are those of the top directory alone.
_LEFT = (
    *WEIGHT_PATTERNS,
    "*.safetensors.index.json",
    "*.bin.index.json",
    CONFIG,
    "README.md",
    "layers.svg",
    "params.json",
    "trainer_state.json",
    "interleave.json",
    "interleave.yml",
    "mergekit_config.yml",
    ".git",
    ".git/*",
    ".cache/*",
)

_MAX_SIZE = 256 * 2**20

NAME_KEYS = ("name_or_path", "_name_or_path")
"""Keys under which older tools wrote what a config or tokenizer was loaded from."""


def collect(base: Checkpoint, *, without: Sequence[str] = ()) -> Iterator[tuple[str, Path]]:
    """The files of a base to carry along.

    Args:
        base: The checkpoint.
        without: Names to leave.

    Yields:
        The path below the base with forward slashes, and the file.
    """

    def unreadable(error: OSError) -> None:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from error

    for folder, folders, files in os.walk(base.path, onerror=unreadable):
        below = Path(folder).relative_to(base.path)
        folders[:] = sorted(
            name
            for name in folders
            if not _is_left((below / name / "x").as_posix()) and not _is_apart(Path(folder, name))
        )
        for name in sorted(files):
            file, relative = Path(folder, name), (below / name).as_posix()
            if relative in without or _is_left(relative) or not file.is_file():
                continue
            if file.stat().st_size > _MAX_SIZE:
                log.warning("%s is not copied: it is larger than any file a model needs", relative)
            else:
                yield relative, file


def read(name: str, file: Path, base: Checkpoint) -> bytes | None:
    """What a file holds, without the directories of this machine.

    Returns:
        None where it cannot be had without them: a recipe that names its model by its path.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from error
    if name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        content = _without_paths(content)
    # Not so for what a model cannot work without.
    needed = name in TOKENIZER_FILES or file.suffix == ".py"
    if base.is_local and not needed and any(place.search(content) for place in _places(base)):
        log.warning("%s is not copied: it names a directory of this machine", name)
        return None
    return content


def parsed(content: bytes) -> dict[str, Any] | None:
    """A file as a JSON object; None where it is none, which is nothing to this project.

    Raises:
        CheckpointError: It is nested more deeply than any that is right.
    """
    try:
        document = json.loads(content)
    except RecursionError as error:
        raise CheckpointError("a JSON file is nested too deeply") from error
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def without_local_names(config: dict[str, Any]) -> dict[str, Any]:
    """A JSON object without the keys that say from which directory or file it was loaded."""
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
    mended = without_local_names(document)
    if mended == document:
        return content
    return to_json(mended).encode()


def _places(base: Checkpoint) -> list[re.Pattern[bytes]]:
    """The base's own directory, as other files beside it may name it."""
    places = {os.fsencode(base.path.absolute()), os.fsencode(base.path.resolve())}
    return [
        re.compile(re.escape(place) + rb"(?![\w.-])")
        for place in places
        if place.count(b"/") > 1  # `/model` may be any word
    ]


def _is_apart(folder: Path) -> bool:
    """Whether a folder below a checkpoint is none of its own: a link, a model, a run's staging."""
    return (
        folder.is_symlink()
        or (is_checkpoint(folder) and any(folder.glob("*.safetensors")))
        or folder.name.endswith(SUFFIXES)
    )


def _is_left(relative: str) -> bool:
    name = relative.rsplit("/", 1)[-1]
    return any(
        fnmatch.fnmatchcase(name if p.startswith("*") else relative, p) for p in _LEFT
    ) or fnmatch.fnmatchcase(name, "consolidated.*")
