"""Name the role of each layer of a layout, and find its seams. Pure.

Every command, the picture and the model card use these words.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise

from mergekit_interleave.layout.layout import Layer, Layout

ORIGINAL, MOVED, SCALED, COPY, ZEROED = ROLES = ("original", "moved", "scaled", "copy", "zeroed")
"""The roles: an unchanged original in its order; an unchanged original in another order; a layer
that is no copy and has factors; a copy of a layer that occurs elsewhere, with or without factors; a
new layer that passes its input on unchanged."""


def roles(layout: Layout, identities: Collection[int] = ()) -> list[str]:
    """Return the role of each layer.

    Args:
        layout: The layers.
        identities: The indices of the new layers that pass their input on unchanged.
    """
    zeroed, moved = frozenset(identities), _moved(layout)

    def role(layer: Layer) -> str:
        if layer.index in zeroed:
            return ZEROED
        if layer.is_copy or layer.was_new:
            return COPY
        if not layer.is_plain:
            return SCALED
        return MOVED if layer.index in moved else ORIGINAL

    return [role(layer) for layer in layout.layers]


def with_role(layout: Layout, role: str, identities: Collection[int] = ()) -> list[int]:
    """Return the indices of the layers of a role."""
    return [index for index, found in enumerate(roles(layout, identities)) if found == role]


def seams(layout: Layout, identities: Collection[int] = ()) -> list[tuple[int, int]]:
    """Return the pairs of consecutive layers that were not neighbours in their source.

    An identity passes its input on unchanged, so the layers before and after it count as
    consecutive. Before the first and after the last layer there is no seam.

    Args:
        layout: The layers.
        identities: The indices of the new layers that pass their input on unchanged.
    """
    passing = frozenset(identities)
    computing = (layer for layer in layout.layers if layer.index not in passing)
    return [
        (before.index, after.index)
        for before, after in pairwise(computing)
        if (before.model, before.source + 1) != (after.model, after.source)
    ]


def seam_layers(layout: Layout, identities: Collection[int] = ()) -> list[int]:
    """Return the layers at both sides of each seam, in order."""
    return sorted({index for seam in seams(layout, identities) for index in seam})


def ranges(indices: Iterable[int]) -> str:
    """Write increasing indices as text, consecutive ones as a range: `3, 8-11`."""
    found: list[list[int]] = []
    for index in indices:
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _moved(layout: Layout) -> set[int]:
    """Return the fewest originals without which those of each model are in their order."""
    moved: set[int] = set()
    for model in layout.models:
        originals = [x for x in layout.layers if x.model == model and not x.is_copy]
        kept = _longest_increasing([layer.source for layer in originals])
        moved |= {layer.index for i, layer in enumerate(originals) if i not in kept}
    return moved


def _longest_increasing(values: Sequence[int]) -> set[int]:
    """Return the positions of a longest increasing subsequence of different values."""
    tails: list[int] = []  # the smallest last value of a subsequence of each length
    places: list[int] = []
    before: list[int | None] = []
    for i, value in enumerate(values):
        length = bisect_left(tails, value)
        tails[length : length + 1] = [value]
        places[length : length + 1] = [i]
        before.append(places[length - 1] if length else None)
    found: set[int] = set()
    at = places[-1] if places else None
    while at is not None:
        found.add(at)
        at = before[at]
    return found
