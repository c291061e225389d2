"""A trainer that one module and one row add is known to the command line and to `train`.

This file is that module: `full` writes the settings, and `ROW` is the row.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mergekit_interleave.commands.train import train
from mergekit_interleave.errors import DirectiveError, RefusedError
from mergekit_interleave.training.trainers import registry
from mergekit_interleave.training.trainers.registry import FULL, Trainer

if TYPE_CHECKING:
    from harness import Cli

    from mergekit_interleave.training.settings import TrainerSettings
    from mergekit_interleave.training.target import TrainingTarget

ROW = Trainer("sandbox", "Sandbox", (FULL,), __name__, "it has no LoRA", "--for peft")


def full(target: TrainingTarget) -> TrainerSettings:
    """Write the trainer's settings, one prefix per line."""
    from mergekit_interleave.training import settings

    prefixes = [f"{stack}.{index}." for stack in target.stacks for index in target.layers]
    selected = {name for name in target.parameters if name.startswith(tuple(prefixes))}
    settings.check_selection(target, selected, ROW.title)
    return settings.TrainerSettings("".join(f"{prefix}\n" for prefix in prefixes), FULL)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the row to the registry."""
    monkeypatch.setitem(registry.TRAINERS, ROW.name, ROW)


@pytest.fixture
def deeper(mk: Cli, tiny: Path, tmp_path: Path) -> Path:
    """Return a model of 10 layers, 4 and 9 of them new."""
    words = ("run", "interleave: every 4", tmp_path / "deeper", "--model", tiny)
    assert mk(*words, "--engine", "stream").status == 0
    return tmp_path / "deeper"


@pytest.mark.usefixtures("added")
def test_train_writes_its_settings(mk: Cli, deeper: Path) -> None:
    """The function and the command return the same text."""
    found = train(deeper, trainer="sandbox")
    assert found.as_dict() == {
        "trainer": "sandbox",
        "text": "model.layers.4.\nmodel.layers.9.\n",
        "method": "full",
        "notes": [],
        "warnings": [],
    }
    assert mk("train", deeper, "--for", "sandbox").out == found.text
    as_json = mk("train", deeper, "--for", "sandbox", "--json").out
    assert json.loads(as_json) == found.as_dict()
    with pytest.raises(RefusedError, match=f"^{ROW.title}: {ROW.refusal}$") as caught:
        train(deeper, trainer="sandbox", method="lora")
    assert caught.value.hint == ROW.instead


@pytest.mark.usefixtures("added")
def test_errors_name_it() -> None:
    """The hints list the new trainer among the known ones."""
    with pytest.raises(DirectiveError, match="'sandbags'") as unknown:
        train("nowhere", trainer="sandbags")
    assert "sandbox" in str(unknown.value.hint)
    with pytest.raises(RefusedError) as refused:
        train("nowhere", trainer="litgpt")
    assert "sandbox" in str(refused.value.hint)


def command_line(*words: str, **environment: str) -> str:
    """Run a fresh process that has the row, check its imports, and return its output."""
    code = (
        "import sys, test_new_trainer as own\n"
        "own.registry.TRAINERS[own.ROW.name] = own.ROW\n"
        "from mergekit_interleave.__main__ import main\n"
        "sys.argv[0] = 'mk-interleave'\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'mergekit', 'huggingface_hub', 'pydantic'}\n"
        "    assert not heavy & {*sys.modules}\n"
    )
    root = Path(__file__).parents[2]
    places = [str(root), str(Path(__file__).parent), str(root / "tests" / "fixtures")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout


def test_the_help_lists_it() -> None:
    """`train --help` takes the names from the registry."""
    text = " ".join(command_line("train", "--help", COLUMNS="500").split())
    assert re.search(r"--for\b.*\bunsloth\b.*\bsandbox\b", text)


def test_a_shell_completes_it() -> None:
    """The completion of `--for` takes the names from the registry."""
    offered = command_line(
        _MK_INTERLEAVE_COMPLETE="complete_bash",
        COMP_WORDS="mk-interleave train deeper --for sand",
        COMP_CWORD="4",
    )
    assert offered.split() == ["sandbox"]


@pytest.mark.parametrize("name", registry.TRAINERS)
def test_each_row_has_its_functions(name: str) -> None:
    """A row names a module that has a function for each of its methods."""
    trainer = registry.TRAINERS[name]
    assert all(callable(trainer.writer(method)) for method in trainer.methods)
    assert {*trainer.methods} == {*registry.METHODS} or trainer.refusal
