"""Lay out the layers of the new model. Pure: no I/O, no torch.

Terms used throughout the project: the *original* is the first unscaled occurrence of a source
layer, or, if all are scaled, the first without zeros, if there is one; every other occurrence is a
*copy*. A copy, or a layer with zeroed tensors, is a *new layer*, to be trained. A new layer whose
residual writers are *zeroed* passes its input on unchanged. Indices start at 0, and ranges are
half-open. The module `roles` has one word for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, islice
from typing import TypeAlias

from mergekit_interleave._limits import MAX_LAYERS
from mergekit_interleave.directive.growth import Growth, Step
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import ALL, COPIES, FIRST, LAST, Scales
from mergekit_interleave.errors import LayoutError


@dataclass(frozen=True)
class Constant:
    """A value that fills the tensors whose names contain `filter`, which no scale can do.

    Attributes:
        value: The value.
        filter: A part of the names of the tensors.
        after: The first row to fill; None fills all rows.
        square: If set to k, only the last k * k rows are filled: viewed as a k by k matrix, they
            become `value` times the identity matrix.
    """

    value: float
    filter: str
    after: int | None = None
    square: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the whole tensor is filled."""
        return self.after is None and self.square is None


def constant_of(tensor: str, constants: Iterable[Constant]) -> Constant | None:
    """Return the constant that fills a tensor, or None if there is none."""
    return next((constant for constant in constants if constant.filter in tensor), None)


@dataclass(frozen=True)
class Edit:
    """The edit of the tensors of a layer; empty for a plain copy.

    Attributes:
        scales: The factors of its tensors.
        constants: The constants that fill its tensors.
        mean_with: The index of another source layer: the tensors are the means of the tensors of
            both, before they are scaled. None if they are those of one layer.
    """

    scales: Scales = ()
    constants: tuple[Constant, ...] = ()
    mean_with: int | None = None

    def __bool__(self) -> bool:
        return bool(self.scales or self.constants) or self.mean_with is not None

    @property
    def is_beyond_scales(self) -> bool:
        """Whether the key `scale` cannot express it."""
        has_gains = any(scale.fixed for scale in self.scales)
        return bool(self.constants) or has_gains or self.mean_with is not None

    @property
    def is_plain(self) -> bool:
        """Whether it changes nothing."""
        return self.mean_with is None and self.keeps_values

    @property
    def keeps_values(self) -> bool:
        """Whether it scales and fills nothing."""
        return not self.constants and all(scale.value == 1 for scale in self.scales)

    @property
    def zeroes(self) -> bool:
        """Whether it replaces weights by zeros or other constants."""
        return bool(self.constants) or any(scale.value == 0 for scale in self.scales)


@dataclass(frozen=True)
class Slice:
    """Layers `start` to `stop - 1` of one model, all with the same edit; one layer if it is a mean.

    If `new` is set, they are new layers, even if the model has no other occurrence of them: they
    were new in an earlier growth.
    """

    model: ModelRef
    start: int
    stop: int
    scales: Scales = ()
    constants: tuple[Constant, ...] = ()
    new: bool = False
    mean_with: int | None = None

    @property
    def edit(self) -> Edit:
        """The edit of its layers."""
        return Edit(self.scales, self.constants, self.mean_with)

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layer:
    """One layer of the new model.

    Attributes:
        index: Its index in the new model.
        model: The source model.
        source: Its index in the source model.
        scales: The factors of its tensors.
        constants: The constants that fill its tensors.
        is_copy: Whether another occurrence of its source layer is the original.
        was_new: Whether it was a new layer in an earlier growth.
        mean_with: See `Edit`.
    """

    index: int
    model: ModelRef
    source: int
    scales: Scales
    constants: tuple[Constant, ...]
    is_copy: bool
    was_new: bool = False
    mean_with: int | None = None

    @property
    def edit(self) -> Edit:
        """Its scales and constants, and the layer that it is the mean with."""
        return Edit(self.scales, self.constants, self.mean_with)

    @property
    def new(self) -> bool:
        """Whether it is to be trained: a copy, or a layer that lost weights to zeros."""
        return self.is_copy or self.was_new or self.edit.zeroes

    @property
    def is_plain(self) -> bool:
        """Whether its weights are those of its source layer."""
        return self.edit.is_plain

    @property
    def zeroed(self) -> tuple[str, ...]:
        """The name filters of the tensors that are zero."""
        return tuple(scale.filter or "*" for scale in self.scales if scale.value == 0)


@dataclass(frozen=True)
class Layout:
    """The layers of a new model, in slices whose boundaries are as written."""

    slices: tuple[Slice, ...]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """All layers in order."""
        layers: list[Layer] = []
        for part in self.slices:
            for source in range(part.start, part.stop):
                i, edit = len(layers), (part.scales, part.constants)
                is_copy = self._originals[part.model, source] != i
                mean_with = part.mean_with
                layers.append(Layer(i, part.model, source, *edit, is_copy, part.new, mean_with))
        return tuple(layers)

    @cached_property
    def _originals(self) -> Mapping[tuple[ModelRef, int], int]:
        """The index of the original of each source layer."""
        plain: dict[tuple[ModelRef, int], int] = {}
        scaled: dict[tuple[ModelRef, int], int] = {}
        zeroed: dict[tuple[ModelRef, int], int] = {}
        new: dict[tuple[ModelRef, int], int] = {}
        start = 0
        for part in self.slices:
            found = plain if part.edit.is_plain else zeroed if part.edit.zeroes else scaled
            found = new if part.new else found
            for i, source in enumerate(range(part.start, part.stop), start):
                found.setdefault((part.model, source), i)
            start += len(part)
        return new | zeroed | scaled | plain

    def original_of(self, layer: Layer) -> int:
        """Return the index of the original of a layer's source."""
        return self._originals[layer.model, layer.source]

    @property
    def new_layers(self) -> tuple[Layer, ...]:
        """The layers to be trained."""
        return tuple(layer for layer in self.layers if layer.new)

    @property
    def scaled_originals(self) -> tuple[int, ...]:
        """The indices of the layers that are not new, but have other weights than their source."""
        return tuple(x.index for x in self.layers if not x.new and not x.is_plain)

    @cached_property
    def models(self) -> tuple[ModelRef, ...]:
        """The source models, in the order of their first layers."""
        return tuple(dict.fromkeys(part.model for part in self.slices))

    def __len__(self) -> int:
        return sum(len(part) for part in self.slices)

    def is_base(self, depth: int) -> bool:
        """Whether the layers are exactly those of the source model, in order."""
        plain = all(layer.is_plain for layer in self.layers) and len(self.models) == 1
        return plain and [layer.source for layer in self.layers] == list(range(depth))


def joined(slices: Sequence[Slice], *, across_edits: bool = False) -> list[Slice]:
    """Join slices that are consecutive in their model, and drop their edits.

    Args:
        slices: The slices.
        across_edits: Join only slices with different edits.
    """
    result: list[Slice] = []
    edits: list[Edit] = []
    for part in slices:
        edit = part.edit
        last = result[-1] if result else None
        follows = last is not None and (last.model, last.stop) == (part.model, part.start)
        if follows and last is not None and not (across_edits and edits[-1] == edit):
            result[-1] = replace(last, stop=part.stop)
        else:
            result.append(Slice(part.model, part.start, part.stop))
        edits.append(edit)
    return result


Depths: TypeAlias = "int | Callable[[ModelRef], int | None] | None"
"""The number of layers of the only model, or a function that returns it for each model.

None if it is unknown.
"""


def distances(layout: Layout) -> list[int]:
    """Return the distance in layers from each copy to its original, in the order of the copies.

    Placing each copy next to its original keeps the distances small, as LongCAT recommends.
    """
    copies = (layer for layer in layout.layers if layer.is_copy)
    return [abs(layer.index - layout.original_of(layer)) for layer in copies]


def expand(  # noqa: PLR0913 - two callbacks that planning supplies
    growth: Growth,
    model: ModelRef | None,
    depth: Depths,
    edit: Callable[[Layer], Edit] | None = None,
    *,
    apply_to: str = COPIES,
    step_edit: Callable[[Step, Layer], Edit] | None = None,
) -> Layout:
    """Lay out a growth line on a model.

    Args:
        growth: The growth line; not `ExplicitSlices`, which `mergekit_yaml` parses.
        model: The source model, or None if the growth line names its own models.
        depth: The number of layers of each model; may be None if the line does not need it.
        edit: Returns the edit of a new layer; None makes plain copies.
        apply_to: Which of several equal layers are edited.
        step_edit: Returns the edit of a layer of a step with its own `zero` or `scale`.

    Raises:
        LayoutError: The growth line does not fit this depth, or changes nothing.
    """

    def depth_of(source: ModelRef) -> int | None:
        return depth(source) if callable(depth) else depth

    slices: list[Slice] = []
    settled: set[int] = set()
    total = 0
    for source, start, stop, step in growth.slices(model, depth_of):
        if total + stop - start > MAX_LAYERS:
            raise LayoutError(f"the result would have more than {MAX_LAYERS} layers")
        whole = Slice(source, start, stop)
        if step is None or step.is_plain or step_edit is None:
            slices.append(whole)
        else:
            layers = (
                Layer(total + i, source, start + i, (), (), is_copy=True)
                for i in range(stop - start)
            )
            slices += _split(whole, (step_edit(step, layer) for layer in layers))
            settled.update(range(total, total + stop - start))
        total += stop - start
    layout = Layout(tuple(slices))
    sole = layout.models[0] if len(layout.models) == 1 else None
    if sole is not None and (known := depth_of(sole)) is not None and layout.is_base(known):
        raise LayoutError(growth.why_unchanged(known))
    return _edit_new_layers(layout, edit, apply_to, settled) if edit is not None else layout


def _split(part: Slice, edits: Iterable[Edit]) -> Iterator[Slice]:
    """Apply one edit per layer to a slice, and split the slice where the edit changes."""
    start = part.start
    for edit, alike in groupby(edits):
        stop = start + len(list(alike))
        scales, constants = edit.scales, edit.constants
        yield Slice(part.model, start, stop, scales, constants, mean_with=edit.mean_with)
        start = stop


def _edit_new_layers(
    layout: Layout, edit: Callable[[Layer], Edit], apply_to: str, settled: Collection[int]
) -> Layout:
    """Return the layout with its new layers edited, except those that a step edits."""
    slices: list[Slice] = []
    edited = chosen(layout, apply_to, settled)
    layers = iter(layout.layers)
    for part in layout.slices:
        members = list(islice(layers, len(part)))
        if members[0].index in settled:
            slices.append(part)
            continue
        edits = (edit(layer) if layer.index in edited else Edit() for layer in members)
        slices += _split(part, edits)
    return Layout(tuple(slices))


def chosen(layout: Layout, apply_to: str, settled: Collection[int] = ()) -> set[int]:
    """Return the indices of the layers that the edit of a growth line applies to.

    Args:
        layout: The layers, edited only by their steps.
        apply_to: Which of several equal layers are edited.
        settled: The indices of the layers that a step edits.
    """
    if apply_to == COPIES:
        return {layer.index for layer in layout.new_layers if layer.index not in settled}
    equal: dict[tuple[int, int], list[int]] = {}
    models = {model: i for i, model in enumerate(layout.models)}
    layers = iter(layout.layers)
    for part in layout.slices:
        model = models[part.model]
        for layer in islice(layers, len(part)):
            if layer.index not in settled:
                equal.setdefault((model, layer.source), []).append(layer.index)
    selected = {FIRST: slice(1, 2), LAST: slice(-1, None), ALL: slice(None)}[apply_to]
    return {i for indices in equal.values() if len(indices) > 1 for i in indices[selected]}
