"""Fixtures: the command line, a shell, and tiny checkpoints that transformers can load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Cli, Result, make_llama
from hypothesis import settings

from mergekit_interleave.cli import main as cli
from mergekit_interleave.engines.registry import VARIABLE as ENGINE_VARIABLE
from mergekit_interleave.planning.resolve import MODEL_VARIABLE

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


os.environ["HF_HUB_OFFLINE"] = "1"  # a test that uses the network must fail
for variable in (MODEL_VARIABLE, ENGINE_VARIABLE):
    os.environ.pop(variable, None)  # a developer's own choice is none of the tests


@pytest.fixture
def mk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Return a function that runs the command line in this process."""

    def run(*args: object, cwd: Path | None = None, stdin: str = "") -> Result:
        import io

        with monkeypatch.context() as patch:
            if cwd is not None:
                patch.chdir(cwd)
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            with pytest.raises(SystemExit) as exit_info:
                cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Result(int(exit_info.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a shell in which this environment's commands are on the path."""

    def run(
        command: str, cwd: Path = tmp_path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=cwd,
            env={**os.environ, "PATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an 8-layer Llama in one shard, which no test may change."""
    return make_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def own_tiny(tiny: Path, tmp_path: Path) -> Path:
    """Return a copy of `tiny` that the test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "own"))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Mistral with 4 layers, several bfloat16 shards and tied embeddings."""
    import torch

    path = tmp_path_factory.mktemp("models") / "sharded"
    return make_llama(
        path,
        layers=4,
        shard_size="40KB",
        mistral=True,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
