"""After any failure of a run, OUT is whole or absent, and the next run removes leftovers."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import faults
import pytest
from faults import DIRECTIVE, ENGINES, GGUF, Runner, litter, verified, whole_or_absent

linux = pytest.mark.skipif(sys.platform != "linux", reason="root's capabilities are Linux's")
each = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """Return a runner that starts runs without waiting for imports."""
    with closing(Runner()) as runner:
        yield runner


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the base, which tests must not change."""
    return faults.base(tmp_path_factory.mktemp("source"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a directory that contains only OUT."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def words(source: Path, out: Path, engine: str) -> tuple[object, ...]:
    """Return the arguments of a run; OUT is the last."""
    return ("run", "--model", source, "--engine", engine, DIRECTIVE, out)


def one_error(text: str) -> bool:
    """Return whether the text is one `error:` line with at most one hint."""
    return re.fullmatch(r"(note: .*\n)*error: .*\n(hint: .*\n)?", text) is not None


@each
def test_kills(engine: str, runner: Runner, source: Path, place: Path) -> None:
    """OUT is whole or absent after each of three killed runs; `make faults` kills 200."""
    found = faults.kills(runner, engine, source, place / "out", 3)
    assert found.keys() <= {"absent", "whole"}, found
    assert found["absent"]


@each
def test_a_write_that_fails(engine: str, runner: Runner, source: Path, place: Path) -> None:
    """A failed write gives one error and leaves nothing, not even the staging directory."""
    status, stderr = runner.run(*words(source, place / "out", engine), most_bytes=2**20)
    assert (status, one_error(stderr)) == (1, True), stderr
    assert os.strerror(errno.EFBIG) in stderr
    assert not list(place.iterdir())


@each
def test_a_full_disk(engine: str, runner: Runner, source: Path, tmp_path: Path) -> None:
    """A disk that fills up after the check of free space gives one error and leaves nothing."""
    with faults.small_filesystem(tmp_path / "small", 20) as small:
        if small is None:
            pytest.skip("no filesystem may be mounted here")
        run = words(source, small / "out", engine)
        status, stderr = runner.run(*run, fault="no_room_later")
        assert (status, one_error(stderr), os.strerror(errno.ENOSPC) in stderr) == (
            1,
            True,
            True,
        ), stderr
        assert not list(small.iterdir())
        status, stderr = runner.run(*run)
        assert (status, f"error: {small}: " in stderr) == (1, True), stderr


@each
@linux
def test_a_permission_that_is_lost(engine: str, runner: Runner, source: Path, place: Path) -> None:
    """OUT is absent, and the next run removes what this one could not remove."""
    run = words(source, place / "out", engine)
    status, stderr = runner.run(*run, powerless=True, fault="parent_closed_later")
    assert (status, os.strerror(errno.EACCES) in stderr) == (1, True), stderr
    assert not (place / "out").exists()
    closed = runner.run(*run, powerless=True)
    assert (closed[0], os.strerror(errno.EACCES) in closed[1]) == (1, True), closed
    place.chmod(0o755)
    status, stderr = runner.run(*run, powerless=True)
    assert status == 0, stderr
    assert not litter(place / "out")
    assert verified(place / "out", source)


@each
def test_a_source_that_is_cut_short(
    engine: str, runner: Runner, source: Path, tmp_path: Path, place: Path
) -> None:
    """A truncated source gives one error; with mergekit, which maps it, it may kill the process."""
    own = Path(shutil.copytree(source, tmp_path / "own"))
    run = words(own, place / "out", engine)
    status, stderr = runner.run(*run, fault="source_cut_short", source=str(own))
    assert status in ((1,) if engine == "stream" else (1, -7)), stderr
    assert status == -7 or one_error(stderr), stderr
    assert not (place / "out").exists()
    shutil.rmtree(own)
    shutil.copytree(source, own)
    status, stderr = runner.run(*run)
    assert status == 0, stderr
    assert not litter(place / "out")


@each
def test_two_at_once(engine: str, runner: Runner, source: Path, place: Path) -> None:
    """Of two runs to one OUT, one writes and the other is refused."""
    command = [sys.executable, "-m", "mergekit_interleave"]
    command += map(str, words(source, place / "out", "stream"))
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(0.3)  # while it starts
    runner.start(*words(source, place / "out", engine))
    _, err = process.communicate()
    ends = [(process.returncode, err), runner.end()]
    assert sorted(status for status, _ in ends) == [0, 1], ends
    (stderr,) = [text for status, text in ends if status]
    assert one_error(stderr)
    assert f"error: {place / 'out'}: " in stderr
    assert verified(place / "out", source)
    assert not litter(place / "out")


@each
def test_another_filesystem(engine: str, runner: Runner, source: Path, tmp_path: Path) -> None:
    """OUT may be on another filesystem than the base."""
    with faults.small_filesystem(tmp_path / "small", 200) as small:
        if small is None:
            pytest.skip("no filesystem may be mounted here")
        status, stderr = runner.run(*words(source, small / "out", engine))
        assert status == 0, stderr
        assert verified(small / "out", source)


@each
def test_odd_names(engine: str, runner: Runner, source: Path, tmp_path: Path) -> None:
    """Names may have spaces, quotes and any letters, and may look like a flag or a pattern."""
    base = Path(shutil.copytree(source, tmp_path / "zwei Wörter 'und' 模型 [a-z]*"))
    out = tmp_path / 'größer & "tiefer" $HOME' / "-o ut"
    status, stderr = runner.run(*words(base, out, engine))
    assert status == 0, stderr
    assert verified(out, base)
    assert not litter(out)


@each
def test_a_temporary_directory_that_is_full(
    engine: str, runner: Runner, source: Path, place: Path, tmp_path: Path
) -> None:
    """A full temporary directory does not stop a run."""
    with faults.small_filesystem(tmp_path / "small", 1) as small:
        if small is None:
            pytest.skip("no filesystem may be mounted here")
        (small / "full").write_bytes(bytes(2**20))
        environment = {"TMPDIR": str(small)}
        run = words(source, place / "out", engine)
        status, stderr = runner.run(*run, environment=environment)
        assert status == 0, stderr
    assert verified(place / "out", source)


def test_a_refusal_with_a_full_temporary_directory(
    runner: Runner, tmp_path: Path, place: Path
) -> None:
    """A refusal states its reason even if the temporary directory is full."""
    import toys

    base = tmp_path / "base"
    toys.build("gpt_neox_japanese").save_pretrained(base)
    with faults.small_filesystem(tmp_path / "small", 1) as small:
        if small is None:
            pytest.skip("no filesystem may be mounted here")
        (small / "full").write_bytes(bytes(2**20))
        run = ("run", "append: 1", place / "out", "--model", base)
        status, stderr = runner.run(*run, environment={"TMPDIR": str(small)})
    assert (status, one_error(stderr), "config.json" in stderr) == (1, True, True), stderr


def test_a_disk_that_cannot_be_read(source: Path) -> None:
    """A comparison that cannot read a file names it."""
    from mergekit_interleave.checkpoint.safetensors_header import read_tensors
    from mergekit_interleave.errors import CheckpointError
    from mergekit_interleave.verification import stored_bytes as comparison

    class Broken:
        """A file on a disk that fails."""

        def __init__(self, file: object) -> None:
            self.fileno = file.fileno  # type: ignore[attr-defined]

        def seek(self, _: int) -> None:
            pass

        def read(self, _: int) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    tensor = next(iter(read_tensors(source).values()))
    files = comparison.Files()
    with tensor.file.open("rb") as file:
        files.opened[tensor.shard] = Broken(file)  # type: ignore[assignment]
        with pytest.raises(CheckpointError, match=rf"model-00001.*: {os.strerror(errno.EIO)}"):
            files.read(tensor.shard, 0, 10)


def test_whole_or_absent(source: Path, place: Path) -> None:
    """`whole_or_absent` detects half a model."""
    assert whole_or_absent(place / "out", source)
    command = [sys.executable, "-m", "mergekit_interleave"]
    subprocess.run([*command, *map(str, words(source, place / "out", "stream"))], check=True)
    assert whole_or_absent(place / "out", source)
    next((place / "out").glob("*.safetensors")).unlink()
    assert not whole_or_absent(place / "out", source)


class TestGguf:
    """The same for GGUF files, which are written as several splits and a card."""

    @pytest.fixture(scope="class")
    def file(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Return the base, which tests must not change."""
        return faults.gguf_base(tmp_path_factory.mktemp("gguf"))

    def test_kills(self, runner: Runner, file: Path, place: Path) -> None:
        """OUT is whole or absent after each of four killed runs; `make faults` kills 200."""
        found = faults.kills(runner, GGUF, file, place / "out.gguf", 4)
        assert found.keys() <= {"absent", "whole"}, found

    def test_a_write_that_fails(self, runner: Runner, file: Path, place: Path) -> None:
        """A failed write gives one error and leaves nothing."""
        run = faults.words_of(GGUF, file, place / "out.gguf")
        status, stderr = runner.run(*run, most_bytes=2**20)
        assert (status, one_error(stderr)) == (1, True), stderr
        assert os.strerror(errno.EFBIG) in stderr
        assert not list(place.iterdir())

    def test_a_full_disk(self, runner: Runner, file: Path, tmp_path: Path) -> None:
        """A disk that fills up after the check of free space gives one error."""
        with faults.small_filesystem(tmp_path / "small", 10) as small:
            if small is None:
                pytest.skip("no filesystem may be mounted here")
            run = faults.words_of(GGUF, file, small / "out.gguf")
            for how in ({"fault": "no_room_later"}, {}):
                status, stderr = runner.run(*run, **how)
                assert (status, one_error(stderr)) == (1, True), stderr
                assert not list(small.iterdir())

    def test_two_at_once(self, file: Path, place: Path) -> None:
        """Of two runs to one OUT, one writes and the other is refused."""
        run = [sys.executable, "-m", "mergekit_interleave"]
        run += map(str, faults.words_of(GGUF, file, place / "out.gguf"))
        others = [subprocess.Popen(run, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        ends = [(each.communicate()[1], each.returncode) for each in others]
        assert sorted(status for _, status in ends) == [0, 1], ends
        assert verified(place / "out.gguf", file)
        assert not litter(place / "out.gguf")
