"""The directory of a scan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mergekit_interleave.errors import CheckpointError, DirectiveError, OutputError
from mergekit_interleave.scanning import results
from mergekit_interleave.scanning.results import LINES, RECORD, SCORES, Results
from mergekit_interleave.scanning.spaces import Candidate

CANDIDATES = (Candidate("drop: 0:1", "drops", (0, 1)), Candidate("drop: 1:2", "file"))
MORE = (Candidate("stack: 0:2, 1:3", "combined"), Candidate("stack: 0:3, 0:3", "combined"))
TOKENS = (3, 4, 5)
FOUND = np.array([[-1.0, -2.0, -3.0], [-1.5, -2.5, -3.5], [-1.0, np.nan, -3.0]])


def opened(place: Path, **record: object) -> Results:
    """Return the results in a directory, which is closed again."""
    with results.opened(place, {"model": "one", **record}, CANDIDATES, TOKENS) as kept:
        return kept


def test_lines(tmp_path: Path) -> None:
    """A layout has its line as soon as it is measured, in order, with sums over all sequences."""
    kept = opened(tmp_path / "out")
    kept.note([1], [0, 1, 2], FOUND[1:2])
    assert (tmp_path / "out" / LINES).read_text() == ""
    kept.note([0], [0, 1, 2], FOUND[:1])
    (line,) = (tmp_path / "out" / LINES).read_text().splitlines()
    assert json.loads(line) == {
        "directive": "drop: 0:1", "space": "drops", "cell": [0, 1], "log_likelihood": -7.5,
        "base_log_likelihood": -6.0, "tokens": 12, "items": 3,
    }  # fmt: skip
    kept.note([2], [2], FOUND[2:, 2:])
    assert len((tmp_path / "out" / LINES).read_text().splitlines()) == 1
    kept.note([2], [0, 1], FOUND[2:, :2])
    lines = (tmp_path / "out" / LINES).read_text().splitlines()
    assert json.loads(lines[1])["log_likelihood"] is None  # not a number


def test_resumed(tmp_path: Path) -> None:
    """What was measured is known after a stop, even if it came in the middle of a line."""
    whole, stopped = opened(tmp_path / "whole"), opened(tmp_path / "stopped")
    for kept in (whole, stopped):
        kept.note([0, 1], [0, 1, 2], FOUND[:2])
    whole.note([2], [0, 1, 2], FOUND[2:])
    with (tmp_path / "stopped" / LINES).open("a") as file:
        file.write('{"directive": "dr')
    again = opened(tmp_path / "stopped")
    assert again.is_measured([0, 1], [0, 1, 2])
    assert not again.is_measured([1, 2], [0])
    again.note([2], [0, 1, 2], FOUND[2:])
    for name in (RECORD, LINES, SCORES):
        one, other = (tmp_path / place / name for place in ("whole", "stopped"))
        assert one.read_bytes() == other.read_bytes(), name


def test_another_scan(tmp_path: Path) -> None:
    """A directory with the scan of another model, or with other files, is refused."""
    opened(tmp_path / "out")
    with pytest.raises(DirectiveError, match="model"):
        opened(tmp_path / "out", model="two")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(DirectiveError, match="other"):
        opened(tmp_path / "other")


def test_read(tmp_path: Path) -> None:
    """A scan is read without what made it."""
    kept = opened(tmp_path / "out", seed=3)
    kept.note([0, 1, 2], [0, 1, 2], FOUND)
    record, found = results.read(tmp_path / "out")
    assert record["seed"] == 3
    assert tuple(found.candidates) == CANDIDATES
    assert np.array_equal(found.differences, kept.differences)


@pytest.mark.parametrize("broken", [RECORD, SCORES])
def test_a_broken_directory(broken: str, tmp_path: Path) -> None:
    """A missing or malformed file is an error that names the directory."""
    opened(tmp_path / "out")
    (tmp_path / "out" / broken).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="out"):
        results.read(tmp_path / "out")


def test_extended(tmp_path: Path) -> None:
    """More layouts keep what was measured, and a scan that has them is resumed with them."""
    kept = opened(tmp_path / "out")
    kept.note([0, 1, 2], [0, 1, 2], FOUND)
    kept.extend(MORE)
    assert (tuple(kept.candidates), kept.finished) == ((*CANDIDATES, *MORE), 2)
    kept.note([4], [0, 1, 2], FOUND[1:2])
    again = opened(tmp_path / "out")
    assert tuple(again.candidates) == (*CANDIDATES, *MORE)
    assert again.is_measured([0, 1, 2, 4], [0, 1, 2])
    assert not again.is_measured([3], [0])
    assert len((tmp_path / "out" / LINES).read_text().splitlines()) == 2
    again.note([3], [0, 1, 2], FOUND[:1])
    assert len((tmp_path / "out" / LINES).read_text().splitlines()) == 4
    memory = results.in_memory(CANDIDATES, TOKENS)
    memory.extend(MORE)
    assert memory.scores.shape == again.scores.shape


def test_killed_while_extended(tmp_path: Path) -> None:
    """Rows that no layout of the record has, or that came without a new header, do no harm."""
    whole, stopped = opened(tmp_path / "whole"), opened(tmp_path / "stopped")
    for kept in (whole, stopped):
        kept.note([0, 1, 2], [0, 1, 2], FOUND)
    before = (tmp_path / "stopped" / SCORES).read_bytes()
    whole.extend(MORE)
    for content in ((tmp_path / "whole" / SCORES).read_bytes(), before + bytes(40)):
        (tmp_path / "stopped" / SCORES).write_bytes(content)
        again = opened(tmp_path / "stopped")
        assert tuple(again.candidates) == CANDIDATES
        assert again.finished == 2
    again.extend(MORE)
    for name in (RECORD, LINES, SCORES):
        one, other = (tmp_path / place / name for place in ("whole", "stopped"))
        assert one.read_bytes() == other.read_bytes(), name


def test_extended_by_others(tmp_path: Path) -> None:
    """Only combinations may follow the layouts; others make it another scan."""
    opened(tmp_path / "out").extend([Candidate("drop: 2:3", "drops", (2, 3))])
    with pytest.raises(DirectiveError, match="layouts"):
        opened(tmp_path / "out")


def test_a_short_file(tmp_path: Path) -> None:
    """A file of scores that was cut short is damaged, and not filled up with zeros."""
    opened(tmp_path / "out").note([0, 1, 2], [0, 1, 2], FOUND)
    content = (tmp_path / "out" / SCORES).read_bytes()
    (tmp_path / "out" / SCORES).write_bytes(content[:-20])
    with pytest.raises(CheckpointError, match=SCORES):
        opened(tmp_path / "out")
    assert (tmp_path / "out" / SCORES).read_bytes() == content[:-20]


def test_no_lines(tmp_path: Path) -> None:
    """Lines that were deleted are written again from the scores."""
    opened(tmp_path / "out").note([0, 1, 2], [0, 1, 2], FOUND)
    lines = (tmp_path / "out" / LINES).read_bytes()
    (tmp_path / "out" / LINES).unlink()
    opened(tmp_path / "out")
    assert (tmp_path / "out" / LINES).read_bytes() == lines


def test_damaged_scores(tmp_path: Path) -> None:
    """A file of scores that is not one is an error of the directory."""
    opened(tmp_path / "out")
    (tmp_path / "out" / SCORES).write_bytes(b"no numbers")
    with pytest.raises(CheckpointError, match=SCORES):
        opened(tmp_path / "out")
    with pytest.raises(CheckpointError, match=SCORES):
        results.read(tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device of Linux that is full")
def test_a_full_disk(tmp_path: Path) -> None:
    """If a line cannot be written, that is one error, and the scores are kept."""
    kept, lines = opened(tmp_path / "out"), tmp_path / "out" / LINES
    kept.note([0], [0, 1, 2], FOUND[:1])
    lines.unlink()
    lines.symlink_to("/dev/full")
    with pytest.raises(OutputError, match="space"):
        kept.note([1], [0, 1, 2], FOUND[1:2])
    lines.unlink()
    lines.touch()
    assert opened(tmp_path / "out").is_measured([0, 1], [0, 1, 2])
    assert len(lines.read_text().splitlines()) == 1


def test_no_room_for_the_scores(tmp_path: Path) -> None:
    """Without room for all scores, nothing is measured, and the same call is tried again."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(OutputError, match="out"):
            opened(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out" / SCORES).exists()
    assert opened(tmp_path / "out").finished == 0


def test_files_that_are_no_scan(tmp_path: Path) -> None:
    """A file with a name of ours is not deleted where there is no record of a scan."""
    (tmp_path / SCORES).write_bytes(b"mine")
    with pytest.raises(DirectiveError, match="no scan"):
        opened(tmp_path)
    assert (tmp_path / SCORES).read_bytes() == b"mine"


def test_two_at_the_same_time(tmp_path: Path) -> None:
    """Another scan into the same directory is refused until the first one is closed."""
    pytest.importorskip("fcntl")
    with (
        results.opened(tmp_path / "out", {"model": "one"}, CANDIDATES, TOKENS),
        pytest.raises(OutputError, match="another scan"),
    ):
        opened(tmp_path / "out")
    opened(tmp_path / "out")


def test_what_was_reported(tmp_path: Path) -> None:
    """Warnings are kept and collected; they and the number of findings are not what is measured."""
    kept = opened(tmp_path / "out")
    assert kept.note_report(5, ["slow"]) == ("slow",)
    again = opened(tmp_path / "out")
    assert again.note_report(3, ["broken", "slow"]) == ("slow", "broken")
    assert results.read(tmp_path / "out")[0]["top"] == 3
