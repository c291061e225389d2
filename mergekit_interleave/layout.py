"""The heart: a layout is the ordered layers of the new model. Pure: no I/O, no torch.

Vocabulary, here and everywhere: the *original* is the first unscaled occurrence of a source
layer; every other occurrence is a *new layer*, to be trained; a new layer whose residual
writers are *zeroed* passes its input on unchanged. Indices start at 0, ranges are half-open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice

from mergekit_interleave.directive import Append, Every, Growth, Repeat, Spelled, Spread, Stack
from mergekit_interleave.errors import LayoutError
from mergekit_interleave.reference import ModelRef

MAX_LAYERS = 10_000
"""No layout has more layers: a slip of the pen must not fill the memory."""


@dataclass(frozen=True)
class Scale:
    """Multiply the tensors whose name contains `filter` (all of them where it is None)."""

    value: float
    filter: str | None = None

    def matches(self, tensor: str) -> bool:
        """Whether it speaks of this tensor, by mergekit's rule: a plain substring."""
        return self.filter is None or self.filter in tensor


Scales = tuple[Scale, ...]
"""The first scale that matches a tensor counts, the rest do not."""


def scale_of(tensor: str, scales: Scales) -> float | None:
    """What a tensor is multiplied by; None where no scale speaks of it."""
    return next((scale.value for scale in scales if scale.matches(tensor)), None)


def names_zero(scales: Scales, part: str) -> bool:
    """Whether scales zero what a part of a tensor's name stands for, as far as names alone tell."""
    return any(
        scale.value == 0 and scale.filter and (scale.filter in part or part in scale.filter)
        for scale in scales
    )


def zeroed_scales(names: Iterable[str]) -> Scales:
    """The scales that zero the named tensors of a layer and keep all others."""
    zeroed = tuple(Scale(0.0, name) for name in names)
    return (*zeroed, Scale(1.0)) if zeroed else ()


@dataclass(frozen=True)
class Constant:
    """Fill the tensors whose name contains `filter`, which no scale can say.

    Attributes:
        value: With what.
        filter: A part of their names.
        after: Where it is not None, only the rows from this one on are filled.
        square: Where it is k, only the last k * k rows are filled: read as a k by k matrix, they
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
    """What a tensor is filled with; None where nothing is said of it."""
    return next((constant for constant in constants if constant.filter in tensor), None)


@dataclass(frozen=True)
class Edit:
    """What is done to the tensors of a new layer; nothing, where it is a plain copy."""

    scales: Scales = ()
    constants: tuple[Constant, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.scales or self.constants)


@dataclass(frozen=True)
class Slice:
    """Layers `start` to `stop - 1` of one model, all edited alike."""

    model: ModelRef
    start: int
    stop: int
    scales: Scales = ()
    constants: tuple[Constant, ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layer:
    """One layer of the new model.

    Attributes:
        index: Where it stands in the new model.
        model: The model it is taken from.
        source: Its index there.
        scales: What its tensors are multiplied by.
        constants: What its tensors are filled with.
        new: Whether it is a new layer, rather than the original.
    """

    index: int
    model: ModelRef
    source: int
    scales: Scales
    constants: tuple[Constant, ...]
    new: bool

    @property
    def edit(self) -> Edit:
        """What is done to its tensors."""
        return Edit(self.scales, self.constants)

    @property
    def zeroed(self) -> tuple[str, ...]:
        """The name filters of the tensors that are zero."""
        return tuple(scale.filter or "*" for scale in self.scales if scale.value == 0)


@dataclass(frozen=True)
class Layout:
    """The layers of a new model, in slices whose boundaries are kept as they were written."""

    slices: tuple[Slice, ...]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """All layers in order."""
        seen: set[tuple[ModelRef, int]] = set()
        layers: list[Layer] = []
        for part in self.slices:
            unscaled = not part.constants and all(scale.value == 1 for scale in part.scales)
            for source in range(part.start, part.stop):
                key = (part.model, source)
                new = not unscaled or key in seen
                if not new:
                    seen.add(key)
                layers.append(
                    Layer(len(layers), part.model, source, part.scales, part.constants, new)
                )
        return tuple(layers)

    @property
    def new_layers(self) -> tuple[Layer, ...]:
        """The layers to be trained."""
        return tuple(layer for layer in self.layers if layer.new)

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """The source models, in the order of their first layer."""
        return tuple(dict.fromkeys(part.model for part in self.slices))

    def __len__(self) -> int:
        return sum(len(part) for part in self.slices)

    def is_base(self, depth: int) -> bool:
        """Whether this is just its source model, layer for layer."""
        plain = not any(layer.new for layer in self.layers) and len(self.models) == 1
        return plain and [layer.source for layer in self.layers] == list(range(depth))


def expand(
    growth: Growth,
    model: ModelRef,
    depth: int | None,
    edit: Callable[[int], Edit] | None = None,
) -> Layout:
    """The layout that a growth line gives on a model.

    Args:
        growth: What to do; not `Spelled`, which is a layout already.
        model: The source model.
        depth: Its number of layers. None where it is not known, which only `Stack` can bear.
        edit: What is done to a new layer, by the index of its source; None makes plain copies.

    Raises:
        LayoutError: The growth line does not fit this depth, or changes nothing.
    """
    if depth is None and not isinstance(growth, Stack):
        raise LayoutError(
            f"the number of layers of {model} is not known", hint="state it: --layers N"
        )
    if _length(growth, depth or 0) > MAX_LAYERS:
        raise LayoutError(f"more than {MAX_LAYERS} layers would come of this")
    if depth is not None:
        for start, stop in _written_ranges(growth):
            check_range(start, stop, model, depth)
    ranges = _ranges(growth, depth or 0)
    layout = Layout(tuple(Slice(model, start, stop) for start, stop in ranges))
    if depth is not None and layout.is_base(depth):
        raise LayoutError(_changes_nothing(growth, depth))
    return _edit_new_layers(layout, edit) if edit is not None else layout


def check_range(start: int, stop: int, model: ModelRef, depth: int) -> None:
    """Check that a model has the layers of a range.

    Raises:
        LayoutError: The range ends past the model's last layer.
    """
    if stop > depth:
        raise LayoutError(
            f"[{start}, {stop}] ends past the last layer of {model}, which has {depth} layers",
            hint=f"its layers are 0 to {depth - 1}, as a range [0, {depth}]",
        )


def _length(growth: Growth, depth: int) -> int:
    """How many layers will come of it at the most, without making them."""
    match growth:
        case Repeat(start, stop, times):
            return depth + (stop - start) * (times - 1)
        case Append(count):
            return depth + count
        case Stack(ranges):
            return sum(stop - start for start, stop in ranges)
    return 2 * depth


def _written_ranges(growth: Growth) -> tuple[tuple[int, int], ...]:
    """The ranges that the user wrote, the only ones that can be past the end."""
    match growth:
        case Repeat(start, stop):
            return ((start, stop),)
        case Stack(ranges):
            return ranges
    return ()


def _ranges(growth: Growth, depth: int) -> list[tuple[int, int]]:
    match growth:
        case Every(n):
            return list(_copies_after(range(n - 1, depth, n), depth))
        case Spread(count):
            if count > depth:
                raise LayoutError(
                    f"interleave: {count} layers: the model has only {depth} to copy",
                    hint=f"`interleave: {depth} layers` is the most",
                )
            return list(_copies_after((j * depth // count - 1 for j in range(1, count + 1)), depth))
        case Append(count):
            return [(0, depth)] + [(depth - 1, depth)] * count
        case Repeat(start, stop, times, as_block):
            if as_block:
                return [(0, stop), *[(start, stop)] * (times - 1), *_tail(stop, depth)]
            copies = ((i, i + 1) for i in range(start, stop) for _ in range(times))
            return [*_tail(0, start), *copies, *_tail(stop, depth)]
        case Stack(ranges):
            return list(ranges)
        case Spelled():
            raise TypeError("slices that are spelled out are read by `recipe`, not expanded")


def _copies_after(indices: Iterable[int], depth: int) -> Iterator[tuple[int, int]]:
    """The whole model, with a copy of each given layer right after it."""
    start = 0
    for index in indices:
        yield start, index + 1
        yield index, index + 1
        start = index + 1
    yield from _tail(start, depth)


def _tail(start: int, stop: int) -> list[tuple[int, int]]:
    return [(start, stop)] if start < stop else []


def _edit_new_layers(layout: Layout, edit: Callable[[int], Edit]) -> Layout:
    """The layout with its new layers edited; slices are split where the edit changes."""
    slices: list[Slice] = []
    edits = (edit(layer.source) if layer.new else Edit() for layer in layout.layers)
    for part in layout.slices:
        start = part.start
        for how, alike in groupby(islice(edits, len(part))):
            stop = start + len(list(alike))
            slices.append(Slice(part.model, start, stop, how.scales, how.constants))
            start = stop
    return Layout(tuple(slices))


def _changes_nothing(growth: Growth, depth: int) -> str:
    if isinstance(growth, Every):
        return f"interleave: every {growth.n}: the model has only {depth} layers, so none is added"
    return f"the directive adds and changes nothing: it gives the {depth} layers back as they are"
