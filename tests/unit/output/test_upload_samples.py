"""Weight files without the middles of long runs."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.output.upload_pieces import BaseFile, Piece, Run, Span, joined, others
from mergekit_interleave.output.upload_samples import AROUND, Sample, is_long, middle, sampled

BASE = BaseFile((Span(Path("base"), 0, 100 * AROUND),))

runs = st.builds(
    Run,
    st.just(BASE),
    st.integers(0, 50).map(lambda n: n * AROUND),
    st.sampled_from([AROUND // 100, 2 * AROUND, 2 * AROUND + 1, 9 * AROUND]),
    st.sampled_from([None, others]),
)
files = st.lists(
    st.lists(runs, max_size=6).map(lambda some: joined([b"header", *some])), min_size=1, max_size=3
)


def nbytes(pieces: list[Piece]) -> int:
    """Return the size of some pieces."""
    return sum(len(piece) if isinstance(piece, bytes) else piece.length for piece in pieces)


def long_runs(pieces: list[Piece]) -> list[Run]:
    """Return the runs of which the middle is left out."""
    return [piece for piece in pieces if isinstance(piece, Run) and is_long(piece)]


def check_known(sample: Sample) -> None:
    """Check that the base around each of its bytes in the result is known, in the same places."""
    known = [run for part in sample.known for run in part]
    for piece in sample.result:
        if isinstance(piece, Run) and piece.change is None:
            assert any(
                run.start <= piece.start - AROUND and piece.stop <= run.stop for run in known
            ) or any(run.start <= piece.start and piece.stop + AROUND <= run.stop for run in known)


@given(files=files)
def test_only_middles_are_left_out(files: list[list[Piece]]) -> None:
    """With few seams, the result lacks the middles of long runs, and nothing else."""
    samples, factor = sampled(files, 100)
    assert factor == 1
    for pieces, sample in zip(files, samples, strict=True):
        left_out = sum(middle(run).length for run in long_runs(pieces))
        assert nbytes(sample.result) == nbytes(pieces) - left_out
        assert not long_runs(sample.result)
        check_known(sample)


@given(files=files, most=st.integers(1, 3))
def test_many_seams(files: list[list[Piece]], most: int) -> None:
    """Of many seams, the first of each file and some others are kept, with the base around them."""
    everything, _ = sampled(files, 100)
    samples, factor = sampled(files, most)
    assert [sample.result[0] for sample in samples] == [b"header"] * len(files)
    for sample, whole in zip(samples, everything, strict=True):
        assert nbytes(sample.result) <= nbytes(whole.result) + 2 * AROUND
        check_known(sample)
    assert factor >= 1
    assert (factor == 1) == (samples == everything)


def test_a_long_run() -> None:
    """Of a long run, the result has both ends, and the base what is around them."""
    run = Run(BASE, 10 * AROUND, 5 * AROUND)
    ((sample,), _) = sampled([[b"header", run]], 100)
    first, last = run._replace(length=AROUND), run._replace(start=14 * AROUND, length=AROUND)
    assert sample.result == [b"header", first, last]
    around = Run(BASE, 9 * AROUND, 2 * AROUND)
    assert sample.known == [[around, around._replace(start=14 * AROUND)]]


def test_the_same_seam_again() -> None:
    """A seam that occurs several times is counted once, because its chunks are sent once."""
    one, two = Run(BASE, 0, 9 * AROUND), Run(BASE, 50 * AROUND, 9 * AROUND)
    pieces: list[Piece] = [b"header", *[one, two] * 20]
    assert sampled([pieces], 3)[1] == 1
    assert sampled([pieces], 2)[1] == 3 / 2
