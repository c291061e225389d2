"""Byte ranges are copied between files in each way that the system offers."""

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
    """A file of random bytes and an empty file."""

    def __init__(self, folder: Path) -> None:
        self.data = os.urandom(5 * BLOCK)
        (folder / "source").write_bytes(self.data)
        self.source, self.target = folder / "source", folder / "target"
        self.opened = self.source.open("rb"), self.target.open("wb+")
        self.ticks: list[int] = []
        self.pair = Pair(*(file.fileno() for file in self.opened), self.ticks.append)

    @property
    def written(self) -> bytes:
        """The current content of the target."""
        return self.target.read_bytes()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    """Open a file of random bytes and an empty file."""
    files = Files(tmp_path)
    yield files
    for file in files.opened:
        file.close()


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_range_is_copied(by_hand: bool, files: Files) -> None:
    """A range is copied to its offset, and its bytes are counted."""
    files.pair.copy(5, 100, 10_000, by_hand=by_hand)
    assert files.written == bytes(100) + files.data[5:10_005]
    assert sum(files.ticks) == 10_000


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP])
def test_without_kernel_support(answer: int, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying falls back to read and write, also if the kernel refuses halfway."""
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
    """Without `os.copy_file_range`, bytes are copied with read and write."""
    monkeypatch.delattr(os, "copy_file_range")
    files.pair.copy(0, 0, 5 * BLOCK)
    assert files.written == files.data


def test_short_moves_and_short_writes(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel copies fewer bytes than requested, the rest is requested again."""
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
def test_a_disk_error_is_raised(error: int, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an unsupported call causes a fallback; any other error is raised."""

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


def test_repeated_bytes(files: Files) -> None:
    """Bytes are repeated to the requested length."""
    files.pair.fill(b"abc", 5, 3 * 200_000)
    assert files.written == bytes(5) + b"abc" * 200_000
    assert sum(files.ticks) == 600_000


class TestShare:
    """Blocks are shared if the filesystem supports it."""

    def test_this_filesystem(self, files: Files, tmp_path: Path) -> None:
        """The return value of `share` tells whether the blocks were shared."""
        can = can_share(files.source, tmp_path, BLOCK)
        assert files.pair.share(BLOCK, 0, 2 * BLOCK) is can
        assert files.written == (files.data[BLOCK : 3 * BLOCK] if can else b"")
        assert files.ticks == ([2 * BLOCK] if can else [])
        assert sorted(os.listdir(tmp_path)) == ["source", "target"]

    def test_a_filesystem_that_shares(
        self, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A shared range is in the target, and a file smaller than a block cannot share."""
        emulate_sharing(monkeypatch)
        assert can_share(files.source, tmp_path, BLOCK)
        assert files.pair.share(BLOCK, 0, 2 * BLOCK)
        assert files.written == files.data[BLOCK : 3 * BLOCK]
        (tmp_path / "small").write_bytes(b"x")
        assert not can_share(tmp_path / "small", tmp_path, BLOCK)

    def test_the_ioctl_request(self, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
        """The request is the kernel's struct file_clone_range: one s64, then three u64."""
        seen = []
        monkeypatch.setattr(copy_range.fcntl, "ioctl", lambda *words: seen.append(words))
        assert files.pair.share(1 * BLOCK, 3 * BLOCK, 2 * BLOCK)
        ((target, request, what),) = seen
        assert (target, request) == (files.pair.target, 0x4020940D)
        assert struct.unpack("@qQQQ", what) == (files.pair.source, BLOCK, 2 * BLOCK, 3 * BLOCK)

    @pytest.mark.parametrize("answer", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL])
    def test_a_system_that_cannot_share(
        self, answer: int, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`share` and `can_share` return False on a system without the call."""

        def refuse(*_: object) -> int:
            raise OSError(answer, os.strerror(answer))

        monkeypatch.setattr(copy_range.fcntl, "ioctl", refuse)
        assert not files.pair.share(0, 0, BLOCK)
        assert not can_share(files.source, tmp_path, BLOCK)
