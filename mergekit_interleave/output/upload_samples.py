"""Shorten weight files to their seams, where the Hub's storage finds new bytes.

The storage cuts a file into chunks at places that the bytes themselves determine, and stores each
chunk once. If it holds the base, a result costs bytes only where it departs from a run of the
base: at the seam of two runs, in its header, and in tensors that the base does not have. A few
chunks behind a seam, the chunks are those of the base again. Therefore the middle of a long run can
be left out, in the result and in the base, and the same bytes are new. If there are too many seams,
all between one of them and another are left out, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mergekit_interleave.output.upload_pieces import Piece, Run

AROUND = 2**19
"""The bytes that are kept on each side of a seam: four chunks of the maximum size, eight of the
mean."""


class Seam(NamedTuple):
    """The bytes between two long runs of the base.

    Attributes:
        before: The run before; None at the start of a file.
        pieces: The pieces between the runs, often none.
        after: The run after; None at the end of a file.
    """

    before: Run | None
    pieces: tuple[Piece, ...]
    after: Run | None

    @property
    def key(self) -> object:
        """A value that equals that of another seam with the same bytes around it."""
        before = self.before and (self.before.file, self.before.stop)
        return before, self.pieces, self.after and (self.after.file, self.after.start)


class Sample(NamedTuple):
    """A shortened file.

    Attributes:
        result: Its pieces.
        known: Parts of the base, shortened in the same way: the runs of several files.
    """

    result: list[Piece]
    known: list[list[Run]]


def is_long(run: Run) -> bool:
    """Whether the middle of a run is left out."""
    return run.length > 2 * AROUND


def middle(run: Run) -> Run:
    """Return the part of a long run that is left out."""
    return run._replace(start=run.start + AROUND, length=run.length - 2 * AROUND)


def sampled(files: Sequence[Sequence[Piece]], most: int) -> tuple[list[Sample], float]:
    """Shorten files.

    Args:
        files: The pieces of each file.
        most: The maximum number of seams to keep besides the first of each file.

    Returns:
        The shortened files, and the factor by which the files have more different seams.
    """
    seams = [list(_seams(pieces)) for pieces in files]
    keys = [*dict.fromkeys(seam.key for of_file in seams for seam in of_file[1:])]
    if len(keys) <= most:
        return [_shortened(of_file) for of_file in seams], 1.0
    kept = {keys[number * len(keys) // most] for number in range(most)}
    chosen = [
        [seam for number, seam in enumerate(of_file) if number == 0 or seam.key in kept]
        for of_file in seams
    ]
    return [_shortened(of_file) for of_file in chosen], len(keys) / most


def _seams(pieces: Sequence[Piece]) -> Iterator[Seam]:
    before: Run | None = None
    between: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, Run) and piece.change is None and is_long(piece):
            yield Seam(before, tuple(between), piece)
            before, between = piece, []
        else:
            between.append(piece)
    yield Seam(before, tuple(between), None)


def _shortened(seams: Sequence[Seam]) -> Sample:
    sample = Sample([], [])
    after: Run | None = None
    for seam in seams:
        _add_run(sample, after, seam.before)
        for piece in seam.pieces:
            _add(sample, piece)
        after = seam.after
    _add_run(sample, after, None)
    return sample


def _add_run(sample: Sample, first: Run | None, last: Run | None) -> None:
    """Add the start of a long run, and the end of the same run or of a later one."""
    known = []
    if first is not None:
        sample.result.append(first._replace(length=AROUND))
        known.append(first._replace(start=first.start - AROUND, length=2 * AROUND))
    if last is not None:
        sample.result.append(last._replace(start=last.stop - AROUND, length=AROUND))
        known.append(last._replace(start=last.stop - AROUND, length=2 * AROUND))
    if known:
        sample.known.append(known)


def _add(sample: Sample, piece: Piece) -> None:
    """Add a piece that is no long run of the base."""
    if not isinstance(piece, Run):
        sample.result.append(piece)
    elif piece.change is None:
        sample.result.append(piece)
        wider = piece._replace(start=piece.start - AROUND, length=piece.length + 2 * AROUND)
        sample.known.append([wider])
    elif is_long(piece):
        sample.result.append(piece._replace(length=AROUND))
        sample.result.append(piece._replace(start=piece.stop - AROUND, length=AROUND))
    else:
        sample.result.append(piece)
