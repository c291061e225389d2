"""The stream engine: bytes move as they are, zeros are holes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cli, assert_same_tensors, load_tensors

from mergekit_interleave.assembly import Part, assemble
from mergekit_interleave.checkpoint import open_checkpoint
from mergekit_interleave.directive import Every
from mergekit_interleave.engines import stream
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
    stream.write(parts, tmp_path / "fast", 10**9)

    def refuse(*_: object) -> int:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    stream.write(parts, tmp_path / "slow", 10**9)
    assert_same_tensors(tmp_path / "fast", tmp_path / "slow")


def test_short_moves_and_short_writes(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may move less than was asked for, and is asked again."""
    parts = parts_of(sharded, "o_proj")
    for name in ("whole", "short"):
        (tmp_path / name).mkdir()
    stream.write(parts, tmp_path / "whole", 10**9)
    move, write = os.copy_file_range, os.write
    monkeypatch.setattr(
        os, "copy_file_range", lambda src, dst, count, at: move(src, dst, min(count, 7), at)
    )
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:11]))
    stream.write(parts, tmp_path / "short", 10**9)
    assert_same_tensors(tmp_path / "whole", tmp_path / "short")


def test_an_error_of_the_disk_is_no_reason_to_go_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the kernel has no such call it is done in another way."""

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "copy_file_range", fail)
    with pytest.raises(OSError, match="broken"):
        stream.write(parts_of(tiny, "o_proj"), tmp_path, 10**9)


def test_a_source_that_shrinks(own_tiny: Path, tmp_path: Path) -> None:
    """Is noticed."""
    parts = parts_of(own_tiny, "o_proj")
    os.truncate(own_tiny / "model.safetensors", 40_000)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="cut short"):
        stream.write(parts, tmp_path / "out", 10**9)


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
    stream.write(parts_of(base, "down_proj"), tmp_path / "out", 10**9)
    written = tmp_path / "out" / "model.safetensors"
    size, taken = written.stat().st_size, written.stat().st_blocks * 512
    assert size > 12 * 2**20
    assert taken < size - 3 * 2**20
    assert not load_tensors(tmp_path / "out")["model.layers.2.mlp.down_proj.weight"].any()


class TestInsisted:
    """`--engine stream`."""

    def test_nothing_heavy_is_imported(self, tiny: Path, tmp_path: Path) -> None:
        """The seconds that torch, transformers and mergekit take are not spent."""
        script = (
            "import sys\nfrom mergekit_interleave import cli\n"
            "words = ['run', 'interleave: every 4', 'out', '--engine', 'stream', '--model']\n"
            "try: cli.main([*words, sys.argv[1]])\nexcept SystemExit as left: status = left.code\n"
            "print(*sorted({m.split('.')[0] for m in sys.modules}), file=sys.stderr)\n"
            "sys.exit(status)"
        )
        result = subprocess.run(
            [sys.executable, "-c", script, tiny],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert not {"torch", "transformers", "mergekit", "numpy"} & set(result.stderr.split())
        assert "10 layers, 2 of them new" in result.stdout

    def test_it_writes_what_mergekit_writes(self, mk: Cli, sharded: Path, tmp_path: Path) -> None:
        """Tensors, config and recipe."""
        for engine in ("mergekit", "stream"):
            words = ("run", "interleave: every 2", tmp_path / engine, "--model", sharded)
            result = mk(*words, "--engine", engine)
            assert (result.status, result.err) == (0, "")
        assert_same_tensors(tmp_path / "stream", tmp_path / "mergekit")
        for file in ("config.json", "mergekit_config.yml"):
            ours, theirs = (tmp_path / engine / file for engine in ("stream", "mergekit"))
            assert ours.read_text() == theirs.read_text()

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["--dtype", "float16"], "is converted from F32 to F16"),
            (["--mergekit", "verbosity=1"], "mergekit's option verbosity has no meaning"),
            (["--cuda"], "mergekit's option cuda"),
        ],
    )
    def test_what_it_cannot_do_is_refused(
        self, words: list[str], reason: str, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """And never ignored."""
        out = tmp_path / "out"
        command = ["run", "interleave: every 4", out, "--model", tiny, "--engine", "stream"]
        result = mk(*command, *words)
        assert result.status != 0
        assert reason in result.err
        assert not out.exists()

    def test_mergekits_own_keys(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """Only mergekit makes tokenizers."""
        directive = f"model: {tiny}, interleave: every 4, tokenizer_source: base"
        result = mk("run", directive, tmp_path / "out", "--engine", "stream")
        assert (result.status, "tokenizer_source is mergekit's" in result.err) == (1, True)
