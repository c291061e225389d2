"""A new engine is one module and one row: the command line lists it, and `run` uses it."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Cli

from mergekit_interleave.engines import registry
from mergekit_interleave.engines.protocol import Engine, WriteOptions
from mergekit_interleave.errors import DirectiveError

PLAIN = """
from mergekit_interleave.engines.stream import (
    estimate, estimate_by_size, files, unsupported, unsupported_type, write_shards
)
from mergekit_interleave.engines.sharding import shards_of
from mergekit_interleave.errors import DirectiveError

def check(options, expansion):
    if options.mergekit:
        raise DirectiveError("--engine plain: no options")

def write(plan, out, options):
    return write_shards(shards_of(plan.specs, 10**9, 4096), out, options)
"""
START = """
import sys
from mergekit_interleave.engines import registry
registry.ENGINES["plain"] = registry.EngineRow("plain", title="the plain engine", module="plain")
from mergekit_interleave.cli import main
main.main(sys.argv[1:])
"""


@pytest.fixture
def third(tmp_path: Path) -> Cli:
    """Return the command line with a third engine, which has its own module."""
    (tmp_path / "plain.py").write_text(PLAIN)
    paths = os.pathsep.join([str(tmp_path), *sys.path])

    def run(*words: object) -> str:
        return subprocess.run(
            [sys.executable, "-c", START, *map(str, words)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    return run  # type: ignore[return-value]


def test_the_command_line_lists_it(third: Cli) -> None:
    """The help of `run` lists the engine."""
    assert "auto|mergekit|stream|plain" in str(third("run", "--help"))


def test_run_and_plan_use_it(third: Cli, tiny: Path, tmp_path: Path) -> None:
    """`run` uses the engine and records its name, and `plan` estimates its memory."""
    words = ("append: 1", tmp_path / "out", "--model", tiny, "--engine", "plain")
    assert re.search(r"\b9\b.*\b1\b", str(third("run", *words)))
    made = json.loads((tmp_path / "out/interleave.json").read_text())
    assert made["engine"] == "plain"
    assert made["tools"].keys() == {"mergekit-interleave"}
    planned = json.loads(str(third("plan", "append: 1", "--model", tiny, "--json")))
    assert planned["writing"]["memory"].keys() == {"mergekit", "stream", "plain"}
    assert planned["writing"]["estimates"]["plain"]["traffic"]["written"] > 0
    assert "\nplain       " in str(third("plan", "append: 1", "--model", tiny))


def test_an_engine_is_asked_before_it_writes(third: Cli, tiny: Path, tmp_path: Path) -> None:
    """An engine that cannot write a plan is not called, even with `--no-verify`."""
    words = ("append: 1", tmp_path / "out", "--model", tiny, "--engine", "plain", "--no-verify")
    with pytest.raises(subprocess.CalledProcessError) as error:
        third("run", *words, "--dtype", "bfloat16")
    assert error.value.returncode == 1
    assert "the plain engine " in error.value.stderr
    assert "--engine auto" in error.value.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", registry.ENGINES)
def test_every_engine_has_the_functions_of_the_protocol(name: str) -> None:
    """A row names a module that has all functions of the protocol."""
    engine = registry.ENGINES[name].load()
    names = [word for word in vars(Engine) if not word.startswith("_")]
    assert len(names) == 7
    assert all(callable(getattr(engine, word)) for word in names)


def test_an_unknown_engine() -> None:
    """The error names the unknown engine, and the hint suggests a known one."""
    with pytest.raises(DirectiveError, match="'steam'") as error:
        registry.requested("steam")
    assert "stream" in str(error.value.hint)


def test_names_cost_nothing() -> None:
    """The list of names imports no engine and no library of an engine."""
    script = (
        "import sys; from mergekit_interleave.engines import registry; print(registry.names())\n"
        "print(sorted(name for name in sys.modules if 'engines.' in name), 'torch' in sys.modules)"
    )
    output = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert output == (
        "('auto', 'mergekit', 'stream')\n['mergekit_interleave.engines.registry'] False\n"
    )


def test_logging_is_as_before(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """A run by mergekit leaves logging unchanged."""
    import transformers

    def state() -> tuple[object, ...]:
        loggers = [logging.getLogger(name) for name in (None, "mergekit", "transformers")]
        return [(logger.level, [*logger.handlers]) for logger in loggers], (
            transformers.logging.get_verbosity()
        )

    transformers.logging.set_verbosity_warning()
    before = state()
    assert mk("run", "append: 1", tmp_path / "out", "--model", tiny).status == 0
    assert state() == before


def test_whether_transformers_is_loaded_anyway() -> None:
    """Only the stream engine does not load transformers itself."""
    assert WriteOptions().loads_transformers
    assert WriteOptions(registry.Request("mergekit")).loads_transformers
    assert not WriteOptions(registry.Request("stream")).loads_transformers
