"""List the engines by name, in the order in which `--engine auto` tries them.

This module imports no engine, so that the command line can list their names quickly.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, NamedTuple, cast

from mergekit_interleave.errors import DirectiveError, nearest

if TYPE_CHECKING:
    from mergekit_interleave.engines.protocol import Engine

AUTO, MERGEKIT, STREAM = "auto", "mergekit", "stream"

VARIABLE = "MK_INTERLEAVE_ENGINE"
"""The environment variable that names the engine if no option does."""

OPTION = "--engine"


class EngineRow(NamedTuple):
    """The facts about an engine that are known without importing it.

    Attributes:
        name: The value of `--engine`.
        title: Its name in messages.
        module: The module that is the engine; see `protocol.Engine`.
        packages: The libraries that it loads; interleave.json records their versions.
        multiplies: Whether it multiplies by zero, which does not turn an infinity or NaN into zero.
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


class Request(NamedTuple):
    """The engine that the user asked for.

    Attributes:
        name: The name of an engine, or `auto`.
        source: The option or the environment variable that names it; None if neither does.
    """

    name: str = AUTO
    source: str | None = None

    @property
    def remedy(self) -> str:
        """How to let this project choose the engine, as words for a hint."""
        return f"unset {VARIABLE}" if self.source == VARIABLE else f"pass {OPTION} {AUTO}"


NO_REQUEST = Request()


def requested(stated: str | None) -> Request:
    """Return the requested engine: the stated one, or the one in the environment, or `auto`.

    Raises:
        DirectiveError: There is no such engine.
    """
    name, source = (os.environ.get(VARIABLE), VARIABLE) if stated is None else (stated, OPTION)
    if not name:
        return NO_REQUEST
    if name not in names():
        close = nearest(name, names())
        raise DirectiveError(
            f"{source}: unknown engine {name!r}",
            hint=f"did you mean {close}?" if close else f"use one of {', '.join(names())}",
        )
    return Request(name, source)


def names() -> tuple[str, ...]:
    """Return the values that `--engine` accepts."""
    return (AUTO, *ENGINES)


def rows(name: str) -> tuple[EngineRow, ...]:
    """Return the engines that a known name selects: one, or all of them for `auto`."""
    return tuple(ENGINES.values()) if name == AUTO else (ENGINES[name],)
