"""Contain all uses of typer internals in this project.

typer builds a pydantic adapter for every option that takes a value, which doubles the start-up time
of `gen`. These classes leave option values as text, and the commands check them. The attributes
used here may change in any release, so pyproject.toml caps typer's version, and a test checks the
parsing of every option.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

from typer.core import TyperCommand, TyperGroup


class _Plain:
    """A mixin for commands and groups that leave option values as text."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            param._runtime_param = AsTyped()  # noqa: SLF001
            if param.metavar is None or param.param_type_name == "argument":
                param.display_type_rich = _no_type
        return params


def _no_type(ctx: Any) -> None:
    """Show no type in the help of a flag or an argument."""


class PlainCommand(_Plain, TyperCommand):
    """A command that leaves option values as text."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature
        """Return the usage line, with metavars but without the brackets that typer adds."""
        arguments = (p.metavar or "" for p in self.params if p.param_type_name == "argument")
        return ["[OPTIONS]", *arguments]


class PlainGroup(_Plain, TyperGroup):
    """A group of `PlainCommand`s."""


class AsTyped:
    """A replacement for typer's adapter that leaves option values as text."""

    def coerce(self, value: object, param: object, ctx: object) -> object:  # noqa: ARG002
        return list(value) if isinstance(value, tuple) else value


NAMED_SHELL = "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"
"""The environment variable that makes typer accept the name of a shell."""


def take_named_shell(words: list[str]) -> None:
    """Let the completion options accept the name of a shell; without one, typer detects it."""
    for word, shell in pairwise(words):
        if word in ("--show-completion", "--install-completion") and not shell.startswith("-"):
            os.environ[NAMED_SHELL] = "1"
