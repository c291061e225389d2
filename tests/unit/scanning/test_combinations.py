"""Blocks that are combined."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.scanning.combinations import BEAM, CHOICES, Blocks, directive, extended

DEPTH = 9
BLOCKS = st.tuples(st.integers(0, DEPTH), st.integers(0, DEPTH)).filter(lambda own: own[0] < own[1])


@given(st.lists(BLOCKS, max_size=40, unique=True))
def test_a_round(blocks: list[tuple[int, int]]) -> None:
    """Each round adds one block that does not overlap; no combination is listed twice."""
    best: list[Blocks] = [(block,) for block in blocks]
    for count in (2, 3):
        found = extended(best, blocks)
        assert len({*found}) == len(found) <= BEAM * CHOICES
        for own in found:
            assert len(own) == count
            assert {*own} <= {*blocks}
            assert all(one[1] <= other[0] for one, other in pairwise(own))
            assert any({*one} < {*own} for one in best[:BEAM])
        best = found


def test_the_best_come_first() -> None:
    """The best combination gets the best block, then the next ones."""
    blocks = [(4, 6), (5, 7), (1, 2), (7, 9)]
    first, second, third, *_ = extended([(block,) for block in blocks], blocks)
    assert (first, second) == (((1, 2), (4, 6)), ((4, 6), (7, 9)))
    assert third == ((1, 2), (5, 7))


def test_how_many() -> None:
    """Each of the 8 best gets each of the first 16 blocks that do not overlap with it."""
    blocks = [(layer, layer + 1) for layer in range(30)]
    found = extended([(block,) for block in blocks], blocks)
    assert len(found) == 8 * 16 - 8 * 7 // 2  # two of the best come together in both orders
    assert (blocks[7], blocks[16]) in found
    assert (blocks[7], blocks[17]) not in found


@given(st.lists(BLOCKS, min_size=1, max_size=4))
def test_directive(wanted: list[tuple[int, int]]) -> None:
    """The directive of a combination repeats each block once, after its last layer."""
    blocks: Blocks = ()
    for block in wanted:
        blocks = next(iter(extended([blocks], [block])), blocks)
    expected = []
    for layer in range(DEPTH):
        expected.append(layer)
        for start, stop in blocks:
            expected += range(start, stop) if stop == layer + 1 else ()
    assert layers_of(directive(blocks, DEPTH)) == expected


@given(st.lists(BLOCKS, min_size=1, max_size=4))
def test_what_a_combination_shows(wanted: list[tuple[int, int]]) -> None:
    """A combination moves and repeats no layer in a way in which no single block does."""
    blocks: Blocks = ()
    for block in wanted:
        blocks = next(iter(extended([blocks], [block])), blocks)
    single = [((start, stop),) for stop in range(DEPTH + 1) for start in range(stop)]
    assert shown(blocks) <= set().union(*map(shown, single))


def shown(blocks: Blocks) -> set[tuple[int, bool, int]]:
    """Return each layer, whether it comes again, and by how many layers it is moved."""
    layers = layers_of(directive(blocks, DEPTH))
    return {(layer, layer in layers[:index], index - layer) for index, layer in enumerate(layers)}


def layers_of(text: str) -> list[int]:
    """Return the source layers of a stack."""
    name, _, ranges = text.partition(": ")
    assert name == "stack"
    found = []
    for each in ranges.split(", "):
        start, stop = map(int, each.split(":"))
        found += range(start, stop)
    return found
