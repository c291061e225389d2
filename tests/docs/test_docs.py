"""Examples in the pages must be valid: each directive in them is read and expanded."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import published
import pytest
import typer
import yaml
from harness import Cli
from schema_check import VALIDATOR, accepts

from mergekit_interleave.cli.app import application
from mergekit_interleave.directive.directive import MERGEKIT_KEYS, OWN_KEYS
from mergekit_interleave.directive.growth import registry

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import pictures  # noqa: E402 - scripts beside the package
import reference  # noqa: E402

PAGE = (ROOT / "docs" / "directive.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("example", pictures.DEPTHS)
def test_files_beside_an_example_are_current(mk: Cli, example: str) -> None:
    """`gen`, `explain` and the picture of each example match the files beside it."""
    depth = pictures.DEPTHS[example]
    written = (EXAMPLES / f"{example}.mergekit.yml").read_text()
    assert mk("gen", EXAMPLES / f"{example}.yml", "--layers", depth).out == written
    assert pictures.draw(example) == (EXAMPLES / f"{example}.svg").read_text(encoding="utf-8")
    explained = yaml.safe_load(mk("explain", EXAMPLES / f"{example}.mergekit.yml").out)
    directive = yaml.safe_load((EXAMPLES / f"{example}.yml").read_text())
    line = next(key for key in registry.LINES if key in directive)
    assert line in explained
    if line != "layout":
        assert explained[line] == directive[line]


def test_every_example_has_yaml_and_picture() -> None:
    """Each directive in examples/ has its YAML and its picture."""
    names = {file.stem for file in EXAMPLES.glob("*.yml")} - {
        f"{example}.mergekit" for example in pictures.DEPTHS
    }
    assert names == {*pictures.DEPTHS}


@pytest.mark.parametrize(
    ("example", "name"),
    [("miqu-120b", "wolfram/miqu-1-120b"), ("deep-miqu-103b", "jukofyork/Deep-Miqu-103B")],
)
def test_examples_equal_published_merges(example: str, name: str) -> None:
    """The generated slices equal those of the published merge."""
    merge = next(merge for merge in published.MERGES if merge["name"] == name)
    written = yaml.safe_load((EXAMPLES / f"{example}.mergekit.yml").read_text())
    assert written == published.document(merge)


@pytest.mark.parametrize("block", BLOCKS, ids=[" ".join(block.split())[:50] for block in BLOCKS])
def test_every_example_is_valid(mk: Cli, block: str) -> None:
    """Each YAML block is a directive that the tool and the schema accept, and it makes slices."""
    documents = list(yaml.safe_load_all(block))
    errors = [error.message for document in documents for error in VALIDATOR.iter_errors(document)]
    assert accepts(documents[-1]), errors
    stream = len(documents) > 1
    missing = [] if stream or "layers" in documents[0] else ["--layers", "32"]
    if "model" not in block:
        missing += ["--model", "org/model"]
    result = mk("gen", "-", *missing, stdin=block)
    assert result.status == 0, result.err
    for config in yaml.safe_load_all(result.out):
        assert "slices" in config or config["merge_method"] == "linear"


def test_every_key_has_an_example() -> None:
    """Each key and each growth flag is described in the page and used in an example."""
    for key in (*registry.LINES, *OWN_KEYS):
        assert re.search(rf"^\*\*`{key}\b", PAGE, re.MULTILINE), key
        assert re.search(rf"^{key}:", "".join(BLOCKS), re.MULTILINE), key
    for key in MERGEKIT_KEYS:
        assert f"`{key}`" in PAGE or key == "merge_method", key
    for flag in registry.flags():
        assert f"--{flag}" in PAGE, flag


REFERENCE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def test_the_reference_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/cli.md is the output of `make docs`, on a terminal of any width."""
    monkeypatch.setenv("COLUMNS", "40")
    assert reference.page() == REFERENCE


def test_every_option_is_in_the_reference() -> None:
    """Each option is in the section of its command, and each section belongs to a command."""
    group: Any = typer.main.get_command(application())
    _, *parts = re.split(r"^#+ mk-interleave ?(.*)\n", REFERENCE, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    commands = {"": group} | group.commands
    assert list(sections) == list(commands)
    for command, section in zip(commands.values(), sections.values(), strict=True):
        for param in command.params:
            words = param.opts if param.param_type_name == "option" else [param.metavar]
            for word in words:
                cell = re.escape(word.replace("|", reference.ESCAPED))
                assert re.search(rf"\n\| .*`{cell}[ `]", section), word
        assert " ".join(command.help.split()) in section
