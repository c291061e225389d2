"""Tests of `mergekit_interleave.verification.mapped_bytes`."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.verification import mapped_bytes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no memcmp to call")

SIZE = 3 * 2**16
DATA = bytes(i * i % 251 for i in range(SIZE))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with known bytes."""
    file = tmp_path_factory.mktemp("mapped") / "file"
    file.write_bytes(DATA)
    return file


@pytest.fixture(scope="module", params=[mmap.ALLOCATIONGRANULARITY, 2**22], autouse=True)
def _window(request: pytest.FixtureRequest) -> Iterator[None]:
    """Map a small part of a range at once, or all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped_bytes, "_WINDOW", request.param)
        yield


@given(st.data())
def test_ranges_are_equal_if_their_bytes_are(file: Path, data: st.DataObject) -> None:
    """Two ranges are equal exactly if the bytes are, wherever they start."""
    length = data.draw(st.integers(1, SIZE))
    one, other = (data.draw(st.integers(0, SIZE - length)) for _ in range(2))
    with file.open("rb") as first, file.open("rb") as second:
        found = mapped_bytes.are_equal(first.fileno(), one, second.fileno(), other, length)
    assert found is (DATA[one : one + length] == DATA[other : other + length])


@given(st.data())
def test_a_changed_byte_is_found(file: Path, data: st.DataObject) -> None:
    """One changed byte makes the ranges that contain it unequal, and no others."""
    at = data.draw(st.integers(0, SIZE - 1))
    start = data.draw(st.integers(0, SIZE - 1))
    stop = data.draw(st.integers(start + 1, SIZE))
    changed = file.with_name("changed")
    changed.write_bytes(DATA[:at] + bytes([DATA[at] ^ 1]) + DATA[at + 1 :])
    with file.open("rb") as first, changed.open("rb") as second:
        found = mapped_bytes.are_equal(first.fileno(), start, second.fileno(), start, stop - start)
    assert found == (not start <= at < stop)


def test_a_file_that_is_too_short(file: Path) -> None:
    """A range beyond the end of a file is not mapped."""
    with file.open("rb") as first, file.open("rb") as second:
        assert mapped_bytes.are_equal(first.fileno(), 0, second.fileno(), 0, SIZE + 1) is None


def test_a_file_that_cannot_be_mapped(file: Path, tmp_path: Path) -> None:
    """What the system cannot map is not compared."""
    with file.open("rb") as first:
        directory = os.open(tmp_path, os.O_RDONLY)
        try:
            assert mapped_bytes.are_equal(first.fileno(), 0, directory, 0, 1) is None
        finally:
            os.close(directory)
