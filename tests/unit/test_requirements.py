"""Required packages that are missing or too old are named."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from harness import state_release
from packaging.requirements import Requirement

from mergekit_interleave import _requirements
from mergekit_interleave.errors import RequirementError


def test_this_environment_meets_them() -> None:
    """The tests run with the required releases."""
    assert not _requirements.unmet()
    _requirements.check("torch", "transformers")


def test_an_old_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the releases; one that the hint lets pip install meets the requirement."""
    state_release(tmp_path, "transformers", "4.57.6")
    monkeypatch.syspath_prepend(tmp_path)
    assert [each.name for each in _requirements.unmet()] == ["transformers"]
    _requirements.check("torch")
    with pytest.raises(RequirementError, match=r"transformers.*4\.57\.6") as caught:
        _requirements.check("torch", "transformers")
    monkeypatch.undo()  # as if pip had replaced the release
    (word,) = shlex.split(str(caught.value.hint).partition(" pip install ")[2])
    assert Requirement(word).name == "transformers"
    assert Requirement(word).specifier.contains(metadata.version("transformers"))
    _requirements.check("torch", "transformers")


def test_the_command_line_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line that cannot start is one error line with a remedy, and never a bug."""
    state_release(tmp_path, "typer", "0.1")
    code = (
        f"import sys; sys.modules['typer'] = None; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from mergekit_interleave.__main__ import main; main()"
    )
    words = [sys.executable, "-c", code, "--help"]
    made = subprocess.run(words, capture_output=True, text=True, check=False)
    assert made.returncode == 1
    monkeypatch.syspath_prepend(tmp_path)
    assert [each.name for each in _requirements.unmet()] == ["typer"]
    expected = _requirements.error_of(_requirements.unmet())
    assert made.stderr.splitlines() == [f"error: {expected}", f"hint: {expected.hint}"]
