"""Group sequences of similar lengths into batches, padded at their ends.

A padded position comes after all scored ones, so it changes none of them in a model that reads from
left to right. No attention mask is needed, and each type of model builds its own masks. For a model
that reads otherwise, or counts the positions, `by_length` divides a batch so that none is padded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mergekit_interleave.scanning.sequences import ScoredTokens


@dataclass(frozen=True)
class Batch:
    """Some sequences.

    Attributes:
        numbers: Their numbers among all sequences.
        sequences: The sequences.
    """

    numbers: tuple[int, ...]
    sequences: tuple[ScoredTokens, ...]

    @property
    def width(self) -> int:
        """The length of the longest sequence."""
        return max(len(each.tokens) for each in self.sequences)

    def rows(self) -> list[list[int]]:
        """Return the tokens of each sequence, padded with its last token."""
        return [
            [*each.tokens, *[each.tokens[-1]] * (self.width - len(each.tokens))]
            for each in self.sequences
        ]


def batches(sequences: Sequence[ScoredTokens], most_tokens: int) -> list[Batch]:
    """Group sequences into batches of at most `most_tokens` tokens with padding, longest first.

    A longer sequence has a batch of its own.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i].tokens), i))
    found, waiting = [], order
    while waiting:
        width = len(sequences[waiting[0]].tokens)
        rows = max(1, most_tokens // width)
        numbers, waiting = waiting[:rows], waiting[rows:]
        found.append(Batch(tuple(numbers), tuple(sequences[i] for i in numbers)))
    return found


def by_length(batch: Batch) -> Iterator[tuple[list[int], Batch]]:
    """Divide a batch into batches without padding; yield the places of their sequences, too."""
    places: defaultdict[int, list[int]] = defaultdict(list)
    for place, each in enumerate(batch.sequences):
        places[len(each.tokens)].append(place)
    for own in places.values():
        numbers = tuple(batch.numbers[place] for place in own)
        yield own, Batch(numbers, tuple(batch.sequences[place] for place in own))
