"""Write README.md and layers.svg, and detect whether they were edited.

interleave.json records the SHA-256 digest of each generated file. A file with another digest was
edited or written by another tool, and only `--force` replaces it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mergekit_interleave._files import replace_file
from mergekit_interleave.checkpoint.checkpoint import MAX_CONFIG
from mergekit_interleave.errors import OutputError
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.output import model_card
from mergekit_interleave.output.card_data import CardData, card_data

FILES = (model_card.FILE, model_card.PICTURE)

KEY = "generated"
"""The key of interleave.json that contains the digests, by file name."""


def generate(data: CardData) -> dict[str, str]:
    """Generate the text of each file, by its name."""
    return {model_card.FILE: model_card.render(data), model_card.PICTURE: model_card.picture(data)}


def write(
    directory: Path,
    content: Mapping[str, Any],
    layout: Layout,
    *,
    name: str | None = None,
    files: Collection[str] = FILES,
) -> tuple[CardData, dict[str, Any]]:
    """Generate and write the files.

    Args:
        directory: The model, with its config.json and recipe.
        content: The content of its interleave.json.
        layout: Its layers.
        name: The name that the directory will have, if it is not complete yet.
        files: The files to write.

    Returns:
        The data of the card, and the content with the digests of the files.

    Raises:
        CheckpointError: The content is malformed.
        OutputError: A file cannot be written.
    """
    name = name or directory.resolve().name or "model"
    data = card_data(directory, name, content, layout)
    texts = {name: text for name, text in generate(data).items() if name in files}
    for file, text in texts.items():
        replace_file(directory / file, text)
    return data, {**content, KEY: {**recorded(content), **digests(texts)}}


def digests(texts: Mapping[str, str]) -> dict[str, str]:
    """Return what interleave.json records about generated files: their digests by name."""
    return {name: _digest(text) for name, text in texts.items()}


def recorded(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the digests in interleave.json, by file name."""
    entry = content.get(KEY)
    return entry if isinstance(entry, dict) else {}


def is_generated(file: Path, content: Mapping[str, Any]) -> bool:
    """Return whether a file exists and is unchanged since it was generated.

    Args:
        file: README.md or layers.svg.
        content: The content of interleave.json.
    """
    if file.is_symlink() or not file.is_file() or file.stat().st_size > MAX_CONFIG:
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    expected: object = recorded(content).get(file.name, _digest_of_0_1(text))
    return _digest(text) == expected


def edited(directory: Path, content: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the files that exist and are not as they were generated.

    Release 0.1 recorded no digest of the picture, and replaced it together with the card.

    Args:
        directory: The model.
        content: The content of its interleave.json; empty if it has none.
    """
    known = {name for name in FILES if name in recorded(content) or name == model_card.FILE}
    return frozenset(
        name
        for name in known
        if (directory / name).exists() and not is_generated(directory / name, content)
    )


def check_replaceable(directory: Path, content: Mapping[str, Any], *, force: bool) -> None:
    """Check that the files may be generated again.

    Args:
        directory: The model.
        content: The content of its interleave.json; empty if it has none.
        force: Whether to replace edited files.

    Raises:
        OutputError: One of them must not be replaced.
    """
    for name in FILES:
        file = directory / name
        if file.is_symlink():
            hint = "copy the model to another directory"
            raise OutputError(f"{file}: is a link, perhaps into the Hub's cache", hint=hint)
        if file.exists() and not file.is_file():
            raise OutputError(f"{file}: is not a regular file")
        if not force and name in edited(directory, content):
            reason = (
                "was edited, or another tool wrote it"
                if content
                else "exists, and no interleave.json records that it was generated"
            )
            raise OutputError(f"{file}: {reason}", hint="--force replaces it")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of_0_1(text: str) -> str | None:
    """Return the digest of a card that release 0.1 wrote, or None for any other card.

    The last line of such a card states the digest of the lines before it.
    """
    before, _, stated = text.rpartition("<!-- as mk-interleave wrote it: ")
    return _digest(text) if stated.strip() == f"{_digest(before)[:16]} -->" else None
