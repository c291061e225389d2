"""The growth line `repeat: [8, 24]`: the layers of a range several times, all others once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING

from mergekit_interleave.directive.growth.base import (
    Flag,
    Growth,
    Line,
    Named,
    Schema,
    any_of,
    not_empty,
    positive,
    ref,
)
from mergekit_interleave.directive.growth.part import (
    definitions,
    is_block,
    parse_text,
    repeated,
    to_text,
)
from mergekit_interleave.directive.growth.windows import Windows
from mergekit_interleave.directive.layer_range import RANGE, Range, parse_range, resolve
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import DirectiveError, check_keys

if TYPE_CHECKING:
    from mergekit_interleave.directive.growth.explained import Pattern, Summary

KEY = "repeat"
DAMPED = "damped"
_TWICE = 2


@dataclass(frozen=True)
class Repeat(Growth):
    """The layers of a range `times` times in total, layer by layer or as a block.

    If it is `damped`, each of the occurrences adds only its share of the layer's update, the
    original included.
    """

    layers: Range
    times: int = _TWICE
    as_block: bool = False
    damped: bool = False

    @property
    def damping(self) -> int:
        """`times` if it is damped: a layer that is applied K times adds 1/K of its update."""
        return self.times if self.damped else 1

    @property
    def warning(self) -> str | None:
        """A damped block divides the update of each layer, not that of the whole block."""
        start, stop = self.layers
        is_one = isinstance(start, int) and isinstance(stop, int) and stop - start == 1
        if not (self.damped and self.as_block) or is_one:
            return None
        return (
            f"damped: each layer of the block adds 1/{self.times} of its own update in each pass; "
            f"this only approximates 1/{self.times} of the update of a block of several layers"
        )

    def ranges(self, depth: int, model: ModelRef) -> Iterator[tuple[int, int]]:
        """Return the layers before the range, the repeated range, and the layers after it."""
        start, stop = resolve(self.layers, depth, model)
        after = not_empty(stop, depth)
        if self.as_block:
            return chain([(0, stop)], repeat((start, stop), self.times - 1), after)
        copies = repeated(start, stop, self.times, as_block=False)
        return chain(not_empty(0, start), copies, after)

    def to_document(self, called: Callable[[ModelRef], object]) -> dict[str, object]:
        """Return the range as a list, or as text if it is not simply doubled."""
        del called
        if self.damped:
            times = {} if self.times == _TWICE else {"times": self.times}
            form = {"as": "block"} if self.as_block else {}
            return {KEY: {"layers": list(self.layers), **times, **form, "damped": True}}
        if (self.times, self.as_block) == (_TWICE, False):
            return {KEY: list(self.layers)}
        return {KEY: to_text(self.layers, self.times, _TWICE, as_block=self.as_block)}

    def sentence(self, made: Summary) -> str:
        """Describe how many layers are repeated, how often and how."""
        times = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
        how_often = times.get(self.times, f"{self.times} times")
        how = "as a block" if self.as_block else "side by side"
        if self.damped:
            share = f"each time with 1/{self.times} of the update"
            return (
                f"{made.repeated} of {made.depth} layers {how_often}, {how}, {share}: "
                "damped repetition"
            )
        woven = "" if self.as_block or made.kind == "block expansion" else "interwoven "
        return (
            f"{made.repeated} of {made.depth} layers {how_often}, {how}{made.copies_edited}: "
            f"{woven}{made.kind}"
        )


def _read(value: object, where: str, named: Named) -> Growth:
    del named
    times: object = _TWICE
    form: object = "layers"
    damped: object = False
    if isinstance(value, str):
        model, part = parse_text(value.replace(" ", ""), where)
        if model is not None or isinstance(part.layers, Windows):
            raise DirectiveError(f"{where}: expected START:STOP, found {value!r:.200}")
        layers = part.layers
        times = part.times if "x" in value else times
        form = "block" if part.as_block else form
    elif isinstance(value, Mapping):
        check_keys(value, ("layers", "times", "as", DAMPED), where)
        layers = parse_range(value.get("layers"), where)
        times = value.get("times", times)
        form = value.get("as", form)
        damped = value.get(DAMPED, damped)
    else:
        layers = parse_range(value, where)
    count = positive(times, f"{where}.times")
    if count < _TWICE:
        raise DirectiveError(
            f"{where}.times: {count} adds no layers", hint="`times` is the total, so at least 2"
        )
    if not isinstance(damped, bool):
        raise DirectiveError(f"{where}.{DAMPED}: expected true or false, found {damped!r:.80}")
    return Repeat(layers, count, is_block(form, where), damped)


def _propose(pattern: Pattern) -> Iterator[Growth]:
    if pattern.added <= 0:
        return
    counts = Counter(layer for bounds in pattern.written for layer in range(*bounds))
    copied = sorted(layer for layer, count in counts.items() if count > 1)
    if copied:
        layers, times = (copied[0], copied[-1] + 1), counts[copied[0]]
        is_scaled = any(part.scale for part in pattern.edited)
        for damped in (False, True) if is_scaled else (False,):
            yield Repeat(layers, times, damped=damped)
            yield Repeat(layers, times, as_block=True, damped=damped)


def _schema() -> Schema:
    return {
        "description": "Each layer of a range twice, side by side. `times` sets another total; "
        "`as: block` repeats the range as a whole; `damped: true` divides the update of each layer "
        "by its number of occurrences, the original included.",
        **any_of(
            ref("range"),
            {"type": "string", "pattern": rf"^\s*{RANGE}(x\d+)?(@(layers|block))?\s*$"},
            {
                "type": "object",
                "properties": {
                    "layers": ref("range"),
                    "times": {**ref("times"), "minimum": _TWICE},
                    "as": ref("as"),
                    DAMPED: {
                        "type": "boolean",
                        "description": "Whether each of K occurrences adds only 1/K of the "
                        "layer's update.",
                    },
                },
                "required": ["layers"],
                "additionalProperties": False,
            },
        ),
        "examples": [
            [8, 24],
            {"layers": [8, 24], "times": 3, "as": "block"},
            {"layers": [12, 16], DAMPED: True},
        ],
    }


LINE = Line(
    KEY,
    _read,
    _schema,
    flags=(
        Flag(
            "repeat",
            "START:STOP",
            "Double each layer of a range; 8:24x3@block repeats the range as a block, 3 times in "
            "total.",
        ),
    ),
    definitions=definitions,
    propose=_propose,
)
