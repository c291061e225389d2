"""From a layout back to a growth line: every directive that means the same slices. Pure.

Patterns are proposed from what the slices look like, and each proposal is expanded and compared, so
that what is given back is exact whatever the slices are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise, takewhile
from string import ascii_lowercase

from mergekit_interleave._limits import MAX_LAYERS
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import (
    Append,
    Drop,
    Every,
    Growth,
    Part,
    Repeat,
    Spread,
    Stack,
    Step,
    Windows,
    needs_depth,
)
from mergekit_interleave.directive.layer_range import END, Range
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import (
    APPLY_TO,
    AUTO,
    COPIES,
    GAINS,
    KEEP,
    NONE,
    Scales,
    Zero,
    zeroed_scales,
)
from mergekit_interleave.errors import LayoutError
from mergekit_interleave.layout.layout import Edit, Layer, Layout, Slice, chosen, expand, joined


@dataclass(frozen=True)
class Known:
    """What is known of the models of a layout.

    Attributes:
        depths: The number of layers of each, None where it is not known.
        closes: Whether zeroing tensors of these names makes a layer of the model an identity.
        edits: What `zero: auto` and `zero: gains` do to its layers, where that is known.
        reaches_out: Whether scales of the first or last slice touch what lies outside the layers,
            which only a step may do.
    """

    depths: Mapping[ModelRef, int | None]
    closes: Callable[[ModelRef, tuple[str, ...]], bool]
    edits: Mapping[str, Callable[[int], Edit]]
    reaches_out: Callable[[Layout], bool]


@dataclass(frozen=True)
class _Rule:
    """What a directive says is done to its new layers."""

    zero: Zero
    scale: Scales
    edit: Callable[[Layer], Edit] | None


def directives_of(layout: Layout, known: Known) -> Iterator[Directive]:
    """The directives that expand to a layout; none where only a mergekit config can say it.

    Args:
        layout: The slices, whose boundaries are kept.
        known: What is known of its models.
    """
    if len(layout) > MAX_LAYERS:
        return
    if len(layout.models) == 1:
        yield from _of_one(layout, known)
    if not any(part.constants for part in layout.slices):
        stack = _steps(layout.slices, known)
        if not stack.is_plain and _is(layout, _expanded(stack, layout, known, None, COPIES)):
            yield _stated(stack, layout, known)


def _of_one(layout: Layout, known: Known) -> Iterator[Directive]:
    """Those of one model, whose new layers are all edited alike."""
    depth = known.depths[layout.models[0]] or max(part.stop for part in layout.slices)
    rules, merged = list(_rules(layout, known)), joined(layout.slices)
    edited = {layer.index for layer in layout.layers if layer.edit}
    for growth in _growths(layout, depth):
        raw = _expanded(growth, layout, known, None, COPIES)
        if raw is None or joined(raw.slices) != merged:
            continue
        for rule in rules:
            for apply_to in APPLY_TO if rule.edit else (COPIES,):
                if rule.edit and chosen(raw, apply_to) != edited:
                    continue
                if _is(layout, _expanded(growth, layout, known, rule.edit, apply_to)):
                    yield _stated(growth, layout, known, rule, apply_to)
                    break


def _is(layout: Layout, other: Layout | None) -> bool:
    return other is not None and other.slices == layout.slices


def _expanded(
    growth: Growth,
    layout: Layout,
    known: Known,
    edit: Callable[[Layer], Edit] | None,
    apply_to: str,
) -> Layout | None:
    """What a growth line means, None where it does not fit."""
    depths = {
        model: known.depths[model]
        or max(part.stop for part in layout.slices if part.model == model)
        for model in layout.models
    }
    stated = depths if needs_depth(growth) else known.depths

    def of_step(step: Step, _: Layer) -> Edit:
        zeroed = zeroed_scales(step.zero) if isinstance(step.zero, tuple) else ()
        return Edit((*zeroed[:-1], *step.scale) if step.scale else zeroed)

    try:
        return expand(
            growth, layout.models[0], stated.__getitem__, edit, apply_to=apply_to, step_edit=of_step
        )
    except LayoutError:
        return None


def _stated(
    growth: Growth,
    layout: Layout,
    known: Known,
    rule: _Rule | None = None,
    apply_to: str = COPIES,
) -> Directive:
    model = layout.models[0]
    several = isinstance(growth, Stack) and bool(growth.models)
    unknown = known.depths[model] is None and needs_depth(growth)
    said = Directive(
        growth=growth,
        model=None if several else model,
        models=_short_names(layout.models) if several else {},
        layers=max(part.stop for part in layout.slices) if unknown else None,
    )
    if rule is None:
        return said
    return replace(
        said,
        zero=None if rule.zero == said.zero_rule else rule.zero,
        scale=rule.scale or None,
        apply_to=None if apply_to == COPIES else apply_to,
    )


def _short_names(models: Sequence[ModelRef]) -> dict[str, ModelRef]:
    names = (*ascii_lowercase, *(f"m{i}" for i in range(len(ascii_lowercase), len(models))))
    return dict(zip(names, models, strict=False))


def _rules(layout: Layout, known: Known) -> Iterator[_Rule]:
    """What may have been done to the new layers, if it is the same everywhere."""
    edits = {Edit(part.scales, part.constants) for part in layout.slices} - {Edit()}
    if not edits:
        yield _Rule(NONE, (), None)
        return
    if known.reaches_out(layout):
        return
    for word in (AUTO, GAINS):
        by_source = known.edits.get(word)
        if by_source is not None:
            yield _Rule(word, (), partial(_by_source, by_source))
    if len(edits) > 1:
        return
    (edit,) = edits
    if not edit.constants:
        zero, scale = _said(edit.scales, layout.models[0], known)
        yield _Rule(zero or NONE, scale, lambda _: edit)
        auto = known.edits.get(AUTO)
        if zero and scale and auto is not None and auto(0) == Edit(zeroed_scales(zero)):
            yield _Rule(AUTO, scale, lambda _: edit)


def _said(scales: Scales, model: ModelRef, known: Known) -> tuple[tuple[str, ...] | None, Scales]:
    """Scales as `zero`, as far as that is what they are, and the rest as `scale`."""
    zeroed = tuple(takewhile(lambda scale: scale.value == 0 and scale.filter, scales))
    names = tuple(str(scale.filter) for scale in zeroed)
    rest = scales[len(zeroed) :]
    if not rest or len({*names}) < len(names) or not known.closes(model, names):
        return None, scales
    if {scale.filter for scale in rest} & {*names}:
        return None, scales
    return names, () if rest == (KEEP,) else rest


def _by_source(edit: Callable[[int], Edit], layer: Layer) -> Edit:
    return edit(layer.source)


_Ranges = list[tuple[int, int]]


def _growths(layout: Layout, depth: int) -> Iterator[Growth]:
    """The growth lines of one model that these slices may come from."""
    ranges: _Ranges = [(part.start, part.stop) for part in layout.slices]
    more = len(layout) - depth
    if more > 0:
        yield Every(ranges[0][1])
        yield Spread(more)
        yield Append(more)
        yield from _repeats(layout)
    merged = joined(layout.slices)
    gaps = [(0, merged[0].start), *((a.stop, b.start) for a, b in pairwise(merged))]
    gaps = [gap for gap in (*gaps, (merged[-1].stop, depth)) if gap[0] != gap[1]]
    if gaps and all(start < stop for start, stop in gaps):
        yield Drop(tuple(gaps))
    # A slice that is cut where its edit changes was written as one range.
    whole = [(part.start, part.stop) for part in joined(layout.slices, across_edits=True)]
    for bounds in dict.fromkeys((tuple(ranges), tuple(whole))):
        parts = list(_parts(list(bounds)))
        if len(parts) == 1 and isinstance(parts[0].layers, Windows) and parts[0].times == 1:
            windows = parts[0].layers
            yield replace(windows, layers=(0, END)) if windows.layers == (0, depth) else windows
        else:
            yield Stack(tuple(Step((part,)) for part in parts))


def _repeats(layout: Layout) -> Iterator[Growth]:
    counts: dict[int, int] = {}
    for layer in layout.layers:
        counts[layer.source] = counts.get(layer.source, 0) + 1
    again = sorted(source for source, count in counts.items() if count > 1)
    if not again:
        return
    layers, times = (again[0], again[-1] + 1), counts[again[0]]
    yield Repeat(layers, times)
    yield Repeat(layers, times, as_block=True)


def _steps(slices: Sequence[Slice], known: Known) -> Stack:
    """The steps that spell a layout out."""
    several = len({part.model for part in slices}) > 1
    steps: list[Step] = []
    for scales, alike in groupby(slices, key=lambda part: part.scales):
        parts: list[Part] = []
        models: list[ModelRef] = []
        for model, mine in groupby(alike, key=lambda part: part.model):
            own = model if several else None
            parts += [
                replace(part, model=own) for part in _parts([(p.start, p.stop) for p in mine])
            ]
            models.append(model)
        if not scales:
            steps += [Step((part,)) for part in parts]
            continue
        said = {_said(scales, model, known) for model in models}
        zero, scale = said.pop() if len(said) == 1 else (None, scales)
        steps.append(Step(tuple(parts), zero, scale))
    return Stack(tuple(steps))


def _parts(ranges: _Ranges) -> Iterator[Part]:
    """Ranges of one model, the longest pattern at each place as one part."""
    i = 0
    while i < len(ranges):
        length, part = max(_patterns(ranges, i), key=lambda found: found[0])
        yield part
        i += length


_FEWEST_WINDOWS = 3  # two windows are shorter as two ranges


def _patterns(ranges: _Ranges, i: int) -> Iterator[tuple[int, Part]]:
    """The patterns that begin at a place, each with the number of ranges that it stands for."""
    start, stop = ranges[i]
    yield 1, Part((start, stop))
    times = _equal(ranges, i)
    if times > 1:
        yield times, Part((start, stop), times=times, as_block=stop - start > 1)
        if stop - start == 1:
            layer, j = start, i
            while j < len(ranges) and ranges[j] == (layer, layer + 1):
                if _equal(ranges, j) < times:
                    break
                layer, j = layer + 1, j + times
            yield j - i, Part((start, layer), times=times)
    count, windows = _windows(ranges, i)
    if count >= _FEWEST_WINDOWS:
        yield count, Part(windows)


def _equal(ranges: _Ranges, i: int) -> int:
    """How many equal ranges stand at a place."""
    j = i
    while j < len(ranges) and ranges[j] == ranges[i]:
        j += 1
    return j - i


def _windows(ranges: _Ranges, i: int) -> tuple[int, Windows]:
    """How many windows begin at a place; the last may be cut short."""
    start, stop = ranges[i]
    size = stop - start
    stride = ranges[i + 1][0] - start if i + 1 < len(ranges) else 0
    j = i + 1
    while 0 < stride <= size and j < len(ranges):
        before, last = ranges[j - 1], ranges[j]
        expected = (before[0] + stride, before[1] + stride)
        if before[1] - before[0] < size or last[0] != expected[0]:
            break
        if not before[1] < last[1] <= expected[1]:
            break
        j += 1
    over: Range = (start, ranges[j - 1][1])
    return j - i, Windows(size, max(stride, 1), over)
