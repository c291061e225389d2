"""Checks of the repository itself: workflows, hooks, packages and the contributor guide."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mergekit_interleave"
GITHUB = sorted((ROOT / ".github").rglob("*.yml"))


@pytest.mark.parametrize("file", GITHUB, ids=[file.name for file in GITHUB])
def test_github_files_are_yaml(file: Path) -> None:
    """Every file that GitHub reads is valid YAML with a mapping at its top."""
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


def test_actions_are_pinned_by_hash() -> None:
    """Every action is pinned by a full commit hash, and a comment names its version."""
    text = "".join(file.read_text(encoding="utf-8") for file in GITHUB)
    uses = re.findall(r"^\s*-? *uses: (.*)$", text, re.MULTILINE)
    assert uses
    for line in uses:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", line), line


def test_workflows_have_least_permissions() -> None:
    """A workflow grants no permissions, and each job grants read access only."""
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {}
        for name, job in workflow["jobs"].items():
            assert job["permissions"] == {"contents": "read"}, name


def test_workflows_run_the_commands_of_the_makefile() -> None:
    """The workflows run `make check` and `make test`, and each `make` target in them exists."""
    text = "".join(f.read_text() for f in (ROOT / ".github" / "workflows").glob("*.yml"))
    ran = {*re.findall(r"run: make ([\w-]+)", text)}
    targets = {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)}
    assert {"check", "test"} <= ran <= targets


def test_the_hooks_use_the_pinned_ruff() -> None:
    """The pre-commit hooks run the ruff version that constraints.txt pins."""
    pinned = re.search(r"^ruff==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert pinned is not None
    assert {*re.findall(r"ruff==([\d.]+)", hooks)} == {pinned[1]}


PACKAGES = sorted(file.parent for file in PACKAGE.rglob("__init__.py") if file.parent != PACKAGE)


@pytest.mark.parametrize("package", PACKAGES, ids=[package.name for package in PACKAGES])
def test_packages_have_a_purpose(package: Path) -> None:
    """The docstring of a package states its purpose and how to add to it."""
    words = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    assert words is not None
    purpose, addition = re.split(r"\.\s+", words.removesuffix("."), maxsplit=1)
    assert purpose
    assert re.search(r"^(A new|To add)\b", addition)


def test_packages_are_in_the_guide_for_contributors() -> None:
    """CONTRIBUTING.md has a row for each top-level package."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        if package.parent == PACKAGE:
            assert f"| `{package.name}/` |" in page, package.name


def test_targets_that_write_pages_are_in_the_guide() -> None:
    """CONTRIBUTING.md has a row for each `make` target that writes a page of docs/."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rules = re.findall(
        r"^([\w-]+):.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    writers = {name for name, recipe in rules if "docs/" in recipe}
    assert {"zoo", "bench"} <= writers
    for name in writers:
        assert f"| `make {name}` |" in page, name


def test_paths_in_the_guide_exist() -> None:
    """Each path in CONTRIBUTING.md exists; a name in angle brackets matches any name."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[\w.]+/)+[\w.<>*-]*)`", page):
        pattern = re.sub(r"<\w+>", "*", name)
        found = [*ROOT.glob(pattern), *PACKAGE.glob(pattern)]
        assert found, name
