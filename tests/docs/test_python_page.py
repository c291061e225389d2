"""docs/python.md is generated from the docstrings and has every public name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mergekit_interleave as api

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import python_reference  # noqa: E402 - a script beside the package

PAGE = python_reference.PAGE.read_text(encoding="utf-8")


def test_it_is_current() -> None:
    """docs/python.md is the output of `make docs`."""
    assert python_reference.page() == PAGE


def test_every_public_name_is_in_it() -> None:
    """Each public name has a section or a row in the table of errors."""
    for name in set(api.__all__) - {"__version__"}:
        assert re.search(rf"^(### {name}$|\| `{name}` \|)", PAGE, re.MULTILINE), name


def test_every_argument_is_described() -> None:
    """Each argument of a signature has a row in the table below it."""
    for section in PAGE.split("\n### ")[1:]:
        signature = re.search(r"```python\n(.*?)```", section, re.DOTALL)
        for name in re.findall(r"(?:^\w+\(|^    |, )(\w+):", signature[1] if signature else ""):
            assert f"| `{name}` |" in section, (section.splitlines()[0], name)
