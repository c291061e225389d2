"""`sample` and `scan` of GGUF files, which transformers dequantizes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gguf_files import make_gguf

import mergekit_interleave as api
from mergekit_interleave.errors import RefusedError


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of 4 layers."""
    return make_gguf(tmp_path_factory.mktemp("toy") / "toy.gguf", kind="Q8_0")


def test_sample(toy: Path) -> None:
    """The base and its identity say the same, and nothing is written beside the file."""
    report = api.sample("interleave: every 2", model=toy, prompt="a b c", max_new_tokens=4)
    base, grown = report.models
    assert (base.layers, grown.layers) == (4, 6)
    assert base.continuations[0].text == grown.continuations[0].text
    assert os.listdir(toy.parent) == ["toy.gguf"]


def test_scan(toy: Path, tmp_path: Path) -> None:
    """Layouts of a GGUF file are measured, and `run` takes the best one for the file itself."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join("abcdefghijklm"[7 * i * i % 13] for i in range(3000)))
    found = api.scan(model=toy, space="drops", text=text, out=tmp_path / "out")
    assert len(found.candidates) == 9
    again = api.scan(model=toy, space="drops", text=text, out=tmp_path / "out")
    assert again.verdict == found.verdict
    api.run(found.candidates[0].directive, tmp_path / "grown.gguf", model=toy)


def test_splits(tmp_path: Path) -> None:
    """Transformers reads no splits, and the hint says how to merge them."""
    make_gguf(tmp_path / "toy.gguf", split_tensors=15)
    with pytest.raises(RefusedError) as raised:
        api.sample("append: 1", model=tmp_path / "toy-00001-of-00003.gguf", prompt="a")
    assert "--merge" in (raised.value.hint or "")


def test_what_it_cannot_read(tmp_path: Path) -> None:
    """An architecture that transformers does not read is refused; a directory is offered."""
    file = make_gguf(tmp_path / "toy.gguf", architecture="plamo")
    with pytest.raises(RefusedError) as raised:
        api.sample("append: 1", model=file, prompt="a")
    assert "directory" in (raised.value.hint or "")
    assert str(file) in str(raised.value)
