"""Scores that are kept serve the same model and task under the same settings, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_interleave.errors import OutputError
from mergekit_interleave.evaluation import journal
from mergekit_interleave.evaluation.journal import Journal
from mergekit_interleave.evaluation.scores import MetricScores, TaskScores

FOUND = TaskScores(
    "t", "1", 0, None, ("a", "b"), (0, 1),
    (MetricScores("acc", "none", None, is_log=False, items=(0, 1), values=(0.1, 1 / 3),
                  weights=(1.0, 2.0)),),
)  # fmt: skip


def test_what_is_kept(tmp_path: Path) -> None:
    """What is kept is found by model, task and settings, to the last digit."""
    kept = Journal(tmp_path / "new" / "cache", {"batch_size": 8})
    assert kept.get("model", "task") is None
    kept.keep("model", "task", FOUND)
    assert kept.get("model", "task") == FOUND
    assert kept.get("other", "task") is kept.get("model", "other") is None
    assert Journal(kept.directory, {"batch_size": 1}).get("model", "task") is None


@pytest.mark.parametrize("content", ["", "{}", '{"task": "t"}', "[1]", "\x00", '{"dataset": 1}'])
def test_damaged_files(tmp_path: Path, content: str) -> None:
    """A file that is damaged counts as missing."""
    kept = Journal(tmp_path, {})
    kept.keep("model", "task", FOUND)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert kept.get("model", "task") is None


def test_no_directory(tmp_path: Path) -> None:
    """A cache that cannot be written is one error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as error:
        Journal(tmp_path / "file" / "cache", {}).keep("model", "task", FOUND)
    assert journal.VARIABLE in str(error.value.hint)


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache is where the variable says, or in the user's cache directory."""
    monkeypatch.setenv(journal.VARIABLE, str(tmp_path))
    assert journal.directory() == tmp_path / "evaluations"
    monkeypatch.delenv(journal.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert journal.directory() == tmp_path / "mergekit-interleave" / "evaluations"
