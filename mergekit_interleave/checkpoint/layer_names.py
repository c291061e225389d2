"""Parse the names of tensors and parameters of layers: `stack.index.rest`. Pure.

A stack is the part before the index, such as `model.layers`. A model class may use other names than
its checkpoint; trainers use the names of the class.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from mergekit_interleave.architectures import family as families
from mergekit_interleave.errors import RefusedError

_Value = TypeVar("_Value")

_INDEX = r"\.([0-9]{1,9})(?=\.|$)"


@dataclass(frozen=True)
class LayerName:
    """The parsed name of a layer, or of a tensor of a layer.

    Attributes:
        stack: The part before the index.
        index: The index.
        tail: The part after the index, including its leading dot.
    """

    stack: str
    index: int
    tail: str

    @property
    def rest(self) -> str:
        """The part after the index, without the leading dot."""
        return self.tail[1:]

    def at(self, index: int) -> str:
        """Return the same name in the layer with another index."""
        return f"{self.stack}.{index}{self.tail}"


def parse(name: str, stacks: Collection[str] | None = None) -> LayerName | None:
    """Parse a name; return None if it does not belong to a layer.

    Args:
        name: The name.
        stacks: The stacks to accept. If None, the first number in the name is the index.
    """
    match = _pattern(None if stacks is None else tuple(stacks)).match(name)
    return LayerName(match[1], int(match[2]), name[match.end() :]) if match else None


def mentions_layer(text: str, stacks: Collection[str]) -> bool:
    """Whether a text contains the name of a layer, or of a tensor of a layer."""
    return _pattern(tuple(stacks)).search(text) is not None


@cache
def _pattern(stacks: tuple[str, ...] | None) -> re.Pattern[str]:
    known = (
        r"[^\d.][\w-]*(?:\.[^\d.][\w-]*)*" if stacks is None else "|".join(map(re.escape, stacks))
    )
    return re.compile(rf"(?<![\w.])({known}){_INDEX}")


def by_stack(values: Mapping[str, _Value]) -> dict[str, dict[int, dict[str, _Value]]]:
    """Group values of tensors by stack, then by index, then by the rest of the name.

    Args:
        values: A value for each name; names outside the layers are ignored.
    """
    found: dict[str, dict[int, dict[str, _Value]]] = {}
    for name, value in values.items():
        parsed = parse(name)
        if parsed is not None and parsed.rest:
            layers = found.setdefault(parsed.stack, {})
            layers.setdefault(parsed.index, {})[parsed.rest] = value
    return found


def stacks_of(names: Iterable[str], depth: int, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Find the stacks that hold the layers of a model.

    Args:
        names: The names of the parameters in the model class, possibly inside a wrapper.
        depth: The number of layers.
        config: The config.json of the model.

    Returns:
        A stack such as `model.layers`, or several if the layers of this type are spread over them.

    Raises:
        RefusedError: No stack has this number of layers, or several have and it is unknown which
            ones are the layers.
    """
    found: dict[str, set[int]] = {}
    for parsed in filter(None, map(parse, names)):
        found.setdefault(parsed.stack, set()).add(parsed.index)
    whole = [stack for stack, indices in found.items() if indices == {*range(depth)}]
    if not whole:
        deepest = max((len(indices) for indices in found.values()), default=0)
        raise RefusedError(
            f"the model has no stack of {depth} layers; its longest stack has {deepest}",
            hint="pass the interleave.json of this model",
        )
    if len(whole) == 1:
        return tuple(whole)
    # The vision model of a composite may have the same depth and similar names.
    family = families.family_of_config(config)
    prefixes = (family.layer_prefix, *family.parallel_prefixes) if family else ()
    for known in (families.composite_layer_prefixes(), prefixes):
        named = [stack for stack in whole if any(_ends(stack, name) for name in known)]
        if named:
            return tuple(named)
    raise RefusedError(f"it is unknown which of {', '.join(whole)} are the layers")


def inside(name: str) -> str:
    """Return the name of a tensor within its layer, or the whole name if it is in no layer."""
    parsed = parse(name)
    return parsed.rest if parsed else name


def within(names: Iterable[str], stacks: Collection[str], layers: Collection[int]) -> Iterator[str]:
    """Yield the names that belong to the given layers."""
    for name in names:
        parsed = parse(name)
        if parsed is not None and parsed.stack in stacks and parsed.index in layers:
            yield name


def _ends(stack: str, name: str) -> bool:
    return f".{stack}".endswith(f".{name}")
