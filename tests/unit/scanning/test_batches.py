"""Batches of sequences."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.scanning.batches import batches, by_length
from mergekit_interleave.scanning.sequences import ScoredTokens


@given(st.lists(st.integers(2, 50), max_size=30), st.integers(1, 120))
def test_batches(lengths: list[int], most: int) -> None:
    """Each sequence is in one batch, unchanged, and a batch of several is not too large."""
    sequences = [ScoredTokens(tuple(range(n)), 1, "text") for n in lengths]
    found = batches(sequences, most)
    assert sorted(n for batch in found for n in batch.numbers) == [*range(len(sequences))]
    for batch in found:
        assert batch.sequences == tuple(sequences[n] for n in batch.numbers)
        assert len(batch.numbers) == 1 or len(batch.numbers) * batch.width <= most
        for row, each in zip(batch.rows(), batch.sequences, strict=True):
            assert (len(row), tuple(row[: len(each.tokens)])) == (batch.width, each.tokens)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=12))
def test_by_length(lengths: list[int]) -> None:
    """A batch is divided into batches without padding, with the places of their sequences."""
    sequences = [ScoredTokens(tuple(range(n)), 1, "text") for n in lengths]
    (batch,) = batches(sequences, 1000)
    found = [*by_length(batch)]
    assert sorted(place for places, _ in found for place in places) == [*range(len(lengths))]
    for places, part in found:
        assert {len(each.tokens) for each in part.sequences} == {part.width}
        assert part.sequences == tuple(batch.sequences[place] for place in places)
        assert part.numbers == tuple(batch.numbers[place] for place in places)
