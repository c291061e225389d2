"""What a layout is, in one sentence. Pure."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

from mergekit_interleave.directive.growth import Append, Every, Growth, Repeat, Spread, Windows
from mergekit_interleave.layout.layout import Layout, joined

_TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}


def sentence(
    layout: Layout, growth: Growth | None, depth: int | None, identities: Collection[int] = ()
) -> str:
    """What the field calls such a merge, and how much of it there is.

    Args:
        layout: The layers.
        growth: The growth line that says them; None where none does.
        depth: The number of layers of its one model, None where that is not known.
        identities: The indices of the new layers that pass their input on unchanged.
    """
    if len(layout.models) > 1:
        return _of_several(layout)
    new = len(layout.new_layers)
    of = len({layer.source for layer in layout.layers}) if depth is None else depth
    kind = _kind(layout, identities)
    match growth:
        case Every(n):
            return f"{_count(new, kind)}, one after {_every(n)} of {of}: {_expansion(kind)}"
        case Spread():
            return f"{_count(new, kind)}, evenly spread among {of}: {_expansion(kind)}"
        case Append(1):
            return f"the last of {of} layers again{_if(kind)}: appended {_expansion(kind)}"
        case Append(count):
            return f"the last of {of} layers {count} more times{_if(kind)}: {_expansion(kind)}"
        case Repeat(_, times, as_block):
            again = len(new_sources(layout))
            how = "as a block" if as_block else "side by side"
            name = "block expansion" if kind == _ZEROED else "depth up-scaling"
            if name == "depth up-scaling" and not as_block:
                name = f"interwoven {name}"
            words = f"{again} of {of} layers {_TIMES.get(times, f'{times} times')}, {how}"
            return f"{words}{_copies(layout, kind)}: {name}"
        case Windows(size, stride):
            count = len(joined(layout.slices))
            return f"{count} windows of {size} layers, each {stride} further: a self-merge"
    return _stacked(layout, depth, kind)


def placement(layout: Layout, identities: Collection[int] = ()) -> str:
    """One word for where the layers stand, as the names of published models have it.

    Args:
        layout: The layers.
        identities: The indices of the new layers that pass their input on unchanged.
    """
    new = {layer.index for layer in layout.new_layers}
    sources = [layer.source for layer in layout.layers]
    if len(layout.models) > 1:
        return "Frankenmerge"
    if not new:
        in_order = all(a < b for a, b in pairwise(sources))
        return "Pruned" if in_order else "Rearranged"
    if new == {*range(len(layout) - len(new), len(layout))}:
        return "Appended"
    if all(sources[index] == sources[index - 1] for index in new):  # beside what they are made of
        return "Interleaved" if new <= {*identities} else "Interwoven"
    return "Stacked"


_ZEROED, _SCALED = ("zeroed", "scaled")


def new_sources(layout: Layout) -> set[int]:
    """The indices, in their model, of the layers that new layers are copies of."""
    return {layer.source for layer in layout.new_layers}


def _kind(layout: Layout, identities: Collection[int]) -> str:
    """What is done to the new layers."""
    edited = [layer for layer in layout.new_layers if layer.edit]
    if not edited:
        return ""
    zeroed = all(layer.index in identities for layer in edited)
    some = "" if len(edited) == len(layout.new_layers) else "some "
    return some + (_ZEROED if zeroed else _SCALED)


def _if(kind: str) -> str:
    return f", {kind}" if kind else ""


def _copies(layout: Layout, kind: str) -> str:
    """What is done to the new layers, which are not all copies of what is unscaled."""
    originals = {layer.source for layer in layout.layers if not layer.new}
    if kind in (_ZEROED, _SCALED) and new_sources(layout) <= originals:
        return f", the copies {kind}"
    return _if(f"some {kind.removeprefix('some ')}" if kind else "")


def _count(new: int, kind: str) -> str:
    return f"{new} new layer{'s' if new > 1 else ''}{_if(kind)}"


def _every(n: int) -> str:
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(n % 10 if n % 100 not in (11, 12, 13) else 0, "th")
    return "each" if n == 1 else f"every {n}{suffix}"


def _expansion(kind: str) -> str:
    return "block expansion" if kind == _ZEROED else "depth up-scaling"


def _stacked(layout: Layout, depth: int | None, kind: str) -> str:
    sources = [layer.source for layer in layout.layers]
    count = len(layout)
    if all(a < b for a, b in pairwise(sources)):
        full = depth or sources[-1] + 1
        if kind:
            return f"{count} layers, {kind.removeprefix('some ')}"
        if full == count:
            return f"the {count} layers as they are"
        return f"{full - count} of {full} layers left out: pruning"
    distinct = len(set(sources))
    before = depth or distinct
    if distinct == count:
        return f"{count} layers in another order{_if(kind)}"
    slices = joined(layout.slices)
    words = f"{before} → {count} layers in {len(slices)} slices"
    words += _copies(layout, kind)
    if kind == _ZEROED:
        return f"{words}: block expansion"
    two = len(slices) == 2  # noqa: PLR2004 - as in SOLAR
    return f"{words}: {'depth up-scaling' if two and not kind else 'a self-merge'}"


def _of_several(layout: Layout) -> str:
    parts = joined(layout.slices)
    models, slices = len(layout.models), len(parts)
    kind = _if(_scaled(layout))
    if all(layer.index == layer.source for layer in layout.layers):
        return f"{len(layout)} layers, each of one of {models} models{kind}: a layer swap"
    ends = {part.model: part.stop for part in parts}
    if slices == models and all(part.start == 0 for part in parts):
        total = " + ".join(str(stop) for stop in ends.values())
        return f"{models} models end to end, {total} layers{kind}: a frankenmerge"
    return f"{len(layout)} layers in {slices} slices of {models} models{kind}: a frankenmerge"


def _scaled(layout: Layout) -> str:
    edited = [part for part in layout.slices if any(scale.value != 1 for scale in part.scales)]
    if not edited:
        return ""
    zeroed = all(all(scale.value in (0, 1) for scale in part.scales) for part in edited)
    return f"some {_ZEROED if zeroed else 'scaled'}"
