"""Find the directives that expand to the slices of a layout. Pure.

Each growth line proposes growths for the slices. Each proposal is expanded and compared with the
slices, so only exact matches are returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, takewhile
from string import ascii_lowercase

from mergekit_interleave._limits import MAX_LAYERS
from mergekit_interleave.directive.directive import NEIGHBOURS, Directive
from mergekit_interleave.directive.growth import After, Every, Growth, Spread, Step, registry
from mergekit_interleave.directive.growth.explained import EditedSlices, Pattern
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import (
    ALL,
    APPLY_TO,
    AUTO,
    COPIES,
    KEEP,
    NONE,
    NORMS,
    Scales,
    Zero,
    zeroed_scales,
)
from mergekit_interleave.errors import LayoutError
from mergekit_interleave.layout.layout import Edit, Layer, Layout, chosen, expand, joined


@dataclass(frozen=True)
class Known:
    """Facts about the models of a layout.

    Attributes:
        depths: The number of layers of each model, or None if it is unknown.
        closes: Whether zeroing the tensors with these names makes a layer of the model an identity.
        edits: The edits of `zero: auto` and `zero: norms`, if they are known.
        damping: Returns the edit that divides the updates of layers by a number, or None if it is
            unknown.
        reaches_out: Whether scales of the first or last slice also match tensors outside the
            layers, which is allowed only in a step.
    """

    depths: Mapping[ModelRef, int | None]
    closes: Callable[[ModelRef, tuple[str, ...]], bool]
    edits: Mapping[str, Callable[[int], Edit]]
    damping: Callable[[int], Callable[[int], Edit] | None]
    reaches_out: Callable[[Layout], bool]


@dataclass(frozen=True)
class _Rule:
    """A rule by which a directive edits its new layers."""

    zero: Zero
    scale: Scales
    edit: Callable[[Layer], Edit] | None
    from_: str | None = None


def directives_of(layout: Layout, known: Known) -> Iterator[Directive]:
    """Yield the directives that expand to a layout; none if only a mergekit config can express it.

    Args:
        layout: The slices, whose boundaries are kept.
        known: Facts about its models.
    """
    if len(layout) > MAX_LAYERS:
        return
    rules = list(_rules(layout, known)) if len(layout.models) == 1 else []
    is_beyond_mergekit = any(part.edit.is_beyond_scales for part in layout.slices)
    pattern = _pattern(layout, known)
    for growth in registry.proposals(pattern, several_models=len(layout.models) > 1):
        if growth.damping > 1:
            yield from _damped(growth, layout, known)
        elif not growth.edits_itself:
            yield from _with_rules(growth, layout, known, rules)
        elif not is_beyond_mergekit and _is_same(
            layout, _expanded(growth, layout, known, None, COPIES)
        ):
            yield _stated(growth, layout, known)


def _pattern(layout: Layout, known: Known) -> Pattern:
    uncut = joined(layout.slices, across_edits=True)
    edited = []
    for scales, alike in groupby(layout.slices, key=lambda part: part.scales):
        slices = tuple((part.model, part.start, part.stop) for part in alike)
        edits = (
            {_zero_and_scale(scales, m, known) for m, _, _ in slices} if scales else {(None, ())}
        )
        zero, scale = edits.pop() if len(edits) == 1 else (None, scales)
        edited.append(EditedSlices(zero, scale, slices))
    return Pattern(
        depth=known.depths[layout.models[0]] or max(part.stop for part in layout.slices),
        written=tuple((part.start, part.stop) for part in layout.slices),
        joined=tuple((part.start, part.stop) for part in joined(layout.slices)),
        uncut=tuple((part.start, part.stop) for part in uncut),
        edited=tuple(edited),
    )


def _with_rules(
    growth: Growth, layout: Layout, known: Known, rules: Sequence[_Rule]
) -> Iterator[Directive]:
    """Yield the directives that expand to the layout, from a growth line and one of the rules."""
    raw = _expanded(growth, layout, known, None, COPIES)
    if raw is None or joined(raw.slices) != joined(layout.slices):
        return
    edited = {layer.index for layer in layout.layers if layer.edit}
    for rule in rules:
        if rule.from_ is not None and not isinstance(growth, Every | Spread | After):
            continue
        for apply_to in APPLY_TO if rule.edit else (COPIES,):
            # The last layer has no layer behind it, so a copy of it is no mean.
            if rule.edit and rule.from_ is None and chosen(raw, apply_to) != edited:
                continue
            if _is_same(layout, _expanded(growth, layout, known, rule.edit, apply_to)):
                yield _stated(growth, layout, known, rule, apply_to)
                break


def _damped(growth: Growth, layout: Layout, known: Known) -> Iterator[Directive]:
    """Yield the directive of a damped growth line if it expands to the layout."""
    by_source = known.damping(growth.damping)
    if by_source is not None:
        edit = partial(_by_source, by_source)
        if _is_same(layout, _expanded(growth, layout, known, edit, ALL)):
            yield _stated(growth, layout, known)


def _is_same(layout: Layout, other: Layout | None) -> bool:
    return other is not None and other.slices == layout.slices


def _expanded(
    growth: Growth,
    layout: Layout,
    known: Known,
    edit: Callable[[Layer], Edit] | None,
    apply_to: str,
) -> Layout | None:
    """Return the layout of a growth line, or None if the line does not fit."""
    depths = {
        model: known.depths[model]
        or max(part.stop for part in layout.slices if part.model == model)
        for model in layout.models
    }
    stated = depths if growth.needs_depth else known.depths

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
    several = bool(growth.models)
    unknown = known.depths[model] is None and growth.needs_depth
    directive = Directive(
        growth=growth,
        model=None if several else model,
        models=_short_names(layout.models) if several else {},
        layers=max(part.stop for part in layout.slices) if unknown else None,
    )
    if rule is None:
        return directive
    return replace(
        directive,
        zero=None if rule.zero == directive.zero_rule else rule.zero,
        scale=rule.scale or None,
        apply_to=None if apply_to == COPIES else apply_to,
        from_=rule.from_,
    )


def _short_names(models: Sequence[ModelRef]) -> dict[str, ModelRef]:
    names = (*ascii_lowercase, *(f"m{i}" for i in range(len(ascii_lowercase), len(models))))
    return dict(zip(names, models, strict=False))


def _rules(layout: Layout, known: Known) -> Iterator[_Rule]:
    """Yield the rules that may have edited the new layers."""
    averages = any(part.mean_with is not None for part in layout.slices)
    if averages:
        depth = known.depths[layout.models[0]]
        if depth is not None:
            plain = Layout(tuple(replace(part, mean_with=None) for part in layout.slices))
            yield from (_averaging(rule, depth) for rule in _rules(plain, known))
        return
    edits = {Edit(part.scales, part.constants) for part in layout.slices} - {Edit()}
    if not edits:
        yield _Rule(NONE, (), None)
        return
    if known.reaches_out(layout):
        return
    for word in (AUTO, NORMS):
        by_source = known.edits.get(word)
        if by_source is not None:
            yield _Rule(word, (), partial(_by_source, by_source))
    if len(edits) > 1:
        return
    (edit,) = edits
    if not edit.is_beyond_scales:
        zero, scale = _zero_and_scale(edit.scales, layout.models[0], known)
        yield _Rule(zero or NONE, scale, lambda _: edit)
        auto = known.edits.get(AUTO)
        if zero and scale and auto is not None and auto(0) == Edit(zeroed_scales(zero)):
            yield _Rule(AUTO, scale, lambda _: edit)


def _averaging(rule: _Rule, depth: int) -> _Rule:
    """Return a rule that also makes each copy the mean with the next layer, if there is one."""

    def edit(layer: Layer) -> Edit:
        found = Edit() if rule.edit is None else rule.edit(layer)
        return found if layer.source + 1 == depth else replace(found, mean_with=layer.source + 1)

    return replace(rule, edit=edit, from_=NEIGHBOURS)


def _zero_and_scale(
    scales: Scales, model: ModelRef, known: Known
) -> tuple[tuple[str, ...] | None, Scales]:
    """Split scales into `zero` and `scale`; `zero` is None if that is not possible."""
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
