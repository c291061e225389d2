"""The JSON schema of directives, and shell completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import published
import pytest
import yaml
from directive_texts import GROWTHS, STRUCTURAL
from harness import Cli
from schema_check import accepts

from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.json_schema import schema

ROOT = Path(__file__).parents[3]


def test_it_is_a_schema() -> None:
    """The schema is valid for its draft and describes every key."""
    jsonschema.Draft202012Validator.check_schema(schema())
    assert {*schema()["properties"]} == {*directives.known_keys(), "name"}
    assert {"gains", "norms"} <= {*schema()["$defs"]["zero"]["anyOf"][0]["enum"]}
    assert all(len(entry["description"]) > 8 for entry in schema()["properties"].values())


@pytest.mark.parametrize("text", [case[0] for case in GROWTHS])
def test_growth_lines(text: str) -> None:
    """The schema accepts every growth line."""
    assert accepts(yaml_io.read(f"model: org/m, {text}, dtype: bfloat16", "x"))


EXAMPLES = [*ROOT.glob("examples/*.yml")]


@pytest.mark.parametrize("file", EXAMPLES, ids=[file.name for file in EXAMPLES])
def test_examples(file: Path) -> None:
    """The schema accepts directives and mergekit configs."""
    assert accepts(yaml.safe_load(file.read_text()))


def test_published_merges() -> None:
    """The schema accepts published mergekit configs."""
    assert all(accepts(published.document(merge)) for merge in published.MERGES)


@pytest.mark.parametrize("text", [text for text, _ in STRUCTURAL])
def test_structural_mistakes(text: str) -> None:
    """The schema refuses each mistake that a schema can express."""
    assert not accepts(yaml_io.read(text, "x"))


def test_the_command(mk: Cli) -> None:
    """`schema` prints the schema."""
    result = mk("schema")
    assert (result.status, json.loads(result.out)) == (0, schema())


def complete(words: str, shell: str = "bash") -> list[str]:
    """Return the completions of a command line."""
    env = {
        **os.environ,
        "_MK_INTERLEAVE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "mergekit_interleave"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("mk-interleave ex", ["explain"]),
        ("mk-interleave plan --ev", ["--every"]),
        ("mk-interleave plan --af", ["--after"]),
        ("mk-interleave run --engine s", ["stream"]),
        ("mk-interleave gen --apply-to la", ["last"]),
        ("mk-interleave gen --dtype b", ["bfloat16"]),
        ("mk-interleave gen --zero g", ["gains"]),
        ("mk-interleave gen --zero n", ["none", "norms"]),
    ],
)
def test_completion(words: str, offered: list[str]) -> None:
    """Commands, flags and values are completed."""
    assert complete(words) == offered


def test_completion_of_the_shell_that_is_named() -> None:
    """The script is for the named shell, not the calling one."""
    for shell, sign in (("zsh", "#compdef mk-interleave"), ("fish", "complete --command")):
        done = subprocess.run(
            [sys.executable, "-m", "mergekit_interleave", "--show-completion", shell],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert sign in done.stdout, done.stderr


def test_completion_of_bash_itself(tmp_path: Path) -> None:
    """The script that `--show-completion` prints completes in a real shell."""
    script: Any = subprocess.run(
        [sys.executable, "-m", "mergekit_interleave", "--show-completion", "bash"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (tmp_path / "mk-interleave").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m mergekit_interleave "$@"\n'
    )
    (tmp_path / "mk-interleave").chmod(0o755)
    ask = (
        f"{script}\nCOMP_WORDS=(mk-interleave fix); COMP_CWORD=1\n"
        '_mk_interleave_completion mk-interleave\necho "${COMPREPLY[@]}"\n'
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", ask], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fix-config", done.stderr
