"""Forecast how many bytes of some weights the Hub receives if its storage holds their base.

The client of the storage, hf_xet, is asked itself: it sends shortened files to a temporary store on
the disk that holds the base around their seams. So chunking, deduplication and compression are
those of a real upload.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from mergekit_interleave._interrupts import scratch_directory
from mergekit_interleave._units import amount
from mergekit_interleave.engines.out_file import OutFile
from mergekit_interleave.errors import OutputError
from mergekit_interleave.output.upload_pieces import Change, Piece, Run, planned
from mergekit_interleave.output.upload_samples import is_long, middle, sampled

_MOST_SEAMS = 96
"""The maximum number of seams that are read, up to 2 MiB at each; more are extrapolated. The new
bytes at a seam vary by about half of their mean, so the sum of 96 seams varies by 5 %."""

_SAMPLES, _SAMPLE = 8, 2**20
"""The number and the size in bytes of the samples of numbers that the base does not have."""


@dataclass(frozen=True)
class Upload:
    """What the Hub receives of some weight files.

    Attributes:
        nbytes: The bytes of the files.
        new: The bytes that are sent: what is new to a storage that holds the base, compressed.
    """

    nbytes: int
    new: int

    def __str__(self) -> str:
        return f"about {amount(self.new)} of {amount(self.nbytes)} ({self.new / self.nbytes:.2%})"


def of_files(files: Sequence[OutFile], *, multiplies: bool) -> Upload | None:
    """Forecast the upload of files that an engine would write.

    Args:
        files: The files.
        multiplies: Whether the engine multiplies by zero.

    Returns:
        The forecast; None if hf_xet is missing or too old.

    Raises:
        OutputError: A file cannot be read, or the temporary store cannot be written.
    """
    headers = [file.header() for file in files]
    nbytes = sum(map(len, headers)) + sum(file.nbytes for file in files)
    pieces = map(partial(planned, multiplies=multiplies), files, headers)
    return forecast(list(pieces), nbytes)


def forecast(files: Sequence[Sequence[Piece]], nbytes: int) -> Upload | None:
    """Forecast the upload of some files.

    Args:
        files: The pieces of each file.
        nbytes: The bytes of the files.

    Returns:
        The forecast; None if hf_xet is missing or too old.

    Raises:
        OutputError: A file cannot be read, or the temporary store cannot be written.
    """
    if not _has_client():
        return None
    try:
        return Upload(nbytes, _sent(files))
    except OSError as error:
        reason = " ".join((error.strerror or str(error)).split())
        raise OutputError(f"the upload cannot be forecast: {reason}") from error


def _sent(files: Sequence[Sequence[Piece]]) -> int:
    samples, factor = sampled(files, _MOST_SEAMS)
    with scratch_directory() as store:
        _send(store, (_data(runs) for sample in samples for runs in sample.known))
        sent = _send(store, (_data(sample.result) for sample in samples))
        middles = sum(_compressed(store, runs) for runs in _changed(files).values())
    return round(sent * factor + middles)


def _has_client() -> bool:
    """Whether hf_xet is installed, in a release that has sessions; earlier ones cannot be asked."""
    try:
        import hf_xet  # noqa: PLC0415 - it starts threads
    except ImportError:
        return False
    return hasattr(hf_xet, "XetSession")


def _changed(files: Iterable[Iterable[Piece]]) -> dict[Change, list[Run]]:
    """Return the middles of runs that the base does not have, each once, by their change."""
    found: dict[Change, list[Run]] = defaultdict(list)
    for piece in dict.fromkeys(chain(*files)):
        if isinstance(piece, Run) and piece.change is not None and is_long(piece):
            found[piece.change].append(middle(piece))
    return found


def _compressed(store: Path, runs: Sequence[Run]) -> float:
    """Return the compressed size of the bytes of some runs, by a sample of them."""
    step = max(len(runs) // _SAMPLES, 1)
    some = [run._replace(length=min(run.length, _SAMPLE)) for run in runs[::step]]
    sent = _send(store, [_data(some)])
    return sum(run.length for run in runs) * sent / sum(run.length for run in some)


def _data(pieces: Iterable[Piece]) -> Iterator[bytes]:
    return (piece.data() if isinstance(piece, Run) else piece for piece in pieces)


def _send(store: Path, files: Iterable[Iterable[bytes]]) -> int:
    """Send files, given in parts, to a store on the disk, and return the bytes that were sent."""
    import hf_xet  # noqa: PLC0415

    commit = hf_xet.XetSession().new_upload_commit(endpoint=f"local://{store}")
    for parts in files:
        with commit.start_upload_stream(sha256=hf_xet.SKIP_SHA256) as stream:
            for part in parts:
                stream.write(part)
    sent: int = commit.wait_to_finish().dedup_metrics.xorb_bytes_uploaded
    return sent
