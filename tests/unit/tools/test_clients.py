"""`make clients` pins its environments, and its page has a row for each client."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from clients import llama_cpp, registry, transformers4
from clients.environment import Environment
from clients.row import Row

ROOT = Path(__file__).parents[3]
REQUIREMENTS = sorted((ROOT / "tools" / "clients" / "requirements").glob("*.txt"))
PAGE = ROOT / "docs" / "clients.md"


@pytest.mark.parametrize("file", REQUIREMENTS, ids=lambda file: file.stem)
def test_every_package_is_pinned(file: Path) -> None:
    """Each line pins one release, and torch is left to the environment."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+", line) for line in lines)
    assert not any(line.startswith(("torch==", "torchvision", "nvidia")) for line in lines)


def test_the_version_of_a_package() -> None:
    """The table states the version that the file pins."""
    assert Environment("transformers-4.57").version("transformers").startswith("4.57.")


def test_a_row_is_one_line_of_the_table() -> None:
    """Line breaks and bars in a message do not break the table."""
    row = Row("a", "1", "b", "c", "an error\nwith a | bar")
    assert str(row) == "| a | 1 | b | c | an error with a / bar |"


def test_the_page_has_every_client() -> None:
    """docs/clients.md has a row for each client of the registry, installed or not."""
    cells = re.findall(r"^\| ([^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(registry.CLIENTS) <= set(cells)


def test_a_type_that_is_not_read_is_a_wrong_row() -> None:
    """A type of transformers4.json that transformers 4 does not report makes its row wrong."""
    row = transformers4._data("4.57", {})  # noqa: SLF001
    assert row.wrong
    assert "llama" in row.found


def test_a_row_states_another_growth_of_a_toy() -> None:
    """The row of toys names those that were not grown by `every 4`."""
    found = {name: llama_cpp._Outcome("different", warned=True) for name in ("exaone4", "gemma2")}  # noqa: SLF001
    rows = {row.found.partition(":")[0]: row for row in llama_cpp._summary("1", found)}  # noqa: SLF001
    row = rows["something else; `run` warns"]
    assert (row.ran, row.wrong) == ("2 toys, every 4, exaone4 every 32", False)
