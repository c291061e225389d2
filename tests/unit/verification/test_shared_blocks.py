"""Shared blocks of two files are found through the kernel's extents."""

from __future__ import annotations

import errno
import fcntl
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergekit_interleave.verification import shared_blocks

HEADER, EXTENT = struct.Struct("=QQLLLL"), struct.Struct("=QQQQQLLLL")
SHARED, LAST, DELAYED = 0x2000, 0x1, 0x4
Extents = dict[int, list[tuple[int, int, int, int]]]
"""The extents of each descriptor: offset in the file, length, place on disk and flags."""


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Open two files in one filesystem."""
    for name in ("one", "other"):
        (tmp_path / name).write_bytes(b"x")
    with (tmp_path / "one").open() as one, (tmp_path / "other").open() as other:
        yield one.fileno(), other.fileno()


def report_extents(monkeypatch: pytest.MonkeyPatch, extents: Extents) -> None:
    """Make the kernel report these extents if they overlap the requested range."""

    def ioctl(descriptor: int, request: int, answer: bytearray) -> int:
        assert request == shared_blocks.FIEMAP
        start, length, *_, limit, _ = HEADER.unpack_from(answer)
        asked = [e for e in extents[descriptor] if e[0] < start + length and e[0] + e[1] > start]
        HEADER.pack_into(answer, 0, start, length, 1, len(asked), limit, 0)
        for number, (logical, nbytes, place, flags) in enumerate(asked[:limit]):
            at = HEADER.size + number * EXTENT.size
            EXTENT.pack_into(answer, at, logical, place, nbytes, 0, 0, flags, 0, 0, 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


def unshared(files: tuple[int, int], at: int, start: int, length: int) -> list[tuple[int, int]]:
    """Return the ranges that must be read."""
    return list(shared_blocks.unshared(files[0], at, files[1], start, length))


def test_shared_blocks_are_not_read(
    files: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared blocks are not read, and the rest of a range is."""
    one, other = files
    report_extents(
        monkeypatch, {one: [(4096, 8192, 100_000, SHARED)], other: [(0, 8192, 100_000, SHARED)]}
    )
    assert unshared(files, 4000, 0, 8192) == [
        (0, 8192)
    ]  # offset 4000 of one file does not share offset 0 of the other
    assert unshared(files, 4096, 0, 8192) == []
    assert unshared(files, 4100, 4, 100) == []
    assert unshared(files, 4096, 0, 9000) == [(8192, 808)]


def test_edges(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranges before, between and after shared blocks are read."""
    one, other = files
    places = [(4096, 4096, 50_000, SHARED), (12288, 4096, 70_000, SHARED | LAST)]
    report_extents(monkeypatch, {one: places, other: places})
    assert unshared(files, 1000, 1000, 20_000) == [(0, 3096), (7192, 4096), (15384, 4616)]


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        ((0, 4096, 50_000, SHARED), (0, 4096, 60_000, SHARED)),
        ((0, 4096, 50_000, 0), (0, 4096, 50_000, SHARED)),
        ((0, 4096, 50_000, SHARED | DELAYED), (0, 4096, 50_000, SHARED)),
        ((0, 4096, 0, SHARED | 0x2), (0, 4096, 0, SHARED | 0x2)),
        ((0, 4096, 50_000, SHARED | 0x8), (0, 4096, 50_000, SHARED | 0x8)),
        ((0, 4096, 50_000, SHARED | 0x800), (0, 4096, 50_000, SHARED | 0x800)),
    ],
)
def test_other_blocks_are_read(
    mine: tuple[int, int, int, int],
    others: tuple[int, int, int, int],
    files: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks that are unshared, unwritten, encoded or at unknown places are read."""
    one, other = files
    report_extents(monkeypatch, {one: [mine], other: [others]})
    assert unshared(files, 0, 0, 4096) == [(0, 4096)]


def test_many_extents(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks beyond the number of extents in the answer are read."""
    one, other = files
    many = [(i * 4096, 4096, 10**6 + i * 8192, SHARED) for i in range(300)]
    report_extents(monkeypatch, {one: many, other: many})
    assert unshared(files, 0, 0, 300 * 4096) == [(256 * 4096, 44 * 4096)]


def test_a_kernel_without_extents(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without support by the kernel, everything is read."""

    def ioctl(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert unshared(files, 0, 0, 5000) == [(0, 5000)]


def test_another_filesystem(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal offsets in two filesystems are different blocks, which are read."""
    one, other = files
    same = [(0, 4096, 50_000, SHARED)]
    report_extents(monkeypatch, {one: same, other: same})
    with Path("/dev/null").open() as elsewhere:
        assert unshared((one, elsewhere.fileno()), 0, 0, 4096) == [(0, 4096)]
