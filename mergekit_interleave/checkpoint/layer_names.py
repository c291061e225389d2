"""Parse the names of tensors and parameters of layers: `stack.index.rest`. Pure.

A stack is what comes before the index, such as `model.layers`. A class may name its parameters
otherwise than its checkpoint does; trainers go by the names of the class.
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
    """The name of a layer, or of a tensor of one.

    Attributes:
        stack: What comes before the index.
        index: The index.
        tail: What comes after it, its dot included.
    """

    stack: str
    index: int
    tail: str

    @property
    def rest(self) -> str:
        """What comes after the index, without its dot."""
        return self.tail[1:]

    def at(self, index: int) -> str:
        """The same name in the layer of another index."""
        return f"{self.stack}.{index}{self.tail}"


def parse(name: str, stacks: Collection[str] | None = None) -> LayerName | None:
    """Parse a name; None where it names no layer.

    Args:
        name: The name.
        stacks: The stacks that it may be in. Where they are not known, the first number in the name
            is the index.
    """
    match = _pattern(None if stacks is None else tuple(stacks)).match(name)
    return LayerName(match[1], int(match[2]), name[match.end() :]) if match else None


def mentions_layer(text: str, stacks: Collection[str]) -> bool:
    """Whether a text contains the name of a layer, or of a tensor of one."""
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
        values: A value for each name; those that name no tensor of a layer are left out.
    """
    found: dict[str, dict[int, dict[str, _Value]]] = {}
    for name, value in values.items():
        parsed = parse(name)
        if parsed is not None and parsed.rest:
            layers = found.setdefault(parsed.stack, {})
            layers.setdefault(parsed.index, {})[parsed.rest] = value
    return found


def stacks_of(names: Iterable[str], depth: int, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The stacks of the layers of a model.

    Args:
        names: The parameters of a model as its class has them, perhaps within a wrapper.
        depth: Its number of layers.
        config: Its config.json.

    Returns:
        A stack such as `model.layers`; several, where a layer of this type has parts in several.

    Raises:
        RefusedError: No stack has so many layers, or which one is meant is not known.
    """
    found: dict[str, set[int]] = {}
    for parsed in filter(None, map(parse, names)):
        found.setdefault(parsed.stack, set()).add(parsed.index)
    whole = [stack for stack, indices in found.items() if indices == {*range(depth)}]
    if not whole:
        deepest = max((len(indices) for indices in found.values()), default=0)
        raise RefusedError(
            f"the model has no stack of {depth} layers, its longest has {deepest}",
            hint="is it the model that interleave.json describes?",
        )
    if len(whole) == 1:
        return tuple(whole)
    # A model of images beside it may be as deep, and its names may end alike.
    family = families.family_of_config(config)
    own = (family.layer_prefix, *family.parallel_prefixes) if family else ()
    for known in (families.composite_layer_prefixes(), own):
        named = [stack for stack in whole if any(_ends(stack, name) for name in known)]
        if named:
            return tuple(named)
    raise RefusedError(f"which of {', '.join(whole)} are the layers is not known")


def inside(name: str) -> str:
    """The name of a tensor within its layer; the whole name where it belongs to none."""
    parsed = parse(name)
    return parsed.rest if parsed else name


def within(names: Iterable[str], stacks: Collection[str], layers: Collection[int]) -> Iterator[str]:
    """The names that belong to some of the layers."""
    for name in names:
        parsed = parse(name)
        if parsed is not None and parsed.stack in stacks and parsed.index in layers:
            yield name


def check_apart(parameters: Mapping[str, object], trained: Collection[str]) -> None:
    """Check that no parameter of the new layers is shared with another layer.

    Args:
        parameters: All of them, under each of their names.
        trained: The names of those of the new layers.

    Raises:
        RefusedError: One is shared: to train it would change an original.
    """
    own = {*trained}
    others = {id(parameter): name for name, parameter in parameters.items() if name not in own}
    for name in trained:
        if id(parameters[name]) in others:
            raise RefusedError(
                f"{name} and {others[id(parameters[name])]} are one and the same, so the new "
                "layers cannot be trained alone"
            )


def _ends(stack: str, name: str) -> bool:
    return f".{stack}".endswith(f".{name}")
