"""A signal between any two instructions leaves no partial files behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from interrupting import interrupt_everywhere

from mergekit_interleave._files import replace_file
from mergekit_interleave._interrupts import scratch_directory, uninterrupted
from mergekit_interleave.output.staging import staged


class BoomError(Exception):
    """An error that is raised while a model is written."""


def entries(path: Path) -> list[str]:
    """Return the sorted names of the entries of a directory."""
    return sorted(os.listdir(path))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write_new(work: Path) -> None:
    """Write a whole model."""
    (work / "config.json").write_text("new")


def fail(work: Path) -> None:
    """Write half a model, then raise."""
    (work / "config.json").write_text("half")
    raise BoomError


def test_staging_leaves_out_whole_or_not_at_all(tmp_path: Path) -> None:
    """After an interrupt at any point, OUT is whole or absent, and the next run succeeds."""
    place = tmp_path / "place"
    place.mkdir()
    out = place / "deep" / "out"

    def prepare() -> None:
        assert entries(place) in ([], ["deep"])
        if entries(place):
            assert entries(out.parent) == ["out"]
            assert entries(out) == ["config.json"]
            shutil.rmtree(out.parent)

    def action() -> None:
        staged(out, write_new, replace=False)

    assert interrupt_everywhere(prepare, action) > 50
    staged(out, write_new, replace=False)
    assert entries(out) == ["config.json"]


def test_staging_keeps_the_old_model_or_has_the_new_one(tmp_path: Path) -> None:
    """After an interrupt at any point of a replacement, OUT is the old model or the new one."""
    out = tmp_path / "out"
    staged(out, write_new, replace=False)

    def prepare() -> None:
        assert entries(tmp_path) == ["out"]
        assert (out / "config.json").read_text() in ("old", "new")
        (out / "config.json").write_text("old")
        (out / "mergekit_config.yml").write_text("merge_method: passthrough")

    assert interrupt_everywhere(prepare, lambda: staged(out, write_new, replace=True)) > 50


def test_an_interrupt_after_an_error_leaves_nothing(tmp_path: Path) -> None:
    """An interrupt during or before the cleanup after an error does not stop the cleanup."""

    def prepare() -> None:
        assert entries(tmp_path) == []

    def action() -> None:
        with suppress(BoomError):
            staged(tmp_path / "out", fail, replace=False)

    assert interrupt_everywhere(prepare, action) > 50


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    """An interrupted run closes its lock file."""
    before = len(os.listdir("/proc/self/fd"))

    def prepare() -> None:
        assert len(os.listdir("/proc/self/fd")) == before

    def action() -> None:
        with suppress(BoomError):
            staged(tmp_path / "out", fail, replace=False)

    interrupt_everywhere(prepare, action)


def test_replacing_a_file_leaves_it_whole(tmp_path: Path) -> None:
    """After an interrupt at any point, the file has the old content or the new one."""
    file = tmp_path / "card"

    def prepare() -> None:
        if entries(tmp_path):
            assert entries(tmp_path) == ["card"]
            assert file.read_text() in ("old", "new")
        file.write_text("old")

    assert interrupt_everywhere(prepare, lambda: replace_file(file, "new")) > 20


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_no_scratch_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scratch directory is removed, even if an interrupt comes before or after the block."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def prepare() -> None:
        assert entries(tmp_path) == []

    def action() -> None:
        with scratch_directory() as folder:
            (folder / "file").write_text("x")

    assert interrupt_everywhere(prepare, action) > 50


def test_a_step_is_whole_or_never_begins() -> None:
    """If an interrupted step raises, it has either finished or will never start."""
    ran: list[str] = []

    def step() -> None:
        ran.append("begun")
        ran.append("ended")

    def prepare() -> None:
        assert ran in ([], ["begun", "ended"])
        ran.clear()

    interrupt_everywhere(prepare, lambda: uninterrupted(step))


def test_a_step_runs_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, the step runs in the calling thread."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", refuse)
    assert uninterrupted(threading.get_ident) == threading.get_ident()


def test_an_error_of_a_step_is_raised() -> None:
    """An error that a step raises reaches the caller unchanged."""
    with pytest.raises(ZeroDivisionError):
        uninterrupted(lambda: 1 / 0)
