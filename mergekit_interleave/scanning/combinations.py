"""Combine blocks: repeat several blocks of one model, by beam search over measured layouts.

A round adds one block to each of the best combinations of the round before it. Which ones are best
is measured, not computed from the differences of their blocks.

A combination moves and repeats no layer in a way in which no single block does. So if few blocks
show that layers can be applied one by one, they show it for combinations, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

COMBINED = "combined"
"""The space of combinations."""

BEAM = 8
"""How many of the best combinations get one more block."""

CHOICES = 16
"""How many blocks are added to each of them, one at a time."""

Block: TypeAlias = tuple[int, int]
"""The first layer of a block, and the one after its last."""

Blocks: TypeAlias = tuple[Block, ...]
"""Blocks that do not overlap, in order."""


def extended(best: Sequence[Blocks], blocks: Sequence[Block]) -> list[Blocks]:
    """List combinations that have one block more; each is listed once.

    Args:
        best: Combinations, best first.
        blocks: The blocks that can be added, best first.
    """
    found: dict[Blocks, None] = {}
    for own in best[:BEAM]:
        free = [block for block in blocks if not _overlaps(block, own)]
        found.update((tuple(sorted((*own, block))), None) for block in free[:CHOICES])
    return [*found]


def _overlaps(block: Block, others: Blocks) -> bool:
    return any(block[0] < stop and start < block[1] for start, stop in others)


def directive(blocks: Blocks, depth: int) -> str:
    """Return the directive that repeats each block, as a block.

    Args:
        blocks: The blocks.
        depth: The number of layers of the model.
    """
    starts = [0, *(start for start, _ in blocks)]
    stops = [*(stop for _, stop in blocks), depth]
    ranges = (f"{start}:{stop}" for start, stop in zip(starts, stops, strict=True))
    return f"stack: {', '.join(ranges)}"
