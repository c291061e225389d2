"""The front matter of model cards: what the bases' own say, what of it passes on, what is valid.

The Hub checks a card when it is pushed. Here it is checked before, without a network.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint import hub
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.errors import InterleaveError
from mergekit_interleave.output import layer_map as layer_maps

log = logging.getLogger(__name__)

CARD = "README.md"

HUB = "https://huggingface.co"

RELATIONS = ("adapter", "merge", "quantized", "finetune")

_LONGEST = 2**20
"""Characters of a card that are looked at: the Hub itself takes no longer front matter."""

_LICENSE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt")


def read(directory: Path) -> Mapping[str, Any]:
    """The front matter of a directory's README.md; empty where there is none that can be read."""
    file = directory / CARD
    if not file.is_file():
        return {}
    try:
        with file.open(encoding="utf-8-sig") as opened:
            return split(opened.read(_LONGEST), str(file))[0]
    except (OSError, ValueError, InterleaveError) as error:
        reason = " ".join(str(error).removeprefix(f"{file}: ").split())[:200]
        log.warning("%s: no license or language passes on from it: %s", file, reason)
        return {}


def split(text: str, where: str) -> tuple[Mapping[str, Any], str]:
    """The front matter of a card, and the rest of it.

    Raises:
        DirectiveError: It is no YAML.
    """
    begin, _, rest = text.partition("---\n")
    front, end, body = rest.partition("\n---")
    found = yaml_io.read(front, where) if end and not begin.strip() else None
    return (found, body) if isinstance(found, dict) else ({}, text)


def inherited(
    cards: Mapping[str, Mapping[str, Any]], base: str, files: Collection[str]
) -> dict[str, Any]:
    """What passes on to a model that is made of others, as far as their cards say it.

    Args:
        cards: The front matter of each source, by what it is called.
        base: The one whose tokenizer and language it has.
        files: The names of the files that it has from there.
    """
    own = cards.get(base, {})
    found = _license(cards, base, files)
    languages = list(dict.fromkeys(filter(_is_identifier, _words(own.get("language")))))
    if languages:
        found["language"] = languages if isinstance(own["language"], list) else languages[0]
    for key in ("pipeline_tag", "library_name"):
        if _is_identifier(own.get(key)):
            found[key] = own[key]
    return found


def _is_identifier(word: object) -> bool:
    """Whether it is one word, as tags and languages are."""
    return isinstance(word, str) and re.fullmatch(r"[\w.+-]{1,80}", word, re.ASCII) is not None


def _license(
    cards: Mapping[str, Mapping[str, Any]], base: str, files: Collection[str]
) -> dict[str, Any]:
    """The license of all sources; where they differ, `other`, and the card lists them."""
    licenses = [license_of(card) for card in cards.values()]
    own = cards.get(base, {})
    if None in licenses or not licenses:
        return {}
    link = own.get("license_link")
    if len(set(licenses)) > 1:
        name, link = "licenses-of-the-sources", None
    else:
        stated = str(licenses[0])
        if stated in known_licenses() - {"other"}:
            return {"license": stated}
        own_name = own.get("license_name") if stated == "other" else stated
        name = _slug(own_name if isinstance(own_name, str) else f"license-of-{_slug(base)}")
    link = _link(link, base, files, alone=len(set(licenses)) == 1)
    return {"license": "other", "license_name": name, "license_link": link} if link else {}


def _link(link: object, base: str, files: Collection[str], *, alone: bool) -> str | None:
    """Where a license that has no identifier is to be read: a file beside the card, or a page."""
    if isinstance(link, str) and (re.fullmatch(r"https?://[!-;=?-~]+", link) or link in files):
        return link
    own = next((name for name in _LICENSE_FILES if name in files), None) if alone else None
    return own or (f"{HUB}/{base}" if "/" in base else None)


def license_of(card: Mapping[str, Any]) -> str | None:
    """The license that a card states, if it states one; of several, all in one line."""
    stated = ", ".join(_words(card.get("license")))
    known = stated.lower() in known_licenses()
    return (stated.lower() if known else layer_maps.legible(stated)[:80]) or None


@cache
def known_licenses() -> frozenset[str]:
    """The identifiers that the Hub knows."""
    file = Path(__file__).parent / "data" / "licenses.json"
    return frozenset(json.loads(file.read_text(encoding="utf-8"))["identifiers"])


def _words(said: object) -> list[str]:
    """Some words, one or a list; none where it is anything else. YAML takes Norwegian for a no."""
    items: list[object] = said if isinstance(said, list) else [said]
    words = ["no" if item is False else item for item in items]
    found = [word for word in words if isinstance(word, str) and word]
    return found if len(found) == len(words) else []


def _slug(name: str) -> str:
    """A name as an identifier."""
    last = name.rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", last, flags=re.ASCII).strip("-")[:80].lower() or "custom"


def problems(text: str, directory: Path) -> Iterator[str]:
    """What is wrong with a card, as far as can be told without a network.

    Args:
        text: The card.
        directory: Where it is to stand.
    """
    try:
        front, body = split(text, CARD)
    except InterleaveError as error:
        yield str(error)
        return
    if not front:
        yield "there is no front matter"
        return
    yield from _problems(front, directory)
    for path in dict.fromkeys(_PATHS.findall(text)):
        yield f"it names a directory: {path}"
    if "Untitled" in body or not re.search(r"^# \S", body, re.MULTILINE):
        yield "it has no title"
    for link in re.findall(r"\]\(([^)\s]+)\)", body):
        if "://" not in link and not link.startswith("#") and not (directory / link).exists():
            yield f"it leads to {link}, which is not there"


_PATHS = re.compile(r"(?<![\w:/.~%-])(?:/(?:[\w.+-]+/)+[\w.+-]+|[A-Za-z]:\\[^\s`\"']+)")
"""Absolute paths of this or another kind of system."""


def _problems(front: Mapping[str, Any], directory: Path) -> Iterator[str]:
    yield from _of_lineage(front)
    yield from _of_license(front, directory)
    if not isinstance(front.get("tags"), list) or not _words(front["tags"]):
        yield "tags: there are none"
    for key in ("pipeline_tag", "library_name"):
        if key in front and not _is_identifier(front[key]):
            yield f"{key}: is no word"
    languages = _words(front.get("language", "en"))
    if not languages or not all(map(_is_identifier, languages)):
        yield "language: is no word"


def _of_lineage(front: Mapping[str, Any]) -> Iterator[str]:
    stated = front.get("base_model", [])
    models = stated if isinstance(stated, list) else [stated]
    for model in models:
        if not isinstance(model, str) or not hub.is_hub_id(model):
            yield f"base_model: {model!r} is no Hub id"
    if len(set(map(str, models))) < len(models):
        yield "base_model: one is listed twice"
    if front.get("base_model_relation") not in RELATIONS:
        yield f"base_model_relation: none of {', '.join(RELATIONS)}"


def _of_license(front: Mapping[str, Any], directory: Path) -> Iterator[str]:
    stated = front.get("license")
    if stated is not None and stated not in known_licenses():
        yield f"license: the Hub does not know {stated!r}"
    if stated == "other":
        for key in ("license_name", "license_link"):
            if not front.get(key):
                yield f"{key}: is missing"
    link = str(front.get("license_link") or "")
    if link and "://" not in link and not (directory / link).exists():
        yield f"license_link: there is no {link}"
