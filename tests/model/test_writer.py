"""`run` selects an engine, checks the free space, and reads back what it wrote."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Cli, emulate_sharing, load_tensors, make_llama, write_header

from mergekit_interleave.checkpoint.safetensors_header import read_tensors
from mergekit_interleave.engines import registry

SetFree = Callable[[int], None]


@pytest.fixture
def set_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SetFree:
    """Return a function that sets the number of free bytes on the disk."""
    usage = shutil.disk_usage(tmp_path)

    def limit(nbytes: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=nbytes))

    return limit


class TestFreeSpace:
    """`run` writes nothing if the disk has too little free space."""

    WORDS = ("run", "interleave: every 2", "out", "--model")

    def test_too_little_for_any_engine(
        self, mk: Cli, tiny: Path, tmp_path: Path, set_free: SetFree
    ) -> None:
        """The error states what each engine needs; the stream engine writes no zeros."""
        set_free(200_000)
        for engine, sizes in (
            ("mergekit", r"391 kB\b.*\b200 kB\b"),
            ("stream", r"36\d kB\b.*\b200 kB\b"),
            ("auto", r"36\d kB\b.*\bstream\b.*\b391 kB\b.*\bmergekit\b.*\b200 kB\b"),
        ):
            result = mk(*self.WORDS, tiny, "--engine", engine, cwd=tmp_path)
            assert result.status == 1
            pattern = rf"^error: {re.escape(str(tmp_path))}: \D*{sizes}"
            assert re.search(pattern, result.err), result.err
            assert os.listdir(tmp_path) == []

    def test_small_files_count(
        self, mk: Cli, own_tiny: Path, tmp_path: Path, set_free: SetFree
    ) -> None:
        """The size of the copied files is part of the needed space."""
        (own_tiny / "vocab.txt").write_bytes(bytes(10**6))
        set_free(10**6)
        for engine in registry.names():
            result = mk(*self.WORDS, own_tiny, "--engine", engine, cwd=tmp_path)
            assert (result.status, "1.3" in result.err) == (1, True), result.err

    def test_the_fallback_needs_less_as_well(
        self, mk: Cli, tmp_path: Path, set_free: SetFree
    ) -> None:
        """If mergekit cannot write a model, the space that the stream engine needs is checked."""
        base = make_llama(tmp_path / "base", attention_bias=True)
        words = (*self.WORDS, base, "--mergekit", "async_write=true")
        set_free(380_000)
        result = mk(*words, cwd=tmp_path)
        assert result.status == 0, result.err
        assert re.search(r"^note: .*\bstream\b.*\bk_proj\.bias\b", result.err), result.err

    def test_enough_for_the_stream_engine_alone(
        self, mk: Cli, tiny: Path, tmp_path: Path, set_free: SetFree
    ) -> None:
        """If only the stream engine has enough space, the hint names it and the space it needs."""
        set_free(370_000)
        result = mk(*self.WORDS, tiny, cwd=tmp_path)
        assert result.status == 1
        assert re.search(r"^hint: --engine stream\b.*\b359 kB\b", result.err, re.MULTILINE)
        assert os.listdir(tmp_path) == []
        assert mk(*self.WORDS, tiny, "--engine", "stream", cwd=tmp_path).status == 0

    def test_shared_blocks_need_none(
        self,
        mk: Cli,
        tmp_path: Path,
        set_free: SetFree,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Blocks that are shared with the base need no free space."""
        base = make_llama(tmp_path / "base", layers=4, hidden_size=128, intermediate_size=512)
        emulate_sharing(monkeypatch)
        set_free(100_000)
        words = (*self.WORDS, base, "--engine", "stream")
        refused = mk(*words, "--no-reflink", cwd=tmp_path)
        assert refused.status == 1
        assert re.search(r"^error: .*\b5\.33 MB\b.*\b100 kB\b", refused.err), refused.err
        result = mk(*words, cwd=tmp_path)
        assert result.status == 0, result.err
        assert re.search(r": [\d.]+ kB\b.* [\d.]+ MB shared\b", result.out), result.out

    def test_700_gb(self, mk: Cli, tmp_path: Path) -> None:
        """A checkpoint larger than the disk is refused in seconds: only headers are read."""
        assert shutil.disk_usage(tmp_path).free < 8 * 10**11
        base = sparse_llama(tmp_path / "base", layers=96, hidden=16_384, intermediate=53_248)
        started = time.monotonic()
        result = mk(*self.WORDS, base, "--engine", "stream", cwd=tmp_path)
        assert time.monotonic() - started < 20  # seconds; a copy would take minutes
        assert result.status == 1
        assert re.search(r"^error: .*\b9\d\d GB\b.* [\d.]+ [GM]B\b", result.err), result.err
        assert os.listdir(tmp_path) == ["base"]


def sparse_llama(path: Path, *, layers: int, hidden: int, intermediate: int) -> Path:
    """Make a Llama whose weights are holes, with one shard for each layer."""
    path.mkdir()
    square, wide = [hidden, hidden], [intermediate, hidden]
    layer = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": square,
        "self_attn.k_proj": square,
        "self_attn.v_proj": square,
        "self_attn.o_proj": square,
        "mlp.gate_proj": wide,
        "mlp.up_proj": wide,
        "mlp.down_proj": wide[::-1],
    }
    outside = {"embed_tokens": [32_000, hidden], "norm": [hidden]}
    shards = [{f"model.{name}.weight": shape for name, shape in outside.items()}]
    shards += [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        for i in range(layers)
    ]
    weight_map = {}
    for i, shard in enumerate(shards):
        header, offset = {}, 0
        for name, shape in shard.items():
            stop = offset + 2 * (shape[0] * shape[-1] if len(shape) > 1 else shape[0])
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, stop]}
            weight_map[name] = f"model-{i:05d}.safetensors"
            offset = stop
        file = path / f"model-{i:05d}.safetensors"
        write_header(file, header)
        os.truncate(file, file.stat().st_size + offset)
    index = {"weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "num_hidden_layers": layers, "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    return path


class TestHint:
    """A run by mergekit suggests the stream engine if that could have done the run faster."""

    @pytest.fixture
    def slow_mergekit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make mergekit's estimate long enough for the hint."""
        from mergekit_interleave.engines import mergekit

        monkeypatch.setattr(mergekit, "START", 100.0)

    @pytest.mark.parametrize(
        ("words", "hint"),
        [
            ((), r"hint: --engine stream .*\n"),
            (("--engine", "mergekit"), r"hint: --engine stream .*\n"),
            (("--engine", "stream"), ""),
            (("--dtype", "bfloat16"), ""),
            (("--async-write",), ""),
        ],
    )
    @pytest.mark.usefixtures("slow_mergekit")
    def test_the_hint_depends_on_the_options(
        self, words: tuple[str, ...], hint: str, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """There is no hint if the stream engine did the run or cannot do it."""
        result = mk("run", "append: 1", tmp_path / "out", "--model", tiny, *words)
        assert result.status == 0
        assert re.fullmatch(hint, result.err), result.err


class TestShards:
    """The number and sizes of the shards."""

    def test_the_stream_engine_has_as_many_as_the_base(
        self, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """The stream engine keeps the number of shards unless --out-shard-size requires more."""
        words = ("run", "append: 1", "--model", tiny, "--engine", "stream", "--out-shard-size")
        assert mk(*words[:-1], tmp_path / "one").status == 0
        assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
        assert mk(*words, "100KB", tmp_path / "more").status == 0
        sizes = [file.stat().st_size for file in (tmp_path / "more").glob("*.safetensors")]
        assert len(sizes) > 2
        assert max(sizes) < 110_000

    def test_a_shard_size_below_a_tensor_is_warned_of(
        self, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """A limit that the largest tensor exceeds, such as 5 bytes, gives a warning."""
        words = ("run", "append: 1", "--model", tiny, "--engine", "stream", "--out-shard-size")
        largest = max(tensor.nbytes for tensor in read_tensors(tiny).values())
        for size, warned in ((largest, False), (largest - 1, True), (5, True)):
            out = tmp_path / str(size)
            result = mk(*words, size, out)
            assert result.status == 0
            assert ("--out-shard-size" in result.err) is warned
            shards = len(list(out.glob("*.safetensors")))
            assert (f"; {shards} shards" in result.err) is warned


class TestVerify:
    """`run` reads back what it wrote."""

    def test_mergekits_zeros_are_always_checked(
        self, mk: Cli, own_tiny: Path, tmp_path: Path
    ) -> None:
        """Mergekit's zeros are always checked: it multiplies, and infinity times 0 is NaN."""
        import torch
        from safetensors.torch import save_file

        tensors = load_tensors(own_tiny)
        name = "model.layers.8.self_attn.o_proj.weight"
        tensors[name.replace("8", "7")][0, 0] = torch.inf
        save_file(tensors, own_tiny / "model.safetensors", {"format": "pt"})
        words = ("run", "append: 1", tmp_path / "out", "--model", own_tiny, "--no-verify")
        result = mk(*words)
        assert (result.status, name in result.err) == (1, True), result.err
        assert mk(*words, "--engine", "stream").status == 0

    def test_wrong_zeros_are_an_error(
        self, mk: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A zeroed tensor with other values is an error, unless --no-verify is given."""
        monkeypatch.setattr(
            "mergekit_interleave.verification.stored_bytes._first_nonzero", lambda *_: 0
        )
        words = ("run", "append: 1", tmp_path / "out", "--model", tiny, "--engine", "stream")
        result = mk(*words)
        assert result.status == 1
        assert "layer 8: model.layers.8.mlp.down_proj.weight" in result.err
        assert mk(*words, "--no-verify").status == 0


def test_a_source_that_changes_under_mergekit(
    mk: Cli, own_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that changes while mergekit reads it is an error, and OUT is absent."""
    from mergekit_interleave.engines import mergekit

    execute = mergekit.execute

    def disturbed(*words: object) -> None:
        execute(*words)  # type: ignore[arg-type]
        os.utime(own_tiny / "model.safetensors")

    monkeypatch.setattr(mergekit, "execute", disturbed)
    result = mk("run", "append: 1", tmp_path / "out", "--model", own_tiny)
    assert (result.status, f"error: {own_tiny}/model.safetensors: " in result.err) == (1, True)
    assert sorted(os.listdir(tmp_path)) == ["own"]


class TestBar:
    """The progress bar of the stream engine."""

    COMMAND = ("run", "append: 1", "out", "--engine", "stream", "--model")

    def test_on_a_terminal(self, tiny: Path, tmp_path: Path) -> None:
        """The bar shows bytes and rate on standard error, and is cleared at the end."""
        reader, terminal = pty.openpty()
        try:
            size = struct.pack("HHHH", 24, 80, 0, 0)
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
            words = [sys.executable, "-m", "mergekit_interleave", *self.COMMAND, str(tiny)]
            # Earlier runs in this process have set TQDM_DISABLE.
            environment = {**os.environ, "TQDM_DISABLE": ""}
            streams = {"stdout": subprocess.PIPE, "stderr": terminal}
            subprocess.run(words, cwd=tmp_path, env=environment, check=True, **streams)
            os.set_blocking(reader, False)
            output = os.read(reader, 10_000).decode()
        finally:
            os.close(reader)
            os.close(terminal)
        assert "weights:   0%" in output
        assert "B/s" in output
        assert output.endswith("\r")

    def test_into_a_pipe(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """No bar is shown if standard error is not a terminal."""
        result = mk(*self.COMMAND, tiny, cwd=tmp_path)
        assert (result.status, result.err) == (0, "")


@pytest.mark.parametrize("rows", ["square: 9", "after: -3", "after: 100"])
def test_a_fill_that_does_not_fit(rows: str, mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """A fill that reaches beyond its tensor is refused."""
    recipe = f"""
merge_method: passthrough
slices:
- sources: [{{model: {tiny}, layer_range: [0, 8]}}]
- sources:
  - model: {tiny}
    layer_range: [7, 8]
    parameters: {{fill: [{{filter: k_proj, value: 1.5, {rows}}}]}}
"""
    result = mk("run", "-", tmp_path / "out", "--engine", "stream", stdin=recipe)
    assert (result.status, "fill: " in result.err) == (1, True), result.err
    assert not (tmp_path / "out").exists()
