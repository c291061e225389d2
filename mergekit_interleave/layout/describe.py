"""Describe a layout in one sentence. Pure."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

from mergekit_interleave.directive.growth import Growth
from mergekit_interleave.directive.growth.explained import SCALED, ZEROED, Summary
from mergekit_interleave.layout.layout import Layout, joined


def sentence(
    layout: Layout, growth: Growth | None, depth: int | None, identities: Collection[int] = ()
) -> str:
    """Describe the merge: its numbers, and the common term for its kind.

    Args:
        layout: The layers.
        growth: The growth line that they come from, if there is one.
        depth: The number of layers of the source model, or None if it is unknown.
        identities: The indices of the new layers that pass their input on unchanged.
    """
    if len(layout.models) > 1:
        return _of_several(layout)
    made = _summary(layout, depth, identities)
    return (growth and growth.sentence(made)) or _stacked(layout, depth, made)


def _summary(layout: Layout, depth: int | None, identities: Collection[int]) -> Summary:
    return Summary(
        depth=depth or len({layer.source for layer in layout.layers}),
        new=len(layout.new_layers),
        repeated=len(new_sources(layout)),
        slices=len(joined(layout.slices)),
        edit=_edit_of(layout, identities),
        averaged=any(layer.mean_with is not None for layer in layout.layers),
        only_copies=all(layer.is_copy for layer in layout.new_layers),
    )


def placement(layout: Layout, identities: Collection[int] = ()) -> str:
    """Return one word for where the new layers are, as in the names of published models.

    Args:
        layout: The layers.
        identities: The indices of the new layers that pass their input on unchanged.
    """
    new = {layer.index for layer in layout.new_layers}
    sources = [layer.source for layer in layout.layers]
    if len(layout.models) > 1:
        return "Frankenmerge"
    if not new:
        if any(a > b for a, b in pairwise(sources)):
            return "Rearranged"
        return "Pruned" if all(layer.is_plain for layer in layout.layers) else "Scaled"
    if new == {*range(len(layout) - len(new), len(layout))}:
        return "Appended"
    if all(sources[index] == sources[index - 1] for index in new):  # each next to its original
        return "Interleaved" if new <= {*identities} else "Interwoven"
    return "Stacked"


def new_sources(layout: Layout) -> set[int]:
    """Return the source indices of the new layers."""
    return {layer.source for layer in layout.new_layers}


def _edit_of(layout: Layout, identities: Collection[int]) -> str:
    """Describe the edited layers in one or two words; without `some`, they are the new layers."""
    edited = {layer.index for layer in layout.layers if not layer.edit.keeps_values}
    if not edited:
        return ""
    some = "" if edited == {layer.index for layer in layout.new_layers} else "some "
    return some + (ZEROED if edited <= {*identities} else SCALED)


def _stacked(layout: Layout, depth: int | None, made: Summary) -> str:
    sources = [layer.source for layer in layout.layers]
    count = len(layout)
    if all(a < b for a, b in pairwise(sources)):
        full = depth or sources[-1] + 1
        edited = sum(not layer.is_plain for layer in layout.layers)
        if edited:
            some = "" if edited == count else f"{edited} of them "
            return f"{count} layers, {some}{made.edit.removeprefix('some ')}"
        if full == count:
            return f"the {count} layers unchanged"
        return f"{full - count} of {full} layers left out: pruning"
    if len(set(sources)) == count:
        return f"{count} layers in another order{made.edited}"
    words = f"{made.depth} → {count} layers in {made.slices} slices{made.copies_edited}"
    two = made.slices == 2  # noqa: PLR2004 - as in SOLAR
    has_term = made.edit == ZEROED or (two and not made.edit)
    return f"{words}: {made.kind if has_term else 'a self-merge'}"


def _of_several(layout: Layout) -> str:
    parts = joined(layout.slices)
    models, slices = len(layout.models), len(parts)
    edited = _scaled(layout)
    if all(layer.index == layer.source for layer in layout.layers):
        return f"{len(layout)} layers, each of one of {models} models{edited}: a layer swap"
    ends = {part.model: part.stop for part in parts}
    if slices == models and all(part.start == 0 for part in parts):
        total = " + ".join(str(stop) for stop in ends.values())
        return f"{models} models end to end, {total} layers{edited}: a frankenmerge"
    return f"{len(layout)} layers in {slices} slices of {models} models{edited}: a frankenmerge"


def _scaled(layout: Layout) -> str:
    edited = [part for part in layout.slices if any(scale.value != 1 for scale in part.scales)]
    if not edited:
        return ""
    zeroed = all(all(scale.value in (0, 1) for scale in part.scales) for part in edited)
    return f", some {ZEROED if zeroed else SCALED}"
