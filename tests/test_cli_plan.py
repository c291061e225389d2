"""`plan`: what `run` would write, and nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import zoo
from conftest import Cli, emulate_sharing, make_llama

LINES = """\
layers      10, 2 of them new
map         0-3 [4] 5-8 [9]
parameters  81,568
mergekit    326 kB written
stream      318 kB written, 20.5 kB of zeros that take no room
"""


def test_bytes_by_engine(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """What each writes; the directory stays empty."""
    result = mk("plan", "--every", "4", "--model", tiny, cwd=tmp_path)
    *lines, free = result.out.splitlines(keepends=True)
    assert (result.status, "".join(lines), result.err) == (0, LINES, "")
    assert free.startswith("free        ")
    assert os.listdir(tmp_path) == []


def test_shared_bytes(mk: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where blocks can be shared between the base and this directory, they are counted as such."""
    base = make_llama(tmp_path / "base", hidden_size=128, intermediate_size=512)
    emulate_sharing(monkeypatch)
    planned = mk("plan", "--every", "4", "--model", base, cwd=tmp_path)
    assert "MB shared with the base" in planned.out
    words = ("run", "--every", "4", tmp_path / "out", "--model", base, "--engine", "stream")
    (line,) = (line for line in planned.out.splitlines() if line.startswith("stream"))
    assert mk(*words).out.split(": ")[-1].strip() == line.removeprefix("stream").strip()


def test_what_stream_cannot_do(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """Is said in its place."""
    words = ("plan", "--every", "4", "--model", tiny, "--dtype", "float16")
    result = mk(*words, cwd=tmp_path)
    assert result.status == 0
    assert "stream      cannot: --engine stream does no arithmetic: model" in result.out
    assert "mergekit    163 kB written" in result.out


def test_what_mergekit_cannot_do(mk: Cli, tmp_path: Path) -> None:
    """Likewise: some types need more than zeros, of some it loses tensors."""
    zoo.quiet()
    for name, reason in (
        ("doge", "cannot fill model.layers."),
        ("gpt_neox", "cannot write the right tensors of model type gpt_neox"),
    ):
        base = zoo.save(name, tmp_path / name)
        result = mk("plan", "--every", "2", "--model", base, cwd=tmp_path)
        assert result.status == 0, result.err
        assert f"mergekit    {reason}" in result.out
        assert " written" in result.out.partition("stream")[2]


def test_without_weights(mk: Cli, tmp_path: Path) -> None:
    """Layers only."""
    config = {"model_type": "llama", "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = mk("plan", "--every", "4", cwd=tmp_path)
    assert result.status == 0, result.err
    assert result.out.splitlines()[0] == "layers      10, 2 of them new"
    assert "not known before the weights are at hand" in result.out


def test_what_run_refuses(mk: Cli, tmp_path: Path) -> None:
    """Plan refuses, too."""
    config = {"model_type": "bert", "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = mk("plan", "--every", "4", cwd=tmp_path)
    assert (result.status, "is refused" in result.err) == (1, True)
