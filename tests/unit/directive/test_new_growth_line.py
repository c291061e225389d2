"""A new growth line needs one file and one row, which make `mirror` known everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import mirror
import pytest
import yaml
from harness import Cli

from mergekit_interleave.directive.directive import from_flags, known_keys, parse
from mergekit_interleave.directive.growth import registry
from mergekit_interleave.directive.json_schema import schema
from mergekit_interleave.errors import DirectiveError

TEXT = "model: org/m, layers: 8, mirror: 3"
RANGES = [[0, 8], [7, 8], [6, 7], [5, 6]]
SENTENCE = "the last 3 of 8 layers mirrored: depth up-scaling"


def ranges(text: str) -> list[list[int]]:
    """Return the layer ranges of mergekit YAML."""
    return [part["sources"][0]["layer_range"] for part in yaml.safe_load(text)["slices"]]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register `mirror` for one test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(registry.LINES, mirror.KEY, mirror.LINE)


@pytest.mark.usefixtures("registered")
class TestRegistered:
    """Tests with `mirror` registered."""

    def test_the_directive(self) -> None:
        """`mirror` is read from YAML and from a flag, and is written again."""
        directive = parse(TEXT, "x")
        assert directive.growth == from_flags(mirror="3").growth == mirror.Mirror(3)
        assert parse(yaml.safe_dump(directive.to_document()), "x") == directive
        with pytest.raises(DirectiveError, match=r"mirror: .*\b1\b.*0$"):
            parse("mirror: 0", "x")
        with pytest.raises(DirectiveError, match=r"`(mirror|append)` and `(mirror|append)`"):
            parse("mirror: 1, append: 1", "x")

    def test_the_schema(self) -> None:
        """The schema accepts `mirror` and refuses a second growth line beside it."""
        validator = jsonschema.Draft202012Validator(schema())
        validator.check_schema(schema())
        assert {*schema()["properties"]} == {*known_keys()}
        assert validator.is_valid({"mirror": 3})
        assert not validator.is_valid({"mirror": 0})
        assert not validator.is_valid({"mirror": 3, "append": 1})

    def test_gen_and_explain(self, mk: Cli) -> None:
        """`gen` writes the slices, and `explain` gives back the line and its sentence."""
        result = mk("gen", TEXT)
        assert (result.status, ranges(result.out)) == (0, RANGES)
        comment, *lines = mk("explain", "-", stdin=result.out).out.splitlines()
        assert comment == f"# {SENTENCE}"
        found = yaml.safe_load("\n".join(lines))
        assert found == {"model": "org/m", "layers": 8, "mirror": 3}

    def test_plan(self, mk: Cli) -> None:
        """`plan` prints the sentence of the growth line."""
        result = mk("plan", TEXT)
        assert result.status == 0, result.err
        assert SENTENCE in result.out


START = """
import mirror
from mergekit_interleave.directive.growth import registry
registry.LINES[mirror.KEY] = mirror.LINE
from mergekit_interleave.__main__ import main
main()
"""


def command(*words: str, **environment: str) -> str:
    """Return the output of a command in a process that registers `mirror`."""
    fixtures = Path(mirror.__file__).parent
    path = os.pathsep.join([str(fixtures), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", START, *words], env=env, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_command_line() -> None:
    """`gen` and `plan` have the flag, and the help describes it."""
    words = command("gen", "--help")
    assert "--mirror" in words
    assert mirror.LINE.flags[0].help in " ".join(words.replace("│", " ").split())
    assert ranges(command("gen", "--mirror", "3", "--model", "org/m", "--layers", "8")) == RANGES
    assert SENTENCE in command("plan", "--mirror", "3", "--model", "org/m", "--layers", "8")


def test_it_is_gone_afterwards(mk: Cli) -> None:
    """Without registration, `mirror` is an unknown key and flag and not in the schema."""
    assert mirror.KEY not in registry.LINES
    with pytest.raises(DirectiveError, match="'mirror'"):
        parse(TEXT, "x")
    assert mirror.KEY not in schema()["properties"]
    assert mk("gen", "--mirror", "3").status == 2
