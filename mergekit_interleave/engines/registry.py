"""The engines by name, in the order in which `--engine auto` tries them.

This module imports no engine, so that the command line can list their names at no cost.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple, cast

from mergekit_interleave.errors import DirectiveError, nearest

if TYPE_CHECKING:
    from mergekit_interleave.engines.protocol import Engine

AUTO, MERGEKIT, STREAM = "auto", "mergekit", "stream"


class EngineRow(NamedTuple):
    """What is known of an engine before it is imported.

    Attributes:
        name: What `--engine` takes.
        title: The subject of a sentence about it.
        module: The module that is the engine; see `protocol.Engine`.
        packages: The libraries that it loads, whose versions interleave.json records.
        multiplies: Whether it makes zeros by multiplication, which an infinity or NaN survives.
    """

    name: str
    title: str
    module: str
    packages: tuple[str, ...] = ()
    multiplies: bool = False

    def load(self) -> Engine:
        """Import the engine."""
        return cast("Engine", importlib.import_module(self.module))


ENGINES: dict[str, EngineRow] = {
    row.name: row
    for row in (
        EngineRow(
            MERGEKIT,
            title="mergekit",
            module="mergekit_interleave.engines.mergekit",
            packages=("mergekit", "torch", "transformers", "safetensors"),
            multiplies=True,
        ),
        EngineRow(STREAM, title="the stream engine", module="mergekit_interleave.engines.stream"),
    )
}


def names() -> tuple[str, ...]:
    """What `--engine` takes."""
    return (AUTO, *ENGINES)


def rows(name: str) -> tuple[EngineRow, ...]:
    """The engines that a name stands for: one, or all of them for `auto`.

    Raises:
        DirectiveError: There is no such engine.
    """
    if name == AUTO:
        return tuple(ENGINES.values())
    if name not in ENGINES:
        close = nearest(name, names())
        raise DirectiveError(
            f"--engine: {name!r} is not an engine",
            hint=f"did you mean {close}?" if close else f"use one of {', '.join(names())}",
        )
    return (ENGINES[name],)
