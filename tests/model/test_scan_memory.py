"""A scan of a model that is larger than the memory for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from harness import Cli, book, make_llama, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import mergekit_interleave as api
from mergekit_interleave.scanning import paths

LIMIT = 200
"""The memory in MB; the layers take four times as much."""

SCRIPT = """
import re, sys
import mergekit_interleave as api
from mergekit_interleave.scanning import paths
api.scan(sys.argv[1], model=sys.argv[2], text=sys.argv[3], tokens=75, dtype="bfloat16",
         max_memory="200MB")
status = open("/proc/self/status").read()  # `getrusage` counts the process before exec, too
print(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with 800 MB of layers and 131 MB of embeddings and head, in bfloat16."""
    path = tmp_path_factory.mktemp("large") / "base"
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    config = LlamaConfig(vocab_size=32_000, max_position_embeddings=8, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    model.save_pretrained(path)
    tokenizer(64).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text of words that the tokenizers know."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(book(1400))
    return file


linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")


@linux
def test_peak_memory(large: Path, tmp_path: Path) -> None:
    """The peak of a process is within the limit and 300 MB."""
    (tmp_path / "plans.txt").write_text("drop: 3:15")
    (tmp_path / "text.txt").write_text(" ".join(f"word{number % 60}" for number in range(80)))
    command = [sys.executable, "-c", SCRIPT, tmp_path / "plans.txt", large, tmp_path / "text.txt"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) <= LIMIT + 300


@linux
def test_the_same_scores(text: Path, tmp_path: Path) -> None:
    """The scores are those without a limit, with layers in the file and one layout at a time."""
    base = make_llama(tmp_path / "base")
    LlamaForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    how = {"model": base, "space": "drops", "text": text, "dtype": "bfloat16"}
    found = [api.scan(**how, max_memory=limit).differences for limit in ("1kB", None)]
    assert np.array_equal(*found)
    assert found[0].any()


def test_how_many_states(tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short, layouts are computed one at a time, and else together."""
    counts: list[int] = []
    tree = paths.tree

    def counted(wanted: Mapping[int, Path]) -> Any:
        counts.append(len(wanted))
        return tree(wanted)

    monkeypatch.setattr(paths, "tree", counted)
    api.scan(model=tiny, text=text, space="drops", max_memory="100MB")
    assert 1 < max(counts) <= 36
    counts.clear()
    api.scan(model=tiny, text=text, space="drops", max_memory="67MB")
    assert {*counts} == {1}


@linux
def test_weights_that_change(mk: Cli, text: Path, tmp_path: Path) -> None:
    """A type that changes its weights cannot give them back, so it is refused with its reason."""
    base = zoo.save("rwkv", tmp_path / "base")
    tokenizer(128).save_pretrained(base)
    words = ("scan", "--space", "drops", "--model", base, "--text", text)
    result = mk(*words, "--max-memory", "1kB")
    assert (result.status, "changes them" in result.err) == (1, True)


@linux
def test_the_same_ranks(tiny: Path) -> None:
    """A scan for training gives the same numbers with a limit as without."""
    found = [api.scan_for_training(model=tiny, max_memory=limit) for limit in ("1kB", None)]
    assert found[0].layers == found[1].layers


def test_another_dtype(mk: Cli, text: Path, tmp_path: Path) -> None:
    """Weights that would have to be converted do not fit; the hint names their own dtype."""
    words = ("scan", "--model", make_llama(tmp_path / "base"), "--text", text)
    words += ("--max-memory", "1kB")
    result = mk(*words, "--dtype", "bfloat16")
    assert (result.status, "--dtype float32" in result.err) == (1, True)
