"""Required packages that are missing or too old are named."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mergekit_interleave import _requirements
from mergekit_interleave.errors import RequirementError


def pretend(place: Path, name: str, version: str) -> Path:
    """Make metadata that states another release of a package, and return its directory."""
    folder = place / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return place


def test_this_environment_meets_them() -> None:
    """The tests run with the required releases."""
    assert not _requirements.unmet()
    _requirements.check("torch", "transformers")


def test_an_old_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the releases; one that the hint lets pip install meets the requirement."""
    monkeypatch.syspath_prepend(pretend(tmp_path, "transformers", "4.57.6"))
    assert [each.name for each in _requirements.unmet()] == ["transformers"]
    _requirements.check("torch")
    with pytest.raises(RequirementError, match=r"transformers.*4\.57\.6") as caught:
        _requirements.check("torch", "transformers")
    monkeypatch.undo()  # as if pip had replaced the release
    for word in shlex.split(str(caught.value.hint).partition(" pip install ")[2]):
        assert Requirement(word).name == "transformers"
        assert Requirement(word).specifier.contains(metadata.version("transformers"))
    _requirements.check("torch", "transformers")


def test_the_command_line_names_them(tmp_path: Path) -> None:
    """A command line that cannot start is one error line with a remedy, and never a bug."""
    found = pretend(tmp_path, "typer", "0.1")
    code = (
        f"import sys; sys.modules['typer'] = None; sys.path.insert(0, {str(found)!r})\n"
        "from mergekit_interleave.__main__ import main; main()"
    )
    words = [sys.executable, "-c", code, "--help"]
    made = subprocess.run(words, capture_output=True, text=True, check=False)
    assert made.returncode == 1
    first, second = made.stderr.splitlines()
    assert first.startswith("error: ")
    assert "typer" in first
    assert second.startswith("hint: ")
    assert "report" not in made.stderr
