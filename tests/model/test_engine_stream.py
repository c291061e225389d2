"""The stream engine copies bytes unchanged and writes zeros as holes."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from harness import (
    Cli,
    assert_same_tensors,
    emulate_sharing,
    load_tensors,
    make_llama,
)

from mergekit_interleave._stored_tensor import Shard
from mergekit_interleave.checkpoint.checkpoint import open_checkpoint
from mergekit_interleave.checkpoint.safetensors_header import iterate_tensors, read_tensors
from mergekit_interleave.directive.growth import Every
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.directive.scale import zeroed_scales
from mergekit_interleave.engines import copy_range, stream
from mergekit_interleave.engines.protocol import Traffic, WriteOptions
from mergekit_interleave.engines.sharding import shards_of
from mergekit_interleave.errors import CheckpointError, OutputError
from mergekit_interleave.layout.layout import Edit, expand
from mergekit_interleave.planning.tensor_plan import TensorSpec, assemble
from mergekit_interleave.verification import mapped_bytes, stored_bytes, while_writing
from mergekit_interleave.verification.tensors import compare
from mergekit_interleave.verification.while_writing import RunningComparison


def parts_of(path: Path, *names: str) -> tuple[TensorSpec, ...]:
    """Return the tensors of an expansion, with the named tensors zeroed in the copies."""
    base = open_checkpoint(ModelRef(ModelPath(str(path))))
    layout = expand(Every(2), base.ref, base.depth, lambda _: Edit(zeroed_scales(names)))
    return assemble(layout, {base.ref: base})


def write(specs: Sequence[TensorSpec], out: Path, limit: int = 10**9, **how: Any) -> Traffic:
    """Write tensors into a new directory, and check that the ticks sum to their size."""
    out.mkdir()
    shards = shards_of(specs, limit, stream.block_size(out))
    seen: list[int] = []
    how.setdefault("bar", lambda _: nullcontext(seen.append))
    traffic = stream.write_shards(shards, out, WriteOptions(**how))
    assert sum(seen) == sum(spec.nbytes for spec in specs)
    return traffic


class TestWays:
    """The ways in which bytes are copied."""

    def test_they_are_the_same(
        self, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The files are equal, whether the kernel or Python copies, or blocks are shared."""
        specs = parts_of(sharded, "o_proj")
        write(specs, tmp_path / "any")
        write(specs, tmp_path / "hand", reflink=False)
        monkeypatch.delattr(os, "copy_file_range")
        write(specs, tmp_path / "old")
        lengths = emulate_sharing(monkeypatch)
        traffic = write(specs, tmp_path / "shared")
        probes = 4096 * len(list((tmp_path / "shared").glob("*.safetensors")))
        assert 0 < traffic.shared == sum(lengths) - probes
        for file in (tmp_path / "any").iterdir():
            for other in ("hand", "old", "shared"):
                assert (tmp_path / other / file.name).read_bytes() == file.read_bytes()

    def test_nothing_is_shared_by_the_kernel_either(
        self, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """copy_file_range may share blocks, so it is not called with --no-reflink."""

        def refuse(*_: object) -> int:
            raise AssertionError

        monkeypatch.setattr(os, "copy_file_range", refuse)
        monkeypatch.setattr(copy_range.fcntl, "ioctl", refuse)
        write(parts_of(sharded, "o_proj"), tmp_path / "out", reflink=False)

    def test_a_file_has_its_size_from_the_start(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The full size is set first: XFS reserves space for a growing file, which fills holes."""
        sizes = []
        put = copy_range.Pair.put

        def note(self: copy_range.Pair, data: bytes, at: int) -> None:
            sizes.append(os.fstat(self.target).st_size)
            put(self, data, at)

        monkeypatch.setattr(copy_range.Pair, "put", note)
        write(parts_of(tiny, "o_proj"), tmp_path / "out")
        assert sizes[0] == (tmp_path / "out" / "model.safetensors").stat().st_size

    def test_the_forecast_is_exact(
        self, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The forecast is exact to the byte, with and without shared blocks."""
        specs = parts_of(sharded, "o_proj")
        shards = shards_of(specs, 10**9, stream.block_size(tmp_path))
        emulate_sharing(monkeypatch)
        for reflink in (True, False):
            forecast = stream.forecast(shards, tmp_path, reflink=reflink)
            assert write(specs, tmp_path / str(reflink), reflink=reflink) == forecast
            files = list((tmp_path / str(reflink)).glob("*.safetensors"))
            total = forecast.written + forecast.shared + forecast.holes
            assert total == sum(file.stat().st_size for file in files)
            assert (forecast.shared > 0) is reflink

    def test_zeros_take_no_room(self, tmp_path: Path) -> None:
        """Zeros take no disk space, even at the end of a file."""
        import torch
        from safetensors.torch import save_file

        base = make_llama(tmp_path / "base", layers=2)
        tensors = load_tensors(base)
        for i in range(2):
            tensors[f"model.layers.{i}.mlp.down_proj.weight"] = torch.ones(2**20)
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        traffic = write(parts_of(base, "down_proj"), tmp_path / "out")
        written = tmp_path / "out" / "model.safetensors"
        size, taken = written.stat().st_size, written.stat().st_blocks * 512
        assert traffic.holes == 2**22
        assert size > 12 * 2**20
        assert taken < size - 3 * 2**20
        assert not load_tensors(tmp_path / "out")["model.layers.2.mlp.down_proj.weight"].any()


class TestShards:
    """The written files and their index."""

    def test_one_where_the_base_has_one(self, tiny: Path, tmp_path: Path) -> None:
        """A single file has no index."""
        write(parts_of(tiny, "o_proj"), tmp_path / "out")
        assert os.listdir(tmp_path / "out") == ["model.safetensors"]

    def test_the_index(self, tiny: Path, tmp_path: Path) -> None:
        """The index names every tensor and states the total size."""
        specs = parts_of(tiny, "o_proj")
        write(specs, tmp_path / "out", 40_000)
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in specs)
        assert len(read_tensors(tmp_path / "out")) == len(specs) == len(index["weight_map"])

    def test_the_bases_metadata(self, tiny: Path, tmp_path: Path) -> None:
        """The safetensors library reads the result, with the metadata of the base."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        tmp_path.joinpath("base").mkdir()
        for name in ("config.json",):
            (tmp_path / "base" / name).write_bytes((tiny / name).read_bytes())
        save_file(load_tensors(tiny), tmp_path / "base" / "model.safetensors", {"made": "here"})
        write(parts_of(tmp_path / "base", "o_proj"), tmp_path / "out")
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
            assert opened.metadata() == {"format": "pt", "made": "here"}


class TestFaults:
    """An error names the file and stops all threads."""

    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first failure stops the other files as well."""
        specs = parts_of(make_llama(tmp_path / "base", shard_size="10KB"), "o_proj")
        calls = []

        def full(*_: object) -> int:
            calls.append(1)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "copy_file_range", full)
        assert len({spec.tensor.file for spec in specs}) > 4
        with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)) as error:
            write(specs, tmp_path / "out")
        assert re.search(r"base/model-0000\d-of-\d+\.safetensors\b", str(error.value))
        assert len(calls) <= 2

    def test_a_source_that_shrinks(self, own_tiny: Path, tmp_path: Path) -> None:
        """A source that was truncated before it is read is an error that names it."""
        specs = parts_of(own_tiny, "o_proj")
        os.truncate(own_tiny / "model.safetensors", 40_000)
        with pytest.raises(CheckpointError, match=r"own/model\.safetensors: "):
            write(specs, tmp_path / "out")

    def test_a_source_that_shrinks_during_the_copy(
        self, own_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A source that is truncated while it is read is an error that names it."""
        specs = parts_of(own_tiny, "o_proj")
        monkeypatch.setattr(Shard, "check_unchanged", lambda *_: None)
        os.truncate(own_tiny / "model.safetensors", 40_000)
        with pytest.raises(OutputError, match=r"own/model\.safetensors\b"):
            write(specs, tmp_path / "out")

    def test_interrupted(self, tmp_path: Path) -> None:
        """Ctrl-C interrupts the main thread, and the other threads stop."""
        specs = parts_of(make_llama(tmp_path / "base", shard_size="10KB"), "o_proj")
        (tmp_path / "out").mkdir()
        shards = shards_of(specs, 10**9, 4096)
        ticks = []

        def interrupt(nbytes: int) -> None:
            if not ticks:
                os.kill(os.getpid(), signal.SIGINT)
            ticks.append(nbytes)
            time.sleep(0.02)

        with pytest.raises(KeyboardInterrupt):
            stream.write_shards(
                shards, tmp_path / "out", WriteOptions(bar=lambda _: nullcontext(interrupt))
            )
        assert len(os.listdir(tmp_path / "out")) < len(shards) / 2

    def test_the_first_failure_counts(self) -> None:
        """Only the first failure is reported, because later ones follow from it."""
        gate = stream._Gate(lambda _: None)  # noqa: SLF001
        first = OSError("first")
        assert gate.close(first) is first
        assert gate.close(OSError("second")) is first
        with pytest.raises(InterruptedError):
            gate.tick(1)

    def test_a_base_that_is_swapped(self, own_tiny: Path, tmp_path: Path) -> None:
        """A base replaced by another file of the same size and time is an error that names it."""
        specs = parts_of(own_tiny, "o_proj")
        file = own_tiny / "model.safetensors"
        status = file.stat()
        (own_tiny / "other").write_bytes(file.read_bytes())
        os.utime(own_tiny / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
        (own_tiny / "other").rename(file)
        with pytest.raises(CheckpointError, match=r"own/model\.safetensors: "):
            write(specs, tmp_path / "out")


class TestComparisonWhileWriting:
    """Each piece is compared right after it is written."""

    @pytest.fixture(params=[1, 10**9], ids=["mapped", "read"], autouse=True)
    def _way(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Map or read all copied tensors."""
        monkeypatch.setattr(while_writing, "_WORTH_MAPPING", request.param)

    def test_every_tensor_is_compared(self, sharded: Path, tmp_path: Path) -> None:
        """All tensors, copied and zeroed, are equal, and the files are not read a second time."""
        specs = parts_of(sharded, "o_proj")
        running = RunningComparison(specs, lambda _: None)
        write(specs, tmp_path / "out", written=running.written)
        running.close()
        assert running.equal == {spec.name for spec in specs}

        def unread(*_: object) -> None:
            raise AssertionError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stored_bytes, "first_difference", unread)
            found = iterate_tensors(tmp_path / "out")
            assert not compare(found, specs, equal=running.equal).differences

    def test_a_wrong_byte_is_left_to_the_comparison_of_files(
        self, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A tensor with a wrong byte is not called equal, so the final comparison names it."""
        specs = parts_of(sharded, "o_proj")
        put = copy_range.Pair.put

        def flawed(pair: copy_range.Pair, data: bytes, at: int) -> None:
            put(pair, data[:-1] + bytes([data[-1] ^ 1]) if at > 4096 else data, at)

        monkeypatch.delattr(os, "copy_file_range")
        monkeypatch.setattr(copy_range.Pair, "put", flawed)
        running = RunningComparison(specs, lambda _: None)
        write(specs, tmp_path / "out", written=running.written)
        running.close()
        wrong = {spec.name for spec in specs} - running.equal
        found = compare(iterate_tensors(tmp_path / "out"), specs, equal=running.equal)
        assert wrong
        assert {difference.tensor for difference in found.differences} == wrong

    def test_a_system_that_cannot_map(
        self, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tensors that cannot be mapped are read."""
        monkeypatch.setattr(mapped_bytes, "_MEMCMP", None)
        specs = parts_of(sharded, "o_proj")
        running = RunningComparison(specs, lambda _: None)
        write(specs, tmp_path / "out", written=running.written)
        running.close()
        assert running.equal == {spec.name for spec in specs}

    def test_shared_blocks_are_left_to_the_comparison_of_files(
        self, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where blocks can be shared, nothing is read while files are written."""
        emulate_sharing(monkeypatch)
        specs = parts_of(sharded, "o_proj")
        running = RunningComparison(specs, lambda _: None)
        write(specs, tmp_path / "out", written=running.written)
        running.close()
        assert not running.equal


class TestEngineOption:
    """`--engine stream` never uses another engine."""

    def test_mergekit_is_not_imported(self, tiny: Path, tmp_path: Path) -> None:
        """A run imports transformers, which checks the result, but not mergekit."""
        script = (
            "import sys\nfrom mergekit_interleave.cli import main as cli\n"
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
        imported = set(result.stderr.split())
        assert "transformers" in imported
        assert "mergekit" not in imported
        assert re.search(r"\b10\b.*\b2\b", result.stdout)

    def test_it_writes_what_mergekit_writes(self, mk: Cli, sharded: Path, tmp_path: Path) -> None:
        """The stream engine writes the same tensors, config and recipe as mergekit."""
        for engine in ("mergekit", "stream"):
            words = ("run", "interleave: every 2", tmp_path / engine, "--model", sharded)
            result = mk(*words, "--engine", engine)
            assert (result.status, result.err) == (0, "")
        assert_same_tensors(tmp_path / "stream", tmp_path / "mergekit")
        for file in ("config.json", "mergekit_config.yml"):
            streamed, merged = (tmp_path / engine / file for engine in ("stream", "mergekit"))
            assert streamed.read_text() == merged.read_text()

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--dtype", "float16"], (1, r"model\.embed_tokens\.weight\b.*\bF32\b.*\bF16\b")),
            (["--mergekit", "verbosity=1"], (2, r"\bverbosity\b")),
            (["--cuda"], (2, r"\bcuda\b")),
        ],
    )
    def test_what_it_cannot_do_is_refused(
        self, words: list[str], expected: tuple[int, str], mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """An option that the engine does not support is refused, not ignored."""
        out = tmp_path / "out"
        command = ["run", "interleave: every 4", out, "--model", tiny, "--engine", "stream"]
        result = mk(*command, *words)
        status, named = expected
        assert result.status == status
        assert re.search(rf"^error: the stream engine\b.*{named}", result.err), result.err
        assert not out.exists()

    def test_mergekits_own_keys(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """A directive that changes the tokenizer is refused, because only mergekit writes one."""
        directive = f"model: {tiny}, interleave: every 4, tokenizer_source: base"
        result = mk("run", directive, tmp_path / "out", "--engine", "stream")
        assert (result.status, "`tokenizer_source`" in result.err) == (1, True)
