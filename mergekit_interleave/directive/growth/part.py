"""Parse and write parts: layers of one model, as an entry of `stack`, `layout` or `repeat`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat

from mergekit_interleave.directive.growth.base import (
    Named,
    Ranges,
    Schema,
    any_of,
    positive,
    ref,
)
from mergekit_interleave.directive.growth.windows import (
    FEWEST,
    KEY,
    Windows,
    parse_windows,
    windows_at,
)
from mergekit_interleave.directive.layer_range import (
    RANGE,
    Range,
    is_range,
    is_relative,
    parse_range,
    resolve,
)
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.errors import DirectiveError, check_keys


@dataclass(frozen=True)
class Part:
    """Some layers of one model, one after another.

    Attributes:
        layers: The layers.
        model: The model; None means the directive's own model.
        times: The total number of occurrences of the layers.
        as_block: Whether the range is repeated as a whole, rather than layer by layer.
    """

    layers: Range | Windows
    model: ModelRef | None = None
    times: int = 1
    as_block: bool = False

    @property
    def needs_depth(self) -> bool:
        """Whether its layers depend on the number of layers of the model."""
        if isinstance(self.layers, Windows):
            return self.layers.needs_depth
        return any(map(is_relative, self.layers))

    def ranges(self, depth: int | None, model: ModelRef) -> Iterator[tuple[int, int]]:
        """Return its slices, each as a range of source layers.

        Raises:
            LayoutError: The model has no such layers, or its depth is needed but unknown.
        """
        if isinstance(self.layers, Windows):
            return self.layers.ranges(depth, model)
        start, stop = resolve(self.layers, depth, model)
        return repeated(start, stop, self.times, as_block=self.as_block)


def repeated(start: int, stop: int, times: int, *, as_block: bool) -> Iterator[tuple[int, int]]:
    """Repeat a range `times` times in total, as a whole or layer by layer."""
    if times == 1 or as_block:
        return repeat((start, stop), times)
    return ((i, i + 1) for i in range(start, stop) for _ in range(times))


_LAYERS = rf"(?P<range>{RANGE})(?:x(?P<times>\d+))?(?:@(?P<form>layers|block))?"


def parse_text(text: str, where: str) -> tuple[str | None, Part]:
    """Parse a part that is written as text: `a 8:24x3@block` or `windows 20:10@0:80`.

    Returns:
        The name of the model, if there is one, and the part without a model.

    Raises:
        DirectiveError: The text is not a part.
    """
    before, _, last = text.strip().rpartition(" ")
    model, _, word = before.strip().rpartition(" ")
    if word == KEY:
        return model.strip() or None, Part(parse_windows(last, where))
    match = re.fullmatch(_LAYERS, last)
    if match is None or before.rstrip().endswith(","):
        if re.fullmatch(r"[^:]+:[^:]+", last):
            parse_range(last, where)  # raises an error that names the wrong bound
        raise DirectiveError(
            f"{where}: expected START:STOP, found {text!r:.200}",
            hint="for example 8:24, 8:24x3, 8:24x3@block or -8:end",
        )
    times = positive(match["times"] or 1, f"{where}.times")
    layers = parse_range(match["range"], where)
    return before.strip() or None, Part(layers, times=times, as_block=match["form"] == "block")


def parse_part(value: object, where: str, named: Named) -> Part:
    """Parse an entry: a range, a part as text, or `{windows: ...}`.

    Raises:
        DirectiveError: The entry has none of these forms.
    """
    if isinstance(value, str):
        model, part = parse_text(value, where)
        return part if model is None else replace(part, model=named(model, where))
    if isinstance(value, Mapping) and KEY in value:
        check_keys(value, (KEY,), where)
        return Part(parse_windows(value[KEY], where))
    return Part(parse_range(value, where))


def parse_parts(value: object, where: str, named: Named) -> list[Part]:
    """Parse one entry or a list of entries.

    Raises:
        DirectiveError: An entry is not a part.
    """
    if isinstance(value, list) and any(map(is_range, value)):
        return [parse_part(entry, f"{where}[{i}]", named) for i, entry in enumerate(value)]
    return [parse_part(value, where, named)]


def is_block(form: object, where: str) -> bool:
    """Parse the value of `as`, and return whether it is `block`.

    Raises:
        DirectiveError: The value is neither `layers` nor `block`.
    """
    if form not in ("layers", "block"):
        raise DirectiveError(f"{where}.as: expected `layers` or `block`, found {form!r:.80}")
    return form == "block"


def to_text(layers: Range, times: int, usual: int, *, as_block: bool) -> str:
    """Return a range as text, such as `8:24x3@block`; `times` is omitted if it is `usual`."""
    again = f"x{times}" if times != usual else ""
    return f"{layers[0]}:{layers[1]}{again}{'@block' if as_block else ''}"


def entry_of(part: Part, called: Callable[[ModelRef], object]) -> object:
    """Return a part as an entry of a list, or None if only a mapping can express it."""
    name = None if part.model is None else called(part.model)
    if isinstance(part.layers, Windows):
        text = f"{KEY} {part.layers}"
    elif name is None and part.times == 1:
        return list(part.layers)
    else:
        text = to_text(part.layers, part.times, 1, as_block=part.as_block)
    if name is None:
        return text
    if isinstance(name, str) and _is_read_back(f"{name} {text}", name):
        return f"{name} {text}"
    return None


def _is_read_back(text: str, name: str) -> bool:
    """Whether parsing the text of a part returns the same model name."""
    try:
        return parse_text(text, "")[0] == name
    except DirectiveError:
        return False


def mapping_of(part: Part, called: Callable[[ModelRef], object]) -> dict[str, object]:
    """Return a part as a mapping, which can express every part."""
    entry: dict[str, object] = {} if part.model is None else {"model": called(part.model)}
    if isinstance(part.layers, Windows):
        entry[KEY] = part.layers.to_mapping()
    else:
        entry["layers"] = list(part.layers)
    if part.times > 1:
        entry["times"] = part.times
    if part.as_block:
        entry["as"] = "block"
    return entry


def parts_of(ranges: Ranges) -> Iterator[Part]:
    """Express ranges of one model in few parts.

    At each index, take the pattern that covers the most ranges.
    """
    i = 0
    while i < len(ranges):
        length, part = max(_patterns(ranges, i), key=lambda pattern: pattern[0])
        yield part
        i += length


def _patterns(ranges: Ranges, i: int) -> Iterator[tuple[int, Part]]:
    """Yield the patterns that begin at an index, each with the number of ranges that it covers."""
    start, stop = ranges[i]
    yield 1, Part((start, stop))
    times = _count_equal(ranges, i)
    if times > 1:
        yield times, Part((start, stop), times=times, as_block=stop - start > 1)
        if stop - start == 1:
            layer, j = start, i
            while j < len(ranges) and ranges[j] == (layer, layer + 1):
                if _count_equal(ranges, j) < times:
                    break
                layer, j = layer + 1, j + times
            yield j - i, Part((start, layer), times=times)
    count, windows = windows_at(ranges, i)
    if count >= FEWEST:
        yield count, Part(windows)


def _count_equal(ranges: Ranges, i: int) -> int:
    """Count how often the range at an index occurs in a row."""
    j = i
    while j < len(ranges) and ranges[j] == ranges[i]:
        j += 1
    return j - i


def definitions() -> Schema:
    """Return the definitions of parts for `$defs` of the schema."""
    return {
        "part": {
            "description": "Layers of one model: [0, 24], or text such as `a 0:24x2@block` or "
            "`windows 20:10@0:80`.",
            **any_of(
                ref("range"),
                {"type": "string", "pattern": rf"(^|\s)({RANGE}(x\d+)?(@(layers|block))?)\s*$"},
                {"type": "string", "pattern": rf"(^|\s)windows\s+\d+:\d+(@{RANGE})?\s*$"},
                {
                    "type": "object",
                    "properties": {KEY: ref(KEY)},
                    "required": [KEY],
                    "additionalProperties": False,
                },
            ),
        },
        "times": {"type": "integer", "minimum": 1, "description": "How many times in total."},
        "as": {
            "enum": ["layers", "block"],
            "description": "layers: repeat each layer next to itself; block: repeat the range as "
            "a whole.",
        },
    }
