"""The heart: a layout is the ordered layers of the new model. Pure: no I/O, no torch.

Vocabulary, here and everywhere: the *original* is the first unscaled occurrence of a source
layer; every other occurrence is a *new layer*, to be trained; a new layer whose residual
writers are *zeroed* passes its input on unchanged. Indices start at 0, ranges are half-open.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
        seen: dict[ModelRef, set[int]] = {}
        layers: list[Layer] = []
        for part in self.slices:
            before = seen.setdefault(part.model, set())
            unscaled = not part.constants and all(scale.value == 1 for scale in part.scales)
            for source in range(part.start, part.stop):
                new = not unscaled or source in before
                if not new:
                    before.add(source)
                layers.append(
                    Layer(len(layers), part.model, source, part.scales, part.constants, new)
                )
        return tuple(layers)

    @property
    def new_layers(self) -> tuple[Layer, ...]:
        """The layers to be trained."""
        return tuple(layer for layer in self.layers if layer.new)

    @cached_property
    def models(self) -> tuple[ModelRef, ...]:
        """The source models, in the order of their first layer."""
        return tuple(dict.fromkeys(part.model for part in self.slices))

    def __len__(self) -> int:
        return sum(len(part) for part in self.slices)

    def is_base(self, depth: int) -> bool:
        """Whether this is just its source model, layer for layer."""
        plain = not any(layer.new for layer in self.layers) and len(self.models) == 1
        return plain and [layer.source for layer in self.layers] == list(range(depth))


def joined(slices: Sequence[Slice], *, across_edits: bool = False) -> list[Slice]:
    """Slices with those joined that follow one another in the model, unedited.

    Args:
        slices: The slices.
        across_edits: Join only where the edit changes, and keep the boundaries of equal ones.
    """
    found: list[Slice] = []
    edits: list[Edit] = []
    for part in slices:
        edit = Edit(part.scales, part.constants)
        last = found[-1] if found else None
        follows = last is not None and (last.model, last.stop) == (part.model, part.start)
        if follows and last is not None and not (across_edits and edits[-1] == edit):
            found[-1] = replace(last, stop=part.stop)
        else:
            found.append(Slice(part.model, part.start, part.stop))
        edits.append(edit)
    return found


Depths: TypeAlias = "int | Callable[[ModelRef], int | None] | None"
"""The number of layers, of the one model or of each; None where it is not known."""


def distances(layout: Layout) -> list[int]:
    """How many layers each copy stands from its original, in the order of the copies.

    LongCAT's argument for copies side by side is that these numbers are small.
    """
    layers = layout.layers
    originals = {(layer.model, layer.source): layer.index for layer in layers if not layer.new}
    pairs = ((layer, originals.get((layer.model, layer.source))) for layer in layout.new_layers)
    return [abs(layer.index - original) for layer, original in pairs if original is not None]


def expand(  # noqa: PLR0913 - what is known, and what is asked
    growth: Growth,
    model: ModelRef | None,
    depth: Depths,
    edit: Callable[[Layer], Edit] | None = None,
    *,
    apply_to: str = COPIES,
    step_edit: Callable[[Step, Layer], Edit] | None = None,
) -> Layout:
    """The layout that a growth line gives on a model.

    Args:
        growth: What to do; not `ExplicitSlices`, which is a layout already.
        model: The source model; None where the growth line names its own.
        depth: Its number of layers. None where it is not known, which not every line can bear.
        edit: What is done to a new layer; None makes plain copies.
        apply_to: To which of the equal layers.
        step_edit: What is done to a layer of a step that says it.

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
            raise LayoutError(f"more than {MAX_LAYERS} layers would come of this")
        whole = Slice(source, start, stop)
        if step is None or step.is_plain or step_edit is None:
            slices.append(whole)
        else:
            layers = (
                Layer(total + i, source, start + i, (), (), new=True) for i in range(stop - start)
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
    """A slice with its layers edited, cut where the edit changes."""
    start = part.start
    for how, alike in groupby(edits):
        stop = start + len(list(alike))
        yield Slice(part.model, start, stop, how.scales, how.constants)
        start = stop


def _edit_new_layers(
    layout: Layout, edit: Callable[[Layer], Edit], apply_to: str, settled: Collection[int]
) -> Layout:
    """The layout with its new layers edited, but for those whose step says what is done to them."""
    slices: list[Slice] = []
    which = chosen(layout, apply_to, settled)
    layers = iter(layout.layers)
    for part in layout.slices:
        mine = list(islice(layers, len(part)))
        if mine[0].index in settled:
            slices.append(part)
            continue
        edits = (edit(layer) if layer.index in which else Edit() for layer in mine)
        slices += _split(part, edits)
    return Layout(tuple(slices))


def chosen(layout: Layout, apply_to: str, settled: Collection[int] = ()) -> set[int]:
    """The indices of the layers that a growth line's edit applies to.

    Args:
        layout: The layers, edited only where their step says it.
        apply_to: To which of equal layers.
        settled: The indices of the layers whose step says what is done to them.
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
    which = {FIRST: slice(1, 2), LAST: slice(-1, None), ALL: slice(None)}[apply_to]
    return {i for indices in equal.values() if len(indices) > 1 for i in indices[which]}
