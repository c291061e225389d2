"""A checkpoint of a wrapped module is refused, and a copy with the right names can be made."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import Cli, assert_same_tensors, edit_json
from safetensors.torch import load_file, save_file

from mergekit_interleave.checkpoint import wrapped_names
from mergekit_interleave.errors import CheckpointError

Rename = Callable[[str], str]


def rename(base: Path, name: Rename) -> None:
    """Rename the tensors of a checkpoint."""
    for file in base.glob("*.safetensors"):
        tensors = {name(key): tensor for key, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    index = base / "model.safetensors.index.json"
    if index.exists():
        edit_json(
            index,
            lambda content: content.update(
                weight_map={name(key): shard for key, shard in content["weight_map"].items()}
            ),
        )


@pytest.mark.parametrize("kind", ["whole", "layers"])
@pytest.mark.parametrize("base", ["tiny", "sharded"])
def test_the_remedy(
    base: str, kind: str, mk: Cli, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """`gen`, `plan` and `run` name the wrapper, and the hint's command makes the model usable."""
    source = request.getfixturevalue(base)
    wrapped = Path(shutil.copytree(source, tmp_path / "wrapped"))
    rename(
        wrapped,
        lambda name: (
            f"_orig_mod.{name}" if kind == "whole" else name.replace(".mlp.", "._orig_mod.mlp.")
        ),
    )
    for words in (("gen",), ("plan",), ("run", tmp_path / "out")):
        result = mk(words[0], "append: 1", *words[1:], "--model", wrapped)
        assert result.status == 1
        assert "torch.compile" in result.err
    command = result.err.splitlines()[-1].partition("python ")[2].replace("NEW", "fixed")
    subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path, check=True)
    assert_same_tensors(tmp_path / "fixed", source)
    assert sorted(file.name for file in (tmp_path / "fixed").iterdir()) == sorted(
        file.name for file in source.iterdir()
    )
    fixed = ("--model", tmp_path / "fixed", "--engine", "stream")
    assert mk("run", "append: 1", tmp_path / "out", *fixed).status == 0


def test_pickled_weights(tiny: Path, own_tiny: Path, tmp_path: Path) -> None:
    """Pickled weights are renamed, too, and become safetensors."""
    tensors = load_file(own_tiny / "model.safetensors")
    (own_tiny / "model.safetensors").unlink()
    torch.save({f"_orig_mod.{k}": t for k, t in tensors.items()}, own_tiny / "pytorch_model.bin")
    assert wrapped_names.main([str(own_tiny), str(tmp_path / "fixed")]) == 0
    assert_same_tensors(tmp_path / "fixed", tiny)


def test_mistakes(own_tiny: Path, tmp_path: Path) -> None:
    """Nothing is overwritten, and two tensors never become one."""
    assert wrapped_names.main([str(own_tiny), str(tmp_path)]) == 1
    assert wrapped_names.main([str(own_tiny)]) == 2
    file = own_tiny / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "_orig_mod.lm_head.weight": tensors["lm_head.weight"].clone()}, file)
    with pytest.raises(CheckpointError, match="two tensors"):
        wrapped_names.write_copy(own_tiny, tmp_path / "fixed")
    assert not (tmp_path / "fixed").exists()
