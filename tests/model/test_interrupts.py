"""A signal between any two instructions leaves nothing behind."""

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
    """Something goes wrong in the middle."""


def entries(path: Path) -> list[str]:
    """What a directory holds."""
    return sorted(os.listdir(path))


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write_new(work: Path) -> None:
    """Write a whole model."""
    (work / "config.json").write_text("new")


def fail(work: Path) -> None:
    """Write half a model."""
    (work / "config.json").write_text("half")
    raise BoomError


def test_staging_leaves_out_whole_or_not_at_all(tmp_path: Path) -> None:
    """Wherever a run is interrupted, no other file stays, and the next run succeeds."""
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
    """Wherever a run that replaces a model is interrupted, one of both is there."""
    out = tmp_path / "out"
    staged(out, write_new, replace=False)

    def prepare() -> None:
        assert entries(tmp_path) == ["out"]
        assert (out / "config.json").read_text() in ("old", "new")
        (out / "config.json").write_text("old")

    assert interrupt_everywhere(prepare, lambda: staged(out, write_new, replace=True)) > 50


def test_an_interrupt_after_an_error_leaves_nothing(tmp_path: Path) -> None:
    """Cleaning up is not cut short, nor is the moment before it."""

    def prepare() -> None:
        assert entries(tmp_path) == []

    def action() -> None:
        with suppress(BoomError):
            staged(tmp_path / "out", fail, replace=False)

    assert interrupt_everywhere(prepare, action) > 50


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    """An interrupted run unlocks what it has locked."""
    before = len(os.listdir("/proc/self/fd"))

    def prepare() -> None:
        assert len(os.listdir("/proc/self/fd")) == before

    def action() -> None:
        with suppress(BoomError):
            staged(tmp_path / "out", fail, replace=False)

    interrupt_everywhere(prepare, action)


def test_replacing_a_file_leaves_it_whole(tmp_path: Path) -> None:
    """Wherever it is interrupted: the old content or the new one, and no other file."""
    file = tmp_path / "card"

    def prepare() -> None:
        if entries(tmp_path):
            assert entries(tmp_path) == ["card"]
            assert file.read_text() in ("old", "new")
        file.write_text("old")

    assert interrupt_everywhere(prepare, lambda: replace_file(file, "new")) > 20


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_no_scratch_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the block is interrupted: before, within and after it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def prepare() -> None:
        assert entries(tmp_path) == []

    def action() -> None:
        with scratch_directory() as folder:
            (folder / "file").write_text("x")

    assert interrupt_everywhere(prepare, action) > 50


def test_a_step_is_whole_or_never_begins() -> None:
    """When an interrupted step raises, it has ended, or will never run."""
    ran: list[str] = []

    def step() -> None:
        ran.append("begun")
        ran.append("ended")

    def prepare() -> None:
        assert ran in ([], ["begun", "ended"])
        ran.clear()

    interrupt_everywhere(prepare, lambda: uninterrupted(step))


def test_a_step_runs_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it runs in the thread that asks for it."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", refuse)
    assert uninterrupted(threading.get_ident) == threading.get_ident()


def test_an_error_of_a_step_is_raised() -> None:
    """As it was raised there."""
    with pytest.raises(ZeroDivisionError):
        uninterrupted(lambda: 1 / 0)
