"""Copying byte ranges between files, in every way that the system offers."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import emulate_sharing

from mergekit_interleave.engines import copy_range
from mergekit_interleave.engines.copy_range import Pair, can_share

BLOCK = 4096


class Files:
    """A file of random bytes, and an empty one."""

    def __init__(self, folder: Path) -> None:
        self.data = os.urandom(5 * BLOCK)
        (folder / "source").write_bytes(self.data)
        self.source, self.target = folder / "source", folder / "target"
        self.opened = self.source.open("rb"), self.target.open("wb+")
        self.ticks: list[int] = []
        self.pair = Pair(*(file.fileno() for file in self.opened), self.ticks.append)

    @property
    def written(self) -> bytes:
        """The content of the target so far."""
        return self.target.read_bytes()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    """Two open files."""
    files = Files(tmp_path)
    yield files
    for file in files.opened:
        file.close()


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_range_is_copied(by_hand: bool, files: Files) -> None:
    """A range is copied to its place, and its bytes are counted."""
    files.pair.copy(5, 100, 10_000, by_hand=by_hand)
    assert files.written == bytes(100) + files.data[5:10_005]
    assert sum(files.ticks) == 10_000


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP])
def test_without_the_kernels_help(
    answer: int, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying falls back to read and write, also when the kernel refuses half way."""
    move, calls = os.copy_file_range, []

    def refuse(source: int, target: int, count: int, start: int, at: int) -> int:
        calls.append(start)
        if len(calls) > 1:
            raise OSError(answer, os.strerror(answer))
        return move(source, target, min(count, 100), start, at)

    monkeypatch.setattr(os, "copy_file_range", refuse)
    files.pair.copy(5, 100, 10_000)
    assert files.written == bytes(100) + files.data[5:10_005]
    assert (sum(files.ticks), calls) == (10_000, [5, 105])


def test_a_system_without_the_call(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without copy_file_range copies by hand."""
    monkeypatch.delattr(os, "copy_file_range")
    files.pair.copy(0, 0, 5 * BLOCK)
    assert files.written == files.data


def test_short_moves_and_short_writes(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel copies less than was asked for, it is asked again."""
    move, write, read = os.copy_file_range, os.write, os.read
    monkeypatch.setattr(
        os, "copy_file_range", lambda s, t, count, start, at: move(s, t, min(count, 7), start, at)
    )
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:11]))
    monkeypatch.setattr(os, "read", lambda fd, count: read(fd, min(count, 13)))
    files.pair.copy(0, 0, 1000)
    files.pair.copy(1000, 1000, 1000, by_hand=True)
    assert files.written == files.data[:2000]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_an_error_of_the_disk_is_no_reason_to_go_on(
    error: int, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only an unsupported call leads to another way; other errors are raised."""

    def fail(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "copy_file_range", fail)
    monkeypatch.setattr(copy_range.fcntl, "ioctl", fail)
    for way in (files.pair.copy, files.pair.share):
        with pytest.raises(OSError, match=os.strerror(error)):
            way(0, 0, BLOCK)
    assert files.written == b""


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_source_that_ends_too_early(by_hand: bool, files: Files) -> None:
    """A source that ends too early is an error."""
    with pytest.raises(OSError, match="cut short"):
        files.pair.copy(4 * BLOCK, 0, 2 * BLOCK, by_hand=by_hand)


def test_the_same_bytes_again_and_again(files: Files) -> None:
    """Any number of repeated bytes is written."""
    files.pair.fill(b"abc", 5, 3 * 200_000)
    assert files.written == bytes(5) + b"abc" * 200_000
    assert sum(files.ticks) == 600_000


class TestShare:
    """Blocks are shared where the filesystem can."""

    def test_it_can_or_it_cannot(self, files: Files, tmp_path: Path) -> None:
        """On this filesystem; the return value is what was done."""
        can = can_share(files.source, tmp_path, BLOCK)
        assert files.pair.share(BLOCK, 0, 2 * BLOCK) is can
        assert files.written == (files.data[BLOCK : 3 * BLOCK] if can else b"")
        assert files.ticks == ([2 * BLOCK] if can else [])
        assert sorted(os.listdir(tmp_path)) == ["source", "target"]

    def test_where_it_can(
        self, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The range is in the target; a file below one block has nothing to share."""
        emulate_sharing(monkeypatch)
        assert can_share(files.source, tmp_path, BLOCK)
        assert files.pair.share(BLOCK, 0, 2 * BLOCK)
        assert files.written == files.data[BLOCK : 3 * BLOCK]
        (tmp_path / "small").write_bytes(b"x")
        assert not can_share(tmp_path / "small", tmp_path, BLOCK)

    def test_the_request_is_the_kernels(
        self, files: Files, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Struct file_clone_range: s64 src_fd, u64 src_offset, src_length, dest_offset."""
        seen = []
        monkeypatch.setattr(copy_range.fcntl, "ioctl", lambda *words: seen.append(words))
        assert files.pair.share(1 * BLOCK, 3 * BLOCK, 2 * BLOCK)
        ((target, request, what),) = seen
        assert (target, request) == (files.pair.target, 0x4020940D)
        assert struct.unpack("@qQQQ", what) == (files.pair.source, BLOCK, 2 * BLOCK, 3 * BLOCK)

    @pytest.mark.parametrize("answer", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL])
    def test_where_it_cannot(
        self, answer: int, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A system without the call answers False."""

        def refuse(*_: object) -> int:
            raise OSError(answer, os.strerror(answer))

        monkeypatch.setattr(copy_range.fcntl, "ioctl", refuse)
        assert not files.pair.share(0, 0, BLOCK)
        assert not can_share(files.source, tmp_path, BLOCK)
