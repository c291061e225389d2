"""Where the layers are among the parameters that a model has in memory. Pure.

What a class calls them is not always what its checkpoint calls them, and a trainer goes by the
former.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.errors import RefusedError


def stacks_of(names: Iterable[str], depth: int, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands before the index of a layer.

    Args:
        names: The parameters of a model as its class has them, perhaps within a wrapper.
        depth: Its number of layers.
        config: Its config.json.

    Returns:
        A stack such as `model.layers`; several, where a layer of this type stands in several.

    Raises:
        RefusedError: No stack has so many layers, or it cannot be told which one is meant.
    """
    found: dict[str, set[int]] = {}
    for stack, index in filter(None, map(place, names)):
        found.setdefault(stack, set()).add(index)
    whole = [stack for stack, indices in found.items() if indices == {*range(depth)}]
    if not whole:
        deepest = max((len(indices) for indices in found.values()), default=0)
        raise RefusedError(
            f"the model has no stack of {depth} layers, its longest has {deepest}",
            hint="is it the model that interleave.json tells of?",
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
    raise RefusedError(f"which of {', '.join(whole)} are the layers cannot be told")


def place(name: str) -> tuple[str, int] | None:
    """The stack and index that a name begins with: the first number in it is the layer's."""
    match = re.match(r"([^\d.]\w*(?:\.[^\d.]\w*)*)\.(\d+)(?:\.|$)", name)
    return (match[1], int(match[2])) if match else None


def inside(name: str) -> str:
    """What stands after the index of a layer."""
    found = place(name)
    return name[len(f"{found[0]}.{found[1]}.") :] if found else name


def within(names: Iterable[str], stacks: Collection[str], layers: Collection[int]) -> Iterator[str]:
    """The names that belong to some of the layers."""
    for name in names:
        found = place(name)
        if found is not None and found[0] in stacks and found[1] in layers:
            yield name


def check_apart(parameters: Mapping[str, object], trained: Collection[str]) -> None:
    """Check that no parameter of the new layers is one of another layer, too.

    Args:
        parameters: All of them, under each of their names.
        trained: The names of those of the new layers.

    Raises:
        RefusedError: One is: to train it would change an original.
    """
    own = {*trained}
    others = {id(parameter): name for name, parameter in parameters.items() if name not in own}
    for name in trained:
        if id(parameters[name]) in others:
            raise RefusedError(
                f"{name} and {others[id(parameters[name])]} are one and the same, so that the new "
                "layers cannot be trained alone"
            )


def _ends(stack: str, name: str) -> bool:
    return f".{stack}".endswith(f".{name}")
