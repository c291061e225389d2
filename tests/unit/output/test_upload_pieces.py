"""Weight files as runs of bytes of their base and bytes that the base does not have."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.output.upload_pieces import (
    BaseFile,
    Piece,
    Run,
    Span,
    filled,
    joined,
    others,
    signed_zeros,
)

BASE = BaseFile((Span(Path("base"), 0, 10**9),))
OTHER = BaseFile((Span(Path("other"), 0, 10**9),))

runs = st.builds(
    Run,
    st.sampled_from([BASE, OTHER]),
    st.integers(0, 5).map(lambda n: n * 10),
    st.just(10),
    st.sampled_from([None, others]),
)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of random bytes."""
    path = tmp_path_factory.mktemp("base") / "numbers"
    path.write_bytes(np.random.default_rng(0).bytes(2000))
    return path


@given(pieces=st.lists(runs | st.just(b"header"), max_size=8))
def test_joining_keeps_the_bytes(pieces: list[Piece]) -> None:
    """Joined pieces are the same bytes, and no two of them could be joined."""

    def bytes_of(some: list[Piece]) -> list[object]:
        return [
            at
            for piece in some
            for at in (
                [piece]
                if isinstance(piece, bytes)
                else [(piece.file, n, piece.change) for n in range(piece.start, piece.stop)]
            )
        ]

    found = joined(pieces)
    assert bytes_of(found) == bytes_of(pieces)
    for one, two in pairwise(found):
        if isinstance(one, Run) and isinstance(two, Run) and not (one.change or two.change):
            assert (one.file, one.stop) != (two.file, two.start)


@given(
    cuts=st.sets(st.integers(1, 99), max_size=5),
    start=st.integers(-20, 220),
    length=st.integers(0, 60),
)
def test_a_base_of_several_parts(numbers: Path, cuts: set[int], start: int, length: int) -> None:
    """A base reads like the concatenation of its parts, and ends at its ends."""
    data, bounds = numbers.read_bytes(), [0, *sorted(cuts), 100]
    spans = [Span(numbers, 1000 - 7 * a, b - a) for a, b in pairwise(bounds)]
    found = [data[span.start : span.start + span.length] for span in spans]
    base = BaseFile((b"header", *(x for pair in zip(spans, found, strict=True) for x in pair)))
    expected = b"header" + b"".join(2 * part for part in found)
    assert base.nbytes == len(expected) == 206
    assert base.read(start, start + length) == expected[max(start, 0) : max(start + length, 0)]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_zeros_keep_the_signs(dtype: str) -> None:
    """A float that is multiplied by zero is a zero with its sign."""
    floats = np.random.default_rng(1).standard_normal(100).astype(dtype)
    assert signed_zeros(floats.itemsize)(floats.tobytes()) == (floats * 0).tobytes()


def test_other_bytes() -> None:
    """The stand-in for computed numbers differs in every byte, and equal bytes stay equal."""
    data = bytes(range(256))
    assert all(a != b for a, b in zip(data, others(data), strict=True))
    assert len(set(others(data))) == 256


@given(data=st.sampled_from([b"\0", b"ab", b"abcd"]), quarters=st.integers(0, 80))
def test_fills_lose_whole_chunks(data: bytes, quarters: int) -> None:
    """A long fill loses only whole chunks, so that its end is at the same place in a chunk."""
    chunk = 2**17
    length = quarters * chunk // 4 + 400
    found = filled(data, length)
    assert found == (data * length)[: len(found)]
    assert (length - len(found)) % chunk == 0
    assert len(found) == length or 7 * chunk <= len(found) <= 8 * chunk
