"""The growth line `stack: [[0, 24], [8, 32]]`: only the listed ranges of one model, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergekit_interleave.directive.growth.base import (
    Depths,
    Flag,
    Growth,
    Line,
    Named,
    Schema,
    any_of,
    ref,
)
from mergekit_interleave.directive.growth.part import (
    Part,
    definitions,
    entry_of,
    mapping_of,
    parse_part,
    parts_of,
)
from mergekit_interleave.directive.growth.windows import Windows
from mergekit_interleave.directive.layer_range import Range
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import Scales, Zero, scale_document, zero_document
from mergekit_interleave.errors import DirectiveError

if TYPE_CHECKING:
    from mergekit_interleave.directive.growth.explained import Pattern

KEY = "stack"


@dataclass(frozen=True)
class Step:
    """Parts one after another, and the edit that applies to all their layers.

    Attributes:
        parts: The layers.
        zero: What to zero in the layers; None if the step does not set it.
        scale: The factors of their tensors.
    """

    parts: tuple[Part, ...]
    zero: Zero | None = None
    scale: Scales = ()

    @property
    def is_plain(self) -> bool:
        """Whether the step leaves its layers unedited."""
        return self.zero is None and not self.scale


@dataclass(frozen=True)
class Stack(Growth):
    """Steps one after another, as written in `stack` or `layout`."""

    steps: tuple[Step, ...]

    @property
    def parts(self) -> Iterator[Part]:
        """All parts of all steps."""
        return (part for step in self.steps for part in step.parts)

    @property
    def is_plain(self) -> bool:
        """Whether `stack` can express it: it has only unedited ranges of the directive's model."""
        return all(step.is_plain for step in self.steps) and not self.models

    @property
    def edits_itself(self) -> bool:
        """Whether only `layout` can express it."""
        return not self.is_plain

    @property
    def needs_model(self) -> bool:
        """Whether a part takes layers of the directive's own model."""
        return any(part.model is None for part in self.parts)

    @property
    def needs_depth(self) -> bool:
        """Whether the layers of a part depend on the depth of its model."""
        return any(part.needs_depth for part in self.parts)

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """The models that the steps name, in order."""
        return tuple(dict.fromkeys(part.model for part in self.parts if part.model is not None))

    def of(self, models: Mapping[ModelRef, ModelRef]) -> Stack:
        """Return the same steps, with each named model replaced by its value in `models`."""

        def other(part: Part) -> Part:
            return part if part.model is None else replace(part, model=models[part.model])

        return Stack(
            tuple(replace(step, parts=tuple(map(other, step.parts))) for step in self.steps)
        )

    def ranges(self, depth: int, model: ModelRef) -> Iterator[tuple[int, int]]:
        """Return the ranges of all parts, as if they were of one model."""
        return (bounds for part in self.parts for bounds in part.ranges(depth, model))

    def slices(
        self, model: ModelRef | None, depth_of: Depths
    ) -> Iterator[tuple[ModelRef, int, int, Step]]:
        """Yield the slices of each part, with the model of the part."""
        for step in self.steps:
            for part in step.parts:
                source = part.model or model
                if source is None:
                    raise TypeError("a part without a model")
                for start, stop in part.ranges(depth_of(source), source):
                    yield source, start, stop, step

    def to_document(self, called: Callable[[ModelRef], object]) -> dict[str, object]:
        """Return the entries under `stack`, or under `layout` if `stack` cannot express them."""
        entries = [entry for step in self.steps for entry in _entries(step, called)]
        return {KEY if self.is_plain else "layout": entries}


def _entries(step: Step, called: Callable[[ModelRef], object]) -> list[object]:
    """Return the entries for a step: one, or several if its layers are not edited."""
    written = [entry_of(part, called) for part in step.parts]
    rule: dict[str, object] = {}
    if step.zero is not None:
        rule["zero"] = zero_document(step.zero)
    if step.scale:
        rule["scale"] = scale_document(step.scale)
    if any(entry is None for entry in written):
        return [{**mapping_of(part, called), **rule} for part in step.parts]
    if not rule:
        return written
    return [{"layers": written if len(written) > 1 else written[0], **rule}]


def stack_of(ranges: Iterable[Range]) -> Stack:
    """Build a stack of ranges of one model."""
    return Stack(tuple(Step((Part(bounds),)) for bounds in ranges))


def _read(value: object, where: str, named: Named) -> Growth:
    del named
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list) or not value:
        raise DirectiveError(
            f"{where}: expected a list of ranges, found {value!r:.200}",
            hint="for example `stack: [[0, 24], [8, 32]]` or `--stack 0:24,8:32`",
        )

    def refuse(*_: object) -> ModelRef:
        raise DirectiveError(
            f"{where}: all ranges must be of one model", hint="use `layout:` for several models"
        )

    parts = (parse_part(entry, f"{where}[{i}]", refuse) for i, entry in enumerate(value))
    return Stack(tuple(Step((part,)) for part in parts))


def _propose(pattern: Pattern) -> Iterator[Growth]:
    for ranges in dict.fromkeys((pattern.written, pattern.uncut)):
        parts = list(parts_of(ranges))
        if len(parts) > 1 or not isinstance(
            parts[0].layers, Windows
        ):  # the `windows` line proposes that
            yield Stack(tuple(Step((part,)) for part in parts))


def _schema() -> Schema:
    return {
        "description": "Only the listed ranges of one model, one after another.",
        **any_of({"type": "string"}, {"type": "array", "items": ref("part"), "minItems": 1}),
        "examples": [[[0, 24], [8, 32]]],
    }


LINE = Line(
    KEY,
    _read,
    _schema,
    flags=(
        Flag(
            "stack",
            "RANGE,...",
            "Stack ranges, such as 0:24,8:32, one after another.",
            repeatable=True,
        ),
    ),
    definitions=definitions,
    propose=_propose,
)
