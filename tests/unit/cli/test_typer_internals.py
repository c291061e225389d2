"""The parts of typer outside of its public interface still work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from mergekit_interleave.cli import _typer_internals
from mergekit_interleave.cli.app import COMMANDS, application

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.fixture(scope="module")
def group() -> Any:
    """Return all commands as typer builds them."""
    return typer.main.get_command(application())


@pytest.mark.parametrize("command", COMMANDS)
def test_values_stay_as_they_were_typed(group: Any, command: str) -> None:
    """An option's value is the typed text or a list of texts, and a flag's value is a bool."""
    found = group.commands[command]
    context = found.make_context(command, [], resilient_parsing=True)
    for param in found.get_params(context):
        assert isinstance(param.get_runtime_param(), _typer_internals.AsTyped), param.name
    words, expected = [], {}
    for param in found.params:
        if param.name in ("help", "words"):
            continue
        if getattr(param, "is_flag", False):
            words.append(param.opts[0])
            expected[param.name] = True
        elif param.param_type_name == "argument":
            words.append("007")
            expected[param.name] = ["007"] if param.nargs == -1 else "007"
        else:
            words += [param.opts[0], "007"]
            expected[param.name] = ["007"] if param.multiple else "007"
    if command == "run":
        words += ["1e3", "0x1"]
        expected["words"] = ["1e3", "0x1"]
    parsed = found.make_context(command, words)
    assert {name: parsed.params[name] for name in expected} == expected


def test_one_command_is_built_alone() -> None:
    """A single command is built without an import of the other commands' modules."""
    script = (
        "import sys\nfrom mergekit_interleave.cli.app import application\napplication('gen')\n"
        "print(*(m for m in sys.modules if m.startswith('mergekit_interleave.cli.')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "mergekit_interleave.cli.gen" in result.stdout
    assert "mergekit_interleave.cli.run" not in result.stdout


def test_typer_is_capped() -> None:
    """pyproject.toml has an upper bound for typer."""
    assert re.search(r'"typer>=[\d.]+,<[\d.]+"', PYPROJECT.read_text(encoding="utf-8"))
