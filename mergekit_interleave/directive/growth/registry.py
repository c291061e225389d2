"""The registry of growth lines. Everything that lists growth lines reads `LINES`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.growth import (
    append,
    drop,
    interleave,
    layer_replication,
    layout,
    repeat,
    stack,
    windows,
)
from mergekit_interleave.directive.growth.base import Flag, Growth, Line
from mergekit_interleave.directive.model_ref import parse_model

if TYPE_CHECKING:
    from mergekit_interleave.directive.growth.explained import Pattern

LINES: dict[str, Line] = {
    line.key: line
    for line in (
        interleave.LINE,
        append.LINE,
        repeat.LINE,
        stack.LINE,
        windows.LINE,
        drop.LINE,
        layout.LINE,
        layer_replication.LINE,
    )
}
"""The growth lines by their keys in YAML, in the order of the help."""


def flags() -> dict[str, Flag]:
    """Return the flags of all growth lines by name, in the order of the help."""
    return {flag.name: flag for line in LINES.values() for flag in line.flags}


def has_line(keys: Collection[object]) -> bool:
    """Whether a growth line is among the keys of a document."""
    return any(key in keys for key in LINES)


def from_flag(name: str, text: str) -> Growth:
    """Parse the value of a growth flag.

    Args:
        name: Its name, without the dashes.
        text: Its value.

    Raises:
        DirectiveError: The value is invalid.
    """
    line = next(line for line in LINES.values() if any(flag.name == name for flag in line.flags))
    read = flags()[name].read
    if read is not None:
        return read(text, name)
    value = yaml_io.read(text, name) if yaml_io.is_structured(text) else text
    return line.read(value, name, parse_model)


def proposals(pattern: Pattern, *, several_models: bool) -> Iterator[Growth]:
    """Yield the growths that may produce the given slices.

    Args:
        pattern: The slices.
        several_models: Whether the slices are from several models.
    """
    for line in LINES.values():
        if line.proposes_several_models or not several_models:
            yield from line.propose(pattern)
