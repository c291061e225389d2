"""Re-index the layers that a JSON file names, whoever wrote it, and find what cannot be re-indexed.

Pure. Quantizers and other tools name layers and modules in keys, in lists and in text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.errors import RefusedError


@dataclass(frozen=True)
class Move:
    """How the layers of a model move into the result.

    Attributes:
        sources: The source index of each layer of the result.
        depth: The number of layers of the source model.
        stacks: The possible prefixes of a layer index; names may omit their first parts.
    """

    sources: Sequence[int]
    depth: int
    stacks: Collection[str]

    def to(self, index: int) -> list[int]:
        """Return the indices in the result of a layer of the source model."""
        if index >= self.depth:  # a multi-token prediction head follows the last layer
            return [index - self.depth + len(self.sources)]
        return [new for new, source in enumerate(self.sources) if source == index]

    def of(self, name: str) -> layer_names.LayerName | None:
        """Parse a name, or return None if it does not belong to one of the moved layers."""
        parsed = layer_names.parse(name)
        known = parsed is not None and any(
            f".{stack}".endswith(f".{parsed.stack}") for stack in self.stacks
        )
        return parsed if known else None


def reindexed(value: Any, move: Move, place: str = "") -> Any:
    """Return a JSON value with the layer indices in all names updated.

    A key or an entry of a list that belongs to a layer is repeated for each copy of the layer.

    Args:
        value: The value.
        move: How the layers move.
        place: The keys that lead to the value, joined with dots, for errors.

    Raises:
        RefusedError: It is unknown which layers a name means, or the text has room for one name
            only.
    """
    if isinstance(value, Mapping):
        return {
            name: reindexed(entry, move, _below(place, key))
            for key, entry in value.items()
            for name in _names(str(key), move, place or str(key))
        }
    if isinstance(value, list):
        entries: list[Any] = []
        for entry in value:
            if isinstance(entry, str):
                entries += _names(entry, move, place)
            else:
                entries.append(reindexed(entry, move, place))
        return entries
    if isinstance(value, str):
        names = _names(value, move, place)
        if len(names) != 1:
            raise RefusedError(
                f"{place} is {value!r:.100}, and {len(names)} layers of the result have this source"
            )
        return names[0]
    return value


_PATTERN = re.compile(r"(?!<)(re:|\S*[*?\\\[\](){}|^$])\S*")
"""Matches a text that is a pattern for names: neither prose, which has spaces, nor a token."""


def _names(name: str, move: Move, place: str) -> list[str]:
    """Return the names in the result of what a text names; the text itself if it is no name."""
    if _PATTERN.fullmatch(name):
        if re.search(r"\d", name):
            raise RefusedError(
                f"{place}: the pattern {name!r:.100} may match only some layers, and cannot be "
                "re-indexed"
            )
        return [name]
    parsed = move.of(name)
    if parsed is not None:
        return [parsed.at(index) for index in move.to(parsed.index)]
    if any(move.of(word) for word in re.split(r"[^\w.-]+", name)):
        raise RefusedError(
            f"{place}: {name!r:.100} names a layer within a text, and cannot be re-indexed"
        )
    return [name]


def check_understood(value: Any, depth: int, known: Collection[str]) -> None:
    """Check that no list or map may hold one entry per layer, apart from the known ones.

    A nested config of another model is skipped, and so is a list of module names, which are
    re-indexed.

    Args:
        value: A JSON value of the source model.
        depth: The number of layers of the source model.
        known: The keys whose values are not per layer, or are updated elsewhere.

    Raises:
        RefusedError: A list or map has as many entries as the model has layers.
    """
    for place in _per_layer(value, depth, known, ""):
        raise RefusedError(
            f"{place} has {depth} entries, as many as the model has layers, and it is unknown "
            "whether it has one entry per layer",
            hint=f"remove {place} from the file if the model does not need it",
        )


_NUMBERED = re.compile(r"\D*\d+")
"""Matches a key that may mean a layer, such as `3` or `layer_3`."""


def _per_layer(value: Any, depth: int, known: Collection[str], place: str) -> Iterator[str]:
    """Yield the places of lists and maps with as many entries as the source model has layers."""
    if isinstance(value, Mapping):
        if place and len(value) == depth and all(map(_NUMBERED.fullmatch, map(str, value))):
            yield place
        for key, entry in value.items():
            if key not in known and not (isinstance(entry, Mapping) and "model_type" in entry):
                yield from _per_layer(entry, depth, known, _below(place, key))
    elif isinstance(value, list):
        if len(value) == depth and not any(isinstance(e, str) and "." in e for e in value):
            yield place or "the list"
        for entry in value:
            if isinstance(entry, Mapping | list):
                yield from _per_layer(entry, depth, known, place)


def _below(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)
