"""Apply `zero` and `scale` to the layers of real models, and check the result against them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint import layer_names
from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.checkpoint.models import Source
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.growth import Stack
from mergekit_interleave.directive.layer_range import unknown_depth
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import (
    AUTO,
    NONE,
    NORMS,
    Scales,
    Zero,
    check_disjoint,
    zeroed_scales,
)
from mergekit_interleave.errors import CheckpointError, LayoutError, RefusedError, Warn
from mergekit_interleave.layout.layout import Edit, Layer, Layout
from mergekit_interleave.planning import grown_config, zeroing


class Edits:
    """Derives the edit of each layer from the directive.

    Args:
        opened: The models that could be opened.
        warn: Called with each warning.
    """

    def __init__(self, opened: Mapping[ModelRef, Source], warn: Warn) -> None:
        self._opened, self._warn = opened, warn
        self._rules: dict[tuple[ModelRef, Zero], Callable[[int], Edit] | None] = {}
        self._by_rule: dict[tuple[ModelRef, Zero], set[Edit]] = {}
        self._dampings: dict[ModelRef, Callable[[int], Edit]] = {}

    @property
    def zeroed(self) -> set[str]:
        """The names in all `zero` lists."""
        return {name for _, rule in self._rules if isinstance(rule, tuple) for name in rule}

    def of(self, layer: Layer, rule: Zero, scale: Scales) -> Edit:
        """Return the edit that `zero` and `scale` make to a layer."""
        key = (layer.model, rule)
        if key not in self._rules:
            self._rules[key] = edit_of(rule, self._opened.get(layer.model), self._warn)
        zeroing_edit = self._rules[key]
        edit = Edit() if zeroing_edit is None else zeroing_edit(layer.source)
        if scale:
            named = tuple(zero for zero in edit.scales if zero.filter is not None)
            check_disjoint(tuple(str(zero.filter) for zero in named), scale)
            edit = Edit((*named, *scale), edit.constants)
        if zeroing_edit is not None:
            self._by_rule.setdefault(key, set()).add(edit)
        return edit

    def damped(self, layer: Layer, times: int) -> Edit:
        """Return the edit that divides the update of a layer by a number."""
        if layer.model not in self._dampings:
            opened = self._opened.get(layer.model)
            self._dampings[layer.model] = damping_of(times, opened, self._warn)
        return self._dampings[layer.model](layer.source)

    def check(self, layout: Layout, directive: Directive, *, allow_non_identity: bool) -> None:
        """Check the zeroed tensors against the models.

        Raises:
            LayoutError: A name matches no tensor, or a zeroed layer is not an identity.
            CheckpointError: The tensors cannot be read.
        """
        _check_outside(layout, directive, self._opened, self._warn)
        for (model, rule), edits in self._by_rule.items():
            checkpoint = self._opened.get(model)
            layers = [
                layer for layer in layout.layers if layer.model == model and layer.edit in edits
            ]
            if checkpoint is not None and layers:
                self._check_zeroing(layers, checkpoint, rule, allowed=allow_non_identity)
            elif isinstance(rule, tuple):
                self._warn("zero: the names are not checked, because the model cannot be read")

    def _check_zeroing(
        self, layers: Sequence[Layer], checkpoint: Source, rule: Zero, *, allowed: bool
    ) -> None:
        """Check the zeroed names against the stored tensors, or the family if none are stored.

        Layers may have different tensors, so a name must match a tensor in at least one layer.
        """
        family = checkpoint.family
        indices = sorted({layer.source for layer in layers})
        tensors: dict[int, list[str]] = {index: [] for index in indices}
        if checkpoint.has_weights:
            tensors = {index: checkpoint.layer_tensors(index) for index in indices}
            if isinstance(rule, tuple):
                names = [name for names in tensors.values() for name in names]
                zeroing.check_names(rule, names, family)
        if family is None:
            return
        if not allowed:
            for layer in layers:
                zeroing.check_identity(layer.edit, tensors[layer.source], family)
        first = layers[0]
        if isinstance(rule, tuple):
            for name in zeroing.dead_tensors(first.edit, tensors[first.source], family)[:1]:
                self._warn(
                    f"zero: {layer_names.inside(name)} is zeroed too, although it does not write "
                    "to the residual stream, so the new layers may get no gradients (`zero: auto` "
                    "zeroes only what is needed)"
                )
        if family.output_norms is not None and not zeroing.zeroes_output_norms(first.edit, family):
            self._warn(
                f"model type {family.model_type} normalizes the output of its projections, so "
                "zeroed projections take large first steps in training; `zero: norms` zeroes the "
                "norms instead"
            )


def edit_of(rule: Zero, checkpoint: Source | None, warn: Warn) -> Callable[[int], Edit] | None:
    """Return a function from the index of a source layer to the edit of its copy.

    Args:
        rule: What to zero.
        checkpoint: The model, or None if it cannot be read.
        warn: Called with each warning.

    Raises:
        LayoutError: The model has no norms to zero, or it is unknown what to zero in its type.
        RefusedError: Layers of this model type cannot be copied exactly.
    """
    if rule == NONE:
        return None
    if isinstance(rule, tuple):
        named = Edit(zeroed_scales(rule))
        return lambda _: named
    family = checkpoint.family if checkpoint is not None else None
    if checkpoint is not None and family is not None:
        checkpoint.require_family()
    else:
        reason = (
            "the model cannot be read"
            if checkpoint is None
            else f"model type {checkpoint.model_type!r} is not known"
        )
        if rule == NORMS:
            raise LayoutError(
                f"zero: norms: {reason}, so its norms are unknown",
                hint="list the tensors to zero: `zero: [o_proj, ...]`",
            )
        family = families.assumed_family()
        names = ", ".join(family.residual_writers)
        if checkpoint is not None and checkpoint.has_weights:
            _check_plain(checkpoint)
        warn(f"zero: auto: {reason}, so Llama's names are assumed: {names}")

    def setting(key: str) -> int:
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(f"these layers need no {key}")
        return grown_config.setting_of(checkpoint, key)

    projections = zeroing.projections_edit(family, setting)
    if rule == AUTO:
        return lambda _: projections
    if checkpoint is None or family.output_norms is None:
        raise LayoutError(
            f"zero: norms: model type {family.model_type} has no norms between its projections "
            "and the residual stream",
            hint="`zero: auto` zeroes the projections",
        )
    gains = zeroing.gains_edit(family, setting)
    with_gains = _layers_with_gains(checkpoint)
    return lambda source: gains if source in with_gains else projections


def averaged(edit: Edit, layer: Layer, depth: int | None, warn: Warn) -> Edit:
    """Return the edit that also makes a copy of a layer its mean with the next source layer.

    Args:
        edit: The edit of the copy.
        layer: The copy.
        depth: The number of layers of its source model.
        warn: Called with a warning if the layer is the last one, so that there is no mean.

    Raises:
        LayoutError: The depth is unknown.
    """
    if depth is None:
        raise unknown_depth(layer.model, "the last layer has no layer behind it")
    if layer.source + 1 == depth:
        warn(
            f"from: there is no layer behind layer {layer.source}, so the new layer after it is a "
            "copy of it"
        )
        return edit
    return replace(edit, mean_with=layer.source + 1)


def damping_of(times: int, checkpoint: Source | None, warn: Warn) -> Callable[[int], Edit]:
    """Return a function from the index of a source layer to the edit that divides its update.

    Args:
        times: The divisor.
        checkpoint: The model, or None if it cannot be read.
        warn: Called with each warning.

    Raises:
        RefusedError: The layers of this model type do more than add to the residual stream, or the
            type is unknown.
    """
    if checkpoint is None:
        warn("damped: the model cannot be read, so Llama's names are assumed")
        damped = zeroing.damped_edit(families.assumed_family(), times, by_norms=False)
        return lambda _: damped
    family = checkpoint.family
    if family is None or family.is_unknown:
        raise RefusedError(
            f"damped: it is unknown which tensors of model type {checkpoint.model_type!r} write to "
            "the residual stream",
            hint="divide them by name: `scale: {o_proj: 1/2, ...}` with `apply_to: all`",
        )
    checkpoint.require_family()
    if not family.adds_updates:
        raise RefusedError(
            f"damped: the layers of model type {family.model_type} do more than add their updates "
            "to the residual stream, so the updates cannot be divided"
        )
    by_norms = _layers_with_gains(checkpoint) if family.output_norms is not None else ()
    return lambda source: zeroing.damped_edit(family, times, by_norms=source in by_norms)


def _layers_with_gains(checkpoint: Source) -> Collection[int]:
    """Return the indices of the layers whose projections are followed by norms."""
    if isinstance(checkpoint, Checkpoint):
        return grown_config.layers_with_gains(checkpoint)
    family, layers = checkpoint.require_family(), range(checkpoint.depth)
    return [i for i in layers if family.has_output_norms(checkpoint.layer_tensors(i))]


def _check_plain(checkpoint: Source) -> None:
    """Check that the layers of a model of an unknown type have Llama's tensor names.

    Raises:
        LayoutError: They have other names, so the residual writers are unknown.
    """
    for index in range(checkpoint.depth):
        for name in checkpoint.layer_tensors(index):
            if not families.is_standard_tensor(layer_names.inside(name)):
                raise LayoutError(
                    f"zero: auto: model type {checkpoint.model_type!r} is unknown, and its tensor "
                    f"{name} is not one of Llama's",
                    hint="list the tensors that write to the residual stream: "
                    "`zero: [o_proj, ...]`",
                )


def outside(checkpoint: Source | None, *, before: bool) -> Collection[str]:
    """Return the tensors outside the layers that mergekit scales like the first or last slice.

    Args:
        checkpoint: The model of the slice, or None if it cannot be read.
        before: Whether the slice is the first one, rather than the last.
    """
    if checkpoint is not None and checkpoint.family is not None and checkpoint.has_weights:
        return checkpoint.scaled(checkpoint.outside_layers()[0 if before else 1])
    family = checkpoint.family if checkpoint is not None else None
    family = family or families.assumed_family()
    return family.before_layers if before else family.after_layers


def _check_outside(
    layout: Layout, directive: Directive, opened: Mapping[ModelRef, Source], warn: Warn
) -> None:
    """Check the tensors outside the layers, which mergekit scales like the first or last slice."""
    stated = directive.growth.steps if isinstance(directive.growth, Stack) else ()
    for end, before in ((0, True), (-1, False)):
        part = layout.slices[end]
        checkpoint = opened.get(part.model)
        if checkpoint is None or checkpoint.family is None:
            continue
        try:
            layer = part.start if before else part.stop - 1
            inside = checkpoint.layer_tensors(layer) if checkpoint.has_weights else ()
            zeroing.check_outside(part.scales, outside(checkpoint, before=before), inside)
        except LayoutError as error:
            if not stated or stated[end].is_plain:
                raise
            warn(f"{error}, so mergekit scales it too")


def idle_filters(
    layout: Layout, opened: Mapping[ModelRef, Source], checked: Collection[str] = ()
) -> Iterator[str]:
    """Yield a warning for each filter that matches no tensor.

    mergekit accepts such a filter, but it is probably a typo.

    Args:
        layout: The layers, with their scales.
        opened: The models that could be opened.
        checked: The names that have already been checked.
    """
    for model in layout.models:
        checkpoint = opened.get(model)
        if checkpoint is None:
            continue
        try:
            tensors = list(checkpoint.tensors) if checkpoint.has_weights else []
        except CheckpointError:
            continue
        scales = [scale for part in layout.slices if part.model == model for scale in part.scales]
        for name in dict.fromkeys(scale.filter for scale in scales if scale.filter is not None):
            writers = checkpoint.family.residual_writers if checkpoint.family else ()
            known = name in writers or name in checked
            if tensors and not known and not any(name in tensor for tensor in tensors):
                yield f"the filter {name!r} matches no tensor of {model}"
