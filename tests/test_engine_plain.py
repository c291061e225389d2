"""The plain writer: bytes move as they are, zeros are holes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from conftest import assert_same_tensors, load_tensors

from mergekit_interleave.assembly import Part, assemble
from mergekit_interleave.checkpoint import open_checkpoint
from mergekit_interleave.directive import Every
from mergekit_interleave.engines import plain
from mergekit_interleave.layout import Edit, expand, zeroed_scales
from mergekit_interleave.reference import ModelPath, ModelRef


def parts_of(path: Path, *names: str) -> tuple[Part, ...]:
    """What an expansion of a checkpoint is made of, with the named tensors zero in the copies."""
    base = open_checkpoint(ModelRef(ModelPath(str(path))))
    layout = expand(Every(2), base.ref, base.depth, lambda _: Edit(zeroed_scales(names)))
    return assemble(layout, {base.ref: base})


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.EXDEV, errno.EINVAL])
def test_without_the_kernels_help(
    answer: int, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, through this process."""
    parts = parts_of(sharded, "o_proj")
    for name in ("fast", "slow"):
        (tmp_path / name).mkdir()
    plain.write(parts, tmp_path / "fast", 10**9)

    def refuse(*_: object) -> int:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    plain.write(parts, tmp_path / "slow", 10**9)
    assert_same_tensors(tmp_path / "fast", tmp_path / "slow")


def test_short_moves_and_short_writes(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may move less than was asked for, and is asked again."""
    parts = parts_of(sharded, "o_proj")
    for name in ("whole", "short"):
        (tmp_path / name).mkdir()
    plain.write(parts, tmp_path / "whole", 10**9)
    move, write = os.copy_file_range, os.write
    monkeypatch.setattr(
        os, "copy_file_range", lambda src, dst, count, at: move(src, dst, min(count, 7), at)
    )
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:11]))
    plain.write(parts, tmp_path / "short", 10**9)
    assert_same_tensors(tmp_path / "whole", tmp_path / "short")


def test_an_error_of_the_disk_is_no_reason_to_go_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the kernel has no such call it is done in another way."""

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "copy_file_range", fail)
    with pytest.raises(OSError, match="broken"):
        plain.write(parts_of(tiny, "o_proj"), tmp_path, 10**9)


def test_a_source_that_shrinks(own_tiny: Path, tmp_path: Path) -> None:
    """Is noticed."""
    parts = parts_of(own_tiny, "o_proj")
    os.truncate(own_tiny / "model.safetensors", 40_000)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="cut short"):
        plain.write(parts, tmp_path / "out", 10**9)


def test_zeros_are_holes(tmp_path: Path) -> None:
    """A layer of zeros takes no room, at the end of a file either."""
    import torch
    from conftest import make_llama
    from safetensors.torch import save_file

    base = make_llama(tmp_path / "base", layers=2)
    tensors = load_tensors(base)
    for i in range(2):
        tensors[f"model.layers.{i}.mlp.down_proj.weight"] = torch.ones(2**20)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    plain.write(parts_of(base, "down_proj"), tmp_path / "out", 10**9)
    written = tmp_path / "out" / "model.safetensors"
    size, taken = written.stat().st_size, written.stat().st_blocks * 512
    assert size > 12 * 2**20
    assert taken < size - 3 * 2**20
    assert not load_tensors(tmp_path / "out")["model.layers.2.mlp.down_proj.weight"].any()
