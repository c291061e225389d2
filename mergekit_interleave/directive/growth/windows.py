"""The growth line `windows: {size: 20, stride: 10}`: overlapping ranges of equal size."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergekit_interleave.directive.growth.base import (
    COUNT,
    Depths,
    Flag,
    Growth,
    Line,
    Named,
    Ranges,
    Schema,
    any_of,
    positive,
    ref,
)
from mergekit_interleave.directive.layer_range import (
    END,
    RANGE,
    Range,
    is_relative,
    parse_range,
    resolve,
)
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import DirectiveError, check_keys

if TYPE_CHECKING:
    from mergekit_interleave.directive.growth.explained import Pattern, Summary

KEY = "windows"
"""The key, and the prefix of windows in a list of ranges: `windows 20:10`."""

_ALL: Range = (0, END)


@dataclass(frozen=True)
class Windows(Growth):
    """Windows of `size` layers, each of which starts `stride` layers after the one before.

    The last window ends with the range and may be shorter.
    """

    size: int
    stride: int
    layers: Range = _ALL

    @property
    def needs_depth(self) -> bool:
        """Whether the range depends on the depth."""
        return any(map(is_relative, self.layers))

    def ranges(self, depth: int | None, model: ModelRef) -> Iterator[tuple[int, int]]:
        """Yield the windows, from first to last."""
        start, end = resolve(self.layers, depth, model)
        stop = start
        while stop < end:
            stop = min(start + self.size, end)
            yield start, stop
            start += self.stride

    def slices(
        self, model: ModelRef | None, depth_of: Depths
    ) -> Iterator[tuple[ModelRef, int, int, None]]:
        """Yield the windows of a model whose depth may be unknown."""
        if model is None:
            raise TypeError("windows without a model")
        for start, stop in self.ranges(depth_of(model), model):
            yield model, start, stop, None

    def to_mapping(self) -> dict[str, object]:
        """Return the windows as a YAML mapping."""
        written: dict[str, object] = {"size": self.size, "stride": self.stride}
        return written if self.layers == _ALL else {**written, "layers": list(self.layers)}

    def to_document(self, called: Callable[[ModelRef], object]) -> dict[str, object]:
        """Return size, stride and range under the key."""
        del called
        return {KEY: self.to_mapping()}

    def __str__(self) -> str:
        start, stop = self.layers
        over = "" if self.layers == _ALL else f"@{start}:{stop}"
        return f"{self.size}:{self.stride}{over}"

    def sentence(self, made: Summary) -> str:
        """Describe how many windows there are."""
        windows = f"{made.slices} windows of {self.size} layers"
        return f"{windows}, each starting {self.stride} layers after the previous one: a self-merge"


_TEXT = rf"(?P<size>\d+):(?P<stride>\d+)(?:@(?P<over>{RANGE}))?"


def parse_windows(value: object, where: str) -> Windows:
    """Parse windows: `{size: 20, stride: 10, layers: [0, 80]}`, or the text `20:10@0:80`.

    Raises:
        DirectiveError: The value is invalid, or the windows leave out layers.
    """
    if isinstance(value, str):
        match = re.fullmatch(_TEXT, value.replace(" ", ""))
        if match is not None:
            layers = parse_range(match["over"], where) if match["over"] else _ALL
            return _checked(match["size"], match["stride"], layers, where)
    if not isinstance(value, Mapping):
        raise DirectiveError(
            f"{where}: expected a size and a stride, found {value!r:.200}",
            hint="for example `windows: {size: 20, stride: 10}` or `--windows 20:10`",
        )
    check_keys(value, ("size", "stride", "layers"), where)
    for key in ("size", "stride"):
        if key not in value:
            raise DirectiveError(
                f"{where}: `{key}` is missing",
                hint="for example `windows: {size: 20, stride: 10}`",
            )
    layers = parse_range(value["layers"], f"{where}.layers") if "layers" in value else _ALL
    return _checked(value["size"], value["stride"], layers, where)


def _checked(size: object, stride: object, layers: Range, where: str) -> Windows:
    windows = Windows(positive(size, f"{where}.size"), positive(stride, f"{where}.stride"), layers)
    if windows.stride > windows.size:
        raise DirectiveError(
            f"{where}: a stride of {windows.stride} would leave out layers between windows of "
            f"size {windows.size}",
            hint="choose a stride up to the size; to leave out layers, use `drop:`",
        )
    return windows


def _read(value: object, where: str, named: Named) -> Growth:
    del named
    return parse_windows(value, where)


FEWEST = 3
"""The minimum number of windows to propose; fewer are shorter when written as ranges."""


def windows_at(ranges: Ranges, i: int) -> tuple[int, Windows]:
    """Find the windows that begin at an index of a list of ranges, and count the windows."""
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
    return j - i, Windows(size, max(stride, 1), (start, ranges[j - 1][1]))


def _propose(pattern: Pattern) -> Iterator[Growth]:
    for ranges in dict.fromkeys((pattern.written, pattern.uncut)):
        count, windows = windows_at(ranges, 0)
        if count == len(ranges) >= FEWEST:
            whole = windows.layers == (0, pattern.depth)
            yield replace(windows, layers=_ALL) if whole else windows


def _schema() -> Schema:
    return {
        **ref(KEY),
        "description": "Overlapping windows: {size: 20, stride: 10}, or the text 20:10.",
        "examples": [{"size": 20, "stride": 10}],
    }


def _definitions() -> Schema:
    return {
        KEY: {
            "description": "Ranges of `size` layers, each of which starts `stride` layers after "
            "the one before; the last one may be shorter.",
            **any_of(
                {"type": "string", "pattern": rf"^\s*\d+:\d+(@{RANGE})?\s*$"},
                {
                    "type": "object",
                    "properties": {
                        "size": {**COUNT, "description": "The layers of a window."},
                        "stride": {
                            **COUNT,
                            "description": "The layers from one start to the next.",
                        },
                        "layers": {
                            **ref("range"),
                            "description": "The layers to cover; by default all.",
                        },
                    },
                    "required": ["size", "stride"],
                    "additionalProperties": False,
                },
            ),
        }
    }


LINE = Line(
    KEY,
    _read,
    _schema,
    flags=(
        Flag(KEY, "SIZE:STRIDE", "Stack windows of SIZE layers that start STRIDE layers apart."),
    ),
    definitions=_definitions,
    propose=_propose,
)
