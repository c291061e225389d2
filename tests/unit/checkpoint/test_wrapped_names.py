"""A checkpoint of a wrapped module is refused, and a copy with the right names can be made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Cli, assert_same_tensors
from safetensors.torch import load_file, save_file

from mergekit_interleave.checkpoint import wrapped_names
from mergekit_interleave.errors import CheckpointError, RefusedError

Rename = Callable[[str], str]


@pytest.mark.parametrize(
    ("wrapped", "own"),
    [
        ("_orig_mod.model.norm.weight", "model.norm.weight"),
        ("module._orig_mod.model.norm.weight", "model.norm.weight"),
        ("model.layers.0._orig_mod.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("_fsdp_wrapped_module.lm_head.weight", "lm_head.weight"),
        ("model.layers.1._checkpoint_wrapped_module.norm.weight", "model.layers.1.norm.weight"),
    ],
)
def test_names(wrapped: str, own: str) -> None:
    """The words of wrappers are recognized and removed wherever they stand."""
    assert wrapped_names.without_wrappers(wrapped) == own
    with pytest.raises(RefusedError, match=r"wrapped"):
        wrapped_names.check(Path("x"), [own, wrapped])
    wrapped_names.check(Path("x"), [own, "model.module.weight"])
    assert wrapped_names.without_wrappers("model.module.weight") == "model.module.weight"


def rename(base: Path, name: Rename) -> None:
    """Rename the tensors of a checkpoint."""
    for file in base.glob("*.safetensors"):
        tensors = {name(key): tensor for key, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    index = base / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {name(k): shard for k, shard in content["weight_map"].items()}
        index.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["whole", "layers"])
@pytest.mark.parametrize("base", ["tiny", "sharded"])
def test_the_remedy(
    base: str, kind: str, mk: Cli, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every command names the wrapper, and the command in the hint makes the model usable."""
    source = request.getfixturevalue(base)
    wrapped = tmp_path / "wrapped"
    subprocess.run(["cp", "-r", source, wrapped], check=True)
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
    subprocess.run([sys.executable, *command.split()], cwd=tmp_path, check=True)
    assert_same_tensors(tmp_path / "fixed", source)
    assert sorted(file.name for file in (tmp_path / "fixed").iterdir()) == sorted(
        file.name for file in source.iterdir()
    )
    fixed = ("--model", tmp_path / "fixed", "--engine", "stream")
    assert mk("run", "append: 1", tmp_path / "out", *fixed).status == 0


def test_pickled_weights(tiny: Path, own_tiny: Path, tmp_path: Path) -> None:
    """Pickled weights are renamed, too, and become safetensors."""
    import torch

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
