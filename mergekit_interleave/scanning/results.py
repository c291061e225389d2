"""Keep what a scan measures in a directory, so that it can be stopped at any time and resumed.

`scan.json` says what is measured, `scan.jsonl` has one line per layout, and `scores.npy` one row
per layout with the score of each sequence. A score that was not measured yet is NaN there.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mergekit_interleave._files import replace_file
from mergekit_interleave.checkpoint.safetensors_header import read_json, to_json
from mergekit_interleave.errors import CheckpointError, DirectiveError, OutputError
from mergekit_interleave.scanning.combinations import COMBINED
from mergekit_interleave.scanning.spaces import Candidate

RECORD, LINES, SCORES = "scan.json", "scan.jsonl", "scores.npy"

VERSION = 1

NOTED = frozenset({"top", "warnings"})
"""The keys of `scan.json` that say what was reported last, and not what is measured."""

_MOST = 2**28
"""The maximum bytes of `scan.json`."""

Floats = npt.NDArray[np.float64]


@dataclass
class Results:
    """The scores of a scan.

    Attributes:
        directory: The directory; None if nothing is kept.
        candidates: The layouts.
        tokens: The number of scored tokens of each sequence.
        scores: The score of each sequence: those of the base in the first row, then one row per
            layout, of shape (1 + layouts, sequences). NaN is a score that was not measured.
    """

    directory: Path | None
    candidates: Sequence[Candidate]
    tokens: Sequence[int]
    scores: Floats
    _written: int = 0

    @property
    def differences(self) -> Floats:
        """Score minus base score, of shape (layouts, sequences)."""
        with np.errstate(invalid="ignore"):  # of a broken base
            return np.asarray(self.scores[1:] - self.scores[:1])

    def is_measured(self, rows: Collection[int], sequences: Collection[int]) -> bool:
        """Whether some rows have the scores of some sequences."""
        found = self.scores[np.ix_([*rows], [*sequences])]
        return not np.isnan(found).any()

    @property
    def finished(self) -> int:
        """The number of layouts whose scores are measured, as parts of a layout count together."""
        return int((~np.isnan(self.scores[1:])).sum()) // len(self.tokens)

    def note(self, rows: Sequence[int], sequences: Sequence[int], found: Floats) -> None:
        """Keep scores; those that are not a number are kept as minus infinity.

        If their lines cannot be written, the scores are kept all the same.

        Args:
            rows: The rows.
            sequences: The numbers of the sequences.
            found: The scores, of shape (rows, sequences).

        Raises:
            OutputError: Lines cannot be written.
        """
        self.scores[np.ix_([*rows], [*sequences])] = np.where(np.isnan(found), -np.inf, found)
        self.write_lines()

    def write_lines(self) -> None:
        """Write the lines of the layouts that are measured, in order.

        Raises:
            OutputError: They cannot be written, for example because the disk is full.
        """
        if self.directory is None or np.isnan(self.scores[0]).any():
            return
        lines = []
        while self._written < len(self.candidates):
            row = self.scores[1 + self._written]
            if np.isnan(row).any():
                break
            lines.append(self._line(self.candidates[self._written], row))
            self._written += 1
        if lines:
            file = self.directory / LINES
            with _write_errors(file), file.open("a", encoding="utf-8") as opened:
                opened.write("".join(lines))

    def extend(self, added: Sequence[Candidate]) -> None:
        """Add layouts that are not measured yet.

        Raises:
            OutputError: They cannot be written.
        """
        shape = len(self.scores) + len(added), len(self.tokens)
        candidates = (*self.candidates, *added)
        if self.directory is None:
            missing = np.full((len(added), shape[1]), np.nan)
            self.scores = np.concatenate((self.scores, missing))
        else:
            with _write_errors(self.directory):
                _write_rows(self.directory / SCORES, len(self.scores), shape)
                record = read_json(self.directory / RECORD, most=_MOST)
                record["layouts"] = _layouts(candidates)
                replace_file(self.directory / RECORD, to_json(record))
                self.scores = _mapped(self.directory, shape)
        self.candidates = candidates

    def note_report(self, top: int, warnings: Sequence[str]) -> tuple[str, ...]:
        """Keep what a report needs; return these and earlier warnings.

        Args:
            top: The largest number of findings.
            warnings: Warnings of this call.

        Raises:
            OutputError: It cannot be written.
        """
        if self.directory is None:
            return tuple(dict.fromkeys(warnings))
        before = read_json(self.directory / RECORD, most=_MOST)
        every = [*dict.fromkeys((*before.get("warnings", ()), *warnings))]
        after = {**before, "top": top, "warnings": every}
        if after != before:
            replace_file(self.directory / RECORD, to_json(after))
        return tuple(every)

    def _line(self, candidate: Candidate, row: Floats) -> str:
        content: dict[str, Any] = {
            "directive": candidate.directive,
            "space": candidate.space,
            **({} if candidate.cell is None else {"cell": list(candidate.cell)}),
            "log_likelihood": _sum(row),
            "base_log_likelihood": _sum(self.scores[0]),
            "tokens": sum(self.tokens),
            "items": len(self.tokens),
        }
        return json.dumps(content, ensure_ascii=False) + "\n"


def _sum(scores: Floats) -> float | None:
    """Return the sum of scores, which does not depend on their order; None if it is not finite."""
    return math.fsum(scores) if np.isfinite(scores).all() else None


def in_memory(candidates: Sequence[Candidate], tokens: Sequence[int]) -> Results:
    """Return results that are not kept."""
    scores = np.full((1 + len(candidates), len(tokens)), np.nan)
    return Results(None, candidates, tokens, scores)


@contextmanager
def opened(
    directory: Path,
    record: Mapping[str, Any],
    candidates: Sequence[Candidate],
    tokens: Sequence[int],
) -> Iterator[Results]:
    """Create a directory for results, or resume the scan that it holds.

    Within the block, no other process can open it.

    Args:
        directory: The directory.
        record: What is measured, as JSON values.
        candidates: The layouts.
        tokens: The number of scored tokens of each sequence.

    Raises:
        DirectiveError: The directory holds another scan, or something else.
        OutputError: It cannot be written, or there is no room for the scores.
    """
    content = {
        "version": VERSION,
        **record,
        "layouts": _layouts(candidates),
        "tokens": [*tokens],
    }
    content = json.loads(json.dumps(content))
    with _write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        with _write_errors(directory):
            kept = _resumed(directory, content, len(tokens))
        yield kept


def _resumed(directory: Path, content: Mapping[str, Any], sequences: int) -> Results:
    """Return the results of a directory, which is that of a new scan if it is empty."""
    for each in directory.glob(f".{RECORD}.*"):  # of a scan that was killed
        each.unlink()
    if (directory / RECORD).is_file():
        content = _same(directory, content)
    elif any(directory.iterdir()):
        raise DirectiveError(f"{directory}: contains files, but no scan", hint="name another --out")
    else:
        replace_file(directory / RECORD, to_json(content))
    candidates = _candidates(content)
    shape = (1 + len(candidates), sequences)
    if not (directory / SCORES).exists():
        _create(directory, shape)
    scores, lines = _mapped(directory, shape), _whole_lines(directory / LINES)
    kept = Results(directory, candidates, content["tokens"], scores, lines)
    kept.write_lines()  # of scores that were kept just before the scan was killed
    return kept


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock a directory, if the system can.

    Raises:
        OutputError: Another process has locked it.
    """
    try:
        import fcntl  # noqa: PLC0415 - Windows has none
    except ImportError:
        yield
        return
    with _write_errors(directory):
        descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{directory}: another scan writes its results here", hint="wait for it"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _write_errors(place: Path) -> Iterator[None]:
    """Raise an error of the system as an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{place}: {error.strerror or error}") from error


def _layouts(candidates: Sequence[Candidate]) -> list[Any]:
    return [[each.directive, each.space, each.cell] for each in candidates]


def _candidates(record: Mapping[str, Any]) -> tuple[Candidate, ...]:
    return tuple(
        Candidate(str(text), str(space), None if cell is None else (int(cell[0]), int(cell[1])))
        for text, space, cell in record["layouts"]
    )


def _mapped(directory: Path, shape: tuple[int, int], mode: Literal["r", "r+"] = "r+") -> Floats:
    """Map the scores. A scan that was killed may have added rows that no layout in the record has.

    Raises:
        CheckpointError: They are not those of the record.
    """
    file = directory / SCORES
    try:
        scores = np.lib.format.open_memmap(file, mode="r")  # the mode r+ extends a short file
    except ValueError as error:
        raise CheckpointError(f"{file}: damaged ({error})") from error
    if mode != "r":
        scores = np.lib.format.open_memmap(file, mode=mode)
    if scores.ndim != len(shape) or len(scores) < shape[0] or scores.shape[1] != shape[1]:
        raise CheckpointError(f"{file}: has the shape {scores.shape}, not {shape}")
    found: Floats = scores[: shape[0]]
    return found


def _create(directory: Path, shape: tuple[int, int]) -> None:
    """Write scores that are not measured; their file appears when it is whole."""
    (directory / LINES).write_bytes(b"")
    begun = directory / f".{SCORES}"
    begun.write_bytes(b"")
    _write_rows(begun, 0, shape)
    begun.replace(directory / SCORES)


def _write_rows(file: Path, first: int, shape: tuple[int, int]) -> None:
    """Write rows that are not measured, from the first of them, and then how many there are now.

    NumPy leaves room in the header for more rows, so its length does not change.
    """
    header = io.BytesIO()
    description = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    with file.open("r+b") as opened:
        opened.seek(len(header.getvalue()) + 8 * first * shape[1])
        for _ in range(first, shape[0]):
            opened.write(np.full(shape[1], np.nan).tobytes())
        opened.flush()
        os.fsync(opened.fileno())
        opened.seek(0)
        opened.write(header.getvalue())


def _whole_lines(file: Path) -> int:
    """Remove a line that was not written to its end, and return the number of lines."""
    content = file.read_bytes() if file.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    return whole.count(b"\n")


def _same(directory: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a directory, which may list combinations after the layouts.

    Raises:
        DirectiveError: It is the record of another scan.
    """
    before = read_json(directory / RECORD, most=_MOST)
    changed = [
        key
        for key in {**before, **content}
        if key not in NOTED and before.get(key) != content.get(key)
    ]
    if changed == ["layouts"]:
        count = len(content["layouts"])
        first, others = before["layouts"][:count], before["layouts"][count:]
        if first == content["layouts"] and all(each[1] == COMBINED for each in others):
            return before
    if changed:
        raise DirectiveError(
            f"{directory}: holds a scan with {_words(changed[0])}",
            hint="name another --out, or give the same command as before to resume it",
        )
    return before


def _words(key: str) -> str:
    return {
        "version": "another version of its files",
        "models": "another model",
        "layouts": "other layouts",
        "tokens": "another text or other items",
        "sequences": "another text or other items",
    }.get(key, f"another {key}")


def read(directory: Path) -> tuple[Mapping[str, Any], Results]:
    """Read the results of a scan; return its record, too.

    Raises:
        CheckpointError: The directory holds no scan, or a malformed one.
    """
    record = read_json(directory / RECORD, most=_MOST)
    try:
        candidates = _candidates(record)
        tokens = [int(number) for number in record["tokens"]]
        scores = _mapped(directory, (1 + len(candidates), len(tokens)), "r")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{directory}: holds no scan, or a damaged one") from error
    return record, Results(directory, candidates, tokens, scores)
