"""Read the front matter of the sources' model cards, and select what a new card inherits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_interleave import _out_files
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.errors import InterleaveError
from mergekit_interleave.output import layer_map as layer_maps

CARD = _out_files.CARD

HUB = "https://huggingface.co"

INHERITED = (
    "license", "license_name", "license_link", "language", "pipeline_tag", "library_name",
)  # fmt: skip
"""The keys that a card inherits from the cards of the sources."""

_LONGEST = 2**20
"""The maximum length of a card that is read; the Hub accepts no longer front matter."""

_LICENSE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt")


def read(directory: Path, warn: Callable[[str], object]) -> Mapping[str, Any]:
    """Read the front matter of a directory's README.md; return an empty mapping if it has none.

    Args:
        directory: The model.
        warn: Called if the front matter cannot be read.
    """
    file = directory / CARD
    if not file.is_file():
        return {}
    try:
        with file.open(encoding="utf-8-sig") as opened:
            return split(opened.read(_LONGEST), str(file))[0]
    except (OSError, ValueError, InterleaveError) as error:
        reason = " ".join(str(error).removeprefix(f"{file}: ").split())[:200]
        warn(f"{file}: its license and language cannot be read: {reason}")
        return {}


def split(text: str, where: str) -> tuple[Mapping[str, Any], str]:
    """Split a card into its front matter and its text.

    Raises:
        DirectiveError: The front matter is not valid YAML.
    """
    begin, _, rest = text.partition("---\n")
    front, end, body = rest.partition("\n---")
    entries = yaml_io.read(front, where) if end and not begin.strip() else None
    return (entries, body) if isinstance(entries, dict) else ({}, text)


def inherited(
    cards: Mapping[str, Mapping[str, Any]], base: str, files: Collection[str]
) -> dict[str, Any]:
    """Return the front matter that a card inherits from the cards of the sources.

    Args:
        cards: The front matter of each source, by its public name.
        base: The source of the tokenizer, and therefore of the language.
        files: The names of the files copied from the base.
    """
    card = cards.get(base, {})
    entries = _license(cards, base, files)
    languages = list(dict.fromkeys(filter(_is_identifier, _strings(card.get("language")))))
    if languages:
        entries["language"] = languages if isinstance(card["language"], list) else languages[0]
    for key in ("pipeline_tag", "library_name"):
        if _is_identifier(card.get(key)):
            entries[key] = card[key]
    return entries


def filtered(inherited: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inherited entries of an interleave.json that are valid in a card."""
    return {key: inherited[key] for key in INHERITED if _strings(inherited.get(key))}


def _is_identifier(word: object) -> bool:
    """Return whether a value is a single word, as tags and languages are."""
    return isinstance(word, str) and re.fullmatch(r"[\w.+-]{1,80}", word, re.ASCII) is not None


def _license(
    cards: Mapping[str, Mapping[str, Any]], base: str, files: Collection[str]
) -> dict[str, Any]:
    """Return the license entries; if the licenses differ, `other`, and the card lists them all."""
    licenses = [license_of(entries) for entries in cards.values()]
    card = cards.get(base, {})
    if None in licenses or not licenses:
        return {}
    link = card.get("license_link")
    if len(set(licenses)) > 1:
        name, link = "licenses-of-the-sources", None
    else:
        stated = str(licenses[0])
        if stated in known_licenses() - {"other"}:
            return {"license": stated}
        base_name = card.get("license_name") if stated == "other" else stated
        name = _slug(base_name if isinstance(base_name, str) else f"license-of-{_slug(base)}")
    link = _link(link, base, files, alone=len(set(licenses)) == 1)
    return {"license": "other", "license_name": name, "license_link": link} if link else {}


def _link(link: object, base: str, files: Collection[str], *, alone: bool) -> str | None:
    """Return the link to a license without an identifier: to a file next to the card, or a page."""
    if isinstance(link, str) and (re.fullmatch(r"https?://[!-;=?-~]+", link) or link in files):
        return link
    file = next((name for name in _LICENSE_FILES if name in files), None) if alone else None
    return file or (f"{HUB}/{base}" if "/" in base else None)


def license_of(card: Mapping[str, Any]) -> str | None:
    """Return the license that a card states, several joined by commas; None if it states none."""
    stated = ", ".join(_strings(card.get("license")))
    known = stated.lower() in known_licenses()
    return (stated.lower() if known else layer_maps.legible(stated)[:80]) or None


@cache
def known_licenses() -> frozenset[str]:
    """Return the license identifiers that the Hub accepts."""
    file = Path(__file__).parent / "data" / "licenses.json"
    return frozenset(json.loads(file.read_text(encoding="utf-8"))["identifiers"])


def _strings(value: object) -> list[str]:
    """Return a string or a list of strings as a list; return an empty list for anything else.

    YAML reads `no`, the code for Norwegian, as false.
    """
    items: list[object] = value if isinstance(value, list) else [value]
    words = ["no" if item is False else item for item in items]
    strings = [word for word in words if isinstance(word, str) and word]
    return strings if len(strings) == len(words) else []


def _slug(name: str) -> str:
    """Turn a name into an identifier."""
    last = name.rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", last, flags=re.ASCII).strip("-")[:80].lower() or "custom"
