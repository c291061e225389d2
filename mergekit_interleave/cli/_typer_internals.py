"""All uses of typer internals in this project.

typer builds a pydantic adapter for every option that is more than a flag. That takes as long as
everything else that `gen` does when it starts. These classes keep option values as they were typed;
the commands check them. Because the attributes used here may change in any release, pyproject.toml
caps typer's version, and a test compares the help and the parsing of every option.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

from typer.core import TyperCommand, TyperGroup


class _Plain:
    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            param._runtime_param = AsTyped()  # noqa: SLF001
            if param.metavar is None:
                param.display_type_rich = _no_type
        return params


def _no_type(ctx: Any) -> None:
    """A flag takes no value, so its help shows no type."""


class PlainCommand(_Plain, TyperCommand):
    """A command whose option values stay text."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature
        """The usage line shows metavars, without the brackets that typer adds."""
        arguments = (p.metavar or "" for p in self.params if p.param_type_name == "argument")
        return ["[OPTIONS]", *arguments]


class PlainGroup(_Plain, TyperGroup):
    """A group of `PlainCommand`s."""


class AsTyped:
    """A replacement for typer's adapter that returns values unchanged."""

    def coerce(self, value: object, param: object, ctx: object) -> object:  # noqa: ARG002
        return list(value) if isinstance(value, tuple) else value


NAMED_SHELL = "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"
"""The variable that makes typer take the name of a shell rather than detect the shell."""


def take_named_shell(words: list[str]) -> None:
    """Let the completion options take a shell's name if one is given."""
    for word, shell in pairwise(words):
        if word in ("--show-completion", "--install-completion") and not shell.startswith("-"):
            os.environ[NAMED_SHELL] = "1"
