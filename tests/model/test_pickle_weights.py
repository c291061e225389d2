"""Pickled weights need --allow-pickle; then only tensors are read, and no code runs."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from harness import Cli, assert_same_tensors, load_tensors

WORDS = ("run", "interleave: every 4")


def pickled(base: Path, *, parts: int = 1, **how: Any) -> Path:
    """Replace the safetensors of a checkpoint by pickled files with the same tensors."""
    import torch

    tensors = load_tensors(base)
    for file in base.glob("*.safetensors*"):
        file.unlink()
    names = sorted(tensors)
    if parts == 1:
        torch.save(tensors, base / "pytorch_model.bin", **how)
        return base
    weight_map = {}
    for number in range(parts):
        file = f"pytorch_model-{number}.bin"
        own = {name: tensors[name] for name in names[number::parts]}
        torch.save(own, base / file, **how)
        weight_map |= dict.fromkeys(own, file)
    index = {"weight_map": weight_map}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return base


@pytest.mark.parametrize("engine", ["stream", "mergekit"])
@pytest.mark.parametrize("parts", [1, 3])
def test_pickles_give_the_tensors_of_safetensors(  # noqa: PLR0913, PLR0917 - fixtures
    engine: str, parts: int, mk: Cli, tiny: Path, own_tiny: Path, tmp_path: Path
) -> None:
    """Both engines write the same tensors from pickles as from safetensors, and no other files."""
    assert mk(*WORDS, tmp_path / "a", "--model", tiny, "--engine", "stream").status == 0
    base = pickled(own_tiny, parts=parts)
    words = ("--model", base, "--engine", engine)
    refused = mk(*WORDS, tmp_path / "b", *words)
    assert (refused.status, f"error: {base}: " in refused.err) == (1, True)
    assert "--allow-pickle" in refused.err
    planned = mk("plan", WORDS[1], "--model", base)
    assert (planned.status, "--allow-pickle" in planned.out) == (0, True)
    result = mk(*WORDS, tmp_path / "b", *words, "--allow-pickle")
    assert result.status == 0, result.err
    assert_same_tensors(tmp_path / "a", tmp_path / "b")
    assert not list((tmp_path / "b").glob(".*"))
    assert not list((tmp_path / "b").glob("*.bin*"))
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "own"]
    verify = ("verify", tmp_path / "b", "--against", base)
    assert mk(*verify).status == 1
    assert mk(*verify, "--allow-pickle", "--forward").status == 0


def test_an_old_file(mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
    """A file of torch before 1.6, which is not a zip archive, can be read."""
    base = pickled(own_tiny, _use_new_zipfile_serialization=False)
    words = (*WORDS, tmp_path / "out", "--model", base, "--allow-pickle")
    assert mk(*words, "--engine", "stream").status == 0


def test_tied_tensors(mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
    """Two names of one tensor in the pickle are written as two tensors."""
    import torch

    tensors = load_tensors(own_tiny)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (own_tiny / "model.safetensors").unlink()
    torch.save(tensors, own_tiny / "pytorch_model.bin")
    words = (*WORDS, tmp_path / "out", "--model", own_tiny, "--allow-pickle")
    assert mk(*words, "--engine", "stream").status == 0
    written = load_tensors(tmp_path / "out")
    assert torch.equal(written["lm_head.weight"], tensors["lm_head.weight"])


class Bomb:
    """An object that creates a directory when it is unpickled."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trap),)


@pytest.mark.parametrize("kind", ["in a dictionary", "alone", "plain pickle", "legacy"])
@pytest.mark.parametrize("engine", ["stream", "mergekit"])
def test_code_is_never_run(kind: str, engine: str, mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
    """A pickle that contains code is one error; the code does not run, and OUT is absent."""
    import torch

    trap = tmp_path / "trap"
    tensors = load_tensors(own_tiny)
    (own_tiny / "model.safetensors").unlink()
    file = own_tiny / "pytorch_model.bin"
    match kind:
        case "in a dictionary":
            torch.save({**tensors, "x": Bomb(trap)}, file)
        case "alone":
            torch.save(Bomb(trap), file)
        case "legacy":
            torch.save({"x": Bomb(trap)}, file, _use_new_zipfile_serialization=False)
        case _:
            file.write_bytes(pickle.dumps(Bomb(trap)))
    words = (*WORDS, tmp_path / "out", "--model", own_tiny, "--allow-pickle")
    for flags in ((), ("--lazy-unpickle",) if engine == "mergekit" else ()):
        result = mk(*words, "--engine", engine, *flags)
        assert (result.status, result.err.count("error:")) == (1, 1)
        assert f"error: {file}: " in result.err
        assert "--allow-pickle" not in result.err
    assert sorted(os.listdir(tmp_path)) == ["own"]


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"PK\x03\x04" + b"x" * 100, b"\x80\x04."])
def test_a_file_that_is_not_a_pickle(
    content: bytes, mk: Cli, own_tiny: Path, tmp_path: Path
) -> None:
    """A file that is not a pickle is one error that names it."""
    (own_tiny / "model.safetensors").unlink()
    (own_tiny / "pytorch_model.bin").write_bytes(content)
    words = (*WORDS, tmp_path / "out", "--model", own_tiny, "--allow-pickle")
    result = mk(*words, "--engine", "stream")
    assert (result.status, "pytorch_model.bin: " in result.err) == (1, True), result.err
    assert "unexpected" not in result.err


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: "tensor"}, {"a": {"b": "tensor"}}])
def test_other_contents(content: Any, mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
    """A pickle that does not map names to tensors is refused."""
    import torch

    (own_tiny / "model.safetensors").unlink()
    torch.save(content, own_tiny / "pytorch_model.bin")
    words = (*WORDS, tmp_path / "out", "--model", own_tiny, "--allow-pickle")
    result = mk(*words, "--engine", "stream")
    assert result.status == 1
    assert re.search(r"^error: .*pytorch_model\.bin: .*\btensors\b", result.err), result.err


@pytest.mark.parametrize("name", ["../x.bin", "/x.bin", "a/b.bin", "x.safetensors", "none.bin"])
def test_an_index_that_leads_elsewhere(name: str, mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
    """An index may only name `.bin` files that exist in the checkpoint's own directory."""
    (own_tiny / "model.safetensors").unlink()
    index = own_tiny / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    words = (*WORDS, tmp_path / "out", "--model", own_tiny, "--allow-pickle")
    result = mk(*words, "--engine", "stream")
    assert (result.status, name in result.err) == (1, True), result.err


def test_names_to_zero_are_checked(mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
    """A name in `zero` that matches no pickled tensor is refused, and OUT is absent."""
    base = pickled(own_tiny)
    words = (tmp_path / "out", "--model", base, "--allow-pickle", "--engine", "stream")
    result = mk("run", "append: 1, zero: [o_proj, down_proj, nonsense]", *words)
    assert (result.status, "nonsense" in result.err) == (1, True), result.err
    assert not (tmp_path / "out").exists()
