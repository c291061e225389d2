"""Growth lines: what each says, and how it is written as YAML, as text and as a flag."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from mergekit_interleave.directive.layer_range import END, Range, is_relative
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import Scales, Zero


@dataclass(frozen=True)
class Every:
    """`interleave: every n`: a new layer after every nth layer; a last partial group gets none."""

    n: int


@dataclass(frozen=True)
class Spread:
    """`interleave: k layers`: k new layers, evenly spread."""

    count: int


@dataclass(frozen=True)
class Append:
    """`append: k`: k new copies of the last layer at the end."""

    count: int


@dataclass(frozen=True)
class Repeat:
    """`repeat: [start, stop]`: the layers of the range `times` times in all, the others once.

    Side by side, or, `as_block`, the range as a whole again and again.
    """

    layers: Range
    times: int = 2
    as_block: bool = False


@dataclass(frozen=True)
class Windows:
    """`windows: {size: s, stride: t}`: s layers, then s layers that start t later, and so on.

    The last one ends where the range does, be it shorter.
    """

    size: int
    stride: int
    layers: Range = (0, END)


@dataclass(frozen=True)
class Drop:
    """`drop: [start, stop]`: the model without these layers."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Part:
    """Some layers of one model, one after another.

    Attributes:
        layers: Which.
        model: Whose; None for the directive's own.
        times: How often in all.
        as_block: Whether the range is repeated as a whole, rather than each layer of it.
    """

    layers: Range | Windows
    model: ModelRef | None = None
    times: int = 1
    as_block: bool = False


@dataclass(frozen=True)
class Step:
    """Parts one after another, with what is done to all of their layers.

    Attributes:
        parts: The layers.
        zero: What to zero in them; None where nothing is said.
        scale: What to multiply their tensors by.
    """

    parts: tuple[Part, ...]
    zero: Zero | None = None
    scale: Scales = ()

    @property
    def is_plain(self) -> bool:
        """Whether nothing is done to the layers."""
        return self.zero is None and not self.scale


@dataclass(frozen=True)
class Stack:
    """`stack: [...]` and `layout: [...]`: steps one after another, and nothing else."""

    steps: tuple[Step, ...]

    @property
    def parts(self) -> Iterator[Part]:
        """All parts of all steps."""
        return (part for step in self.steps for part in step.parts)

    @property
    def is_plain(self) -> bool:
        """Whether `stack:` can say it: ranges of the directive's own model."""
        return all(step.is_plain for step in self.steps) and not self.models

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """The models that it names, in order."""
        return tuple(dict.fromkeys(part.model for part in self.parts if part.model is not None))

    def of(self, models: Mapping[ModelRef, ModelRef]) -> Stack:
        """The same layers of other models."""

        def other(part: Part) -> Part:
            return part if part.model is None else replace(part, model=models[part.model])

        return Stack(
            tuple(replace(step, parts=tuple(map(other, step.parts))) for step in self.steps)
        )


@dataclass(frozen=True)
class ExplicitSlices:
    """A mergekit config: its `slices:`, `models:` or `modules:`, as written."""

    document: Mapping[str, object]


Growth: TypeAlias = Every | Spread | Append | Repeat | Windows | Drop | Stack | ExplicitSlices


def stack_of(ranges: Iterable[Range]) -> Stack:
    """Ranges of one model, one after another."""
    return Stack(tuple(Step((Part(bounds),)) for bounds in ranges))


def needs_depth(growth: Growth) -> bool:
    """Whether a growth line says nothing without the depth of its model."""
    match growth:
        case Windows():
            return _is_relative(growth)
        case Stack():
            return any(_is_relative(part.layers) for part in growth.parts)
    return not isinstance(growth, ExplicitSlices)


def _is_relative(layers: Range | Windows) -> bool:
    bounds = layers.layers if isinstance(layers, Windows) else layers
    return any(map(is_relative, bounds))
