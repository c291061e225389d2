"""Following a hint leads to success, whatever its situation, and every hint has its situation."""

from __future__ import annotations

import inspect
import shlex
import shutil
from pathlib import Path
from types import FrameType, SimpleNamespace

import gguf_hints
import hints
import pytest
from harness import Cli, book
from hints import Hint

from mergekit_interleave.errors import InterleaveError

HINTS = (*hints.HINTS, *gguf_hints.HINTS)
ELSEWHERE = {**hints.ELSEWHERE, **gguf_hints.ELSEWHERE}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the places in the source that give a hint."""
    places: list[str] = []

    def record(self: InterleaveError, name: str, value: object) -> None:
        frame = inspect.currentframe()
        if name == "hint" and value and frame is not None:
            frame = frame.f_back
            while frame is not None and frame.f_code.co_name == "__init__":
                frame = frame.f_back
            places.extend(_site(frame))
        object.__setattr__(self, name, value)

    monkeypatch.setattr(InterleaveError, "__setattr__", record, raising=False)
    return places


def _site(frame: FrameType | None) -> list[str]:
    """Return the name of the site that a frame is at."""
    if frame is None:
        return []
    file, line = Path(frame.f_code.co_filename), frame.f_lineno
    around = [s for s in hints.sites() if s.file == file and s.first <= line <= s.last]
    return [site.name for site in sorted(around, key=lambda site: site.last - site.first)[:1]]


@pytest.fixture
def place(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a directory that has a copy of the tiny model, and a text of its words."""
    shutil.copytree(tiny, tmp_path / "tiny")
    (tmp_path / "book.txt").write_text(book(1400), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


@pytest.mark.parametrize("hint", HINTS, ids=lambda hint: hint.site)
def test_a_hint_leads_to_success(
    hint: Hint, given: list[str], mk: Cli, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The situation gives the hint, and what the hint says succeeds."""
    if hint.setup is not None:
        hint.setup(place)
    given.clear()
    if hint.free is not None:
        used = SimpleNamespace(free=hint.free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: used)
    with monkeypatch.context() as patch:
        for name, value in hint.environment.items():
            patch.setenv(name, value)
        if callable(hint.bad):
            with pytest.raises(InterleaveError) as error:
                hint.bad(place)
            said = str(error.value.hint)
        else:
            result = mk(*shlex.split(hint.bad))
            assert result.status in (1, 2), result.out
            said = result.err.splitlines()[-1]
            assert said.startswith("hint: "), result.err
    assert hint.site in given, (given, said)
    assert hint.said in said
    if hint.fix is not None:
        hint.fix(place)
    if callable(hint.good):
        hint.good(place)
    else:
        result = mk(*shlex.split(hint.good))
        assert result.status == 0, result.err


@pytest.mark.parametrize(("bad", "said", "good"), hints.OF_THE_COMMAND_LINE)
def test_a_hint_about_the_command_line(
    bad: str, said: str, good: str, mk: Cli, place: Path
) -> None:
    """The hint for a wrong option or argument leads to a command that works."""
    result = mk(*shlex.split(bad), cwd=place)
    assert result.status == 2
    assert result.err.splitlines()[-1].startswith(f"hint: {said}")
    assert mk(*shlex.split(good), cwd=place).status == 0


def test_every_hint_has_a_situation() -> None:
    """Every place in the source that gives a hint is in the list, and the list has no other."""
    listed = [hint.site for hint in HINTS] + list(ELSEWHERE)
    assert sorted(set(listed)) == sorted(site.name for site in hints.sites())


@pytest.mark.parametrize("test", ELSEWHERE.values())
def test_the_tests_elsewhere_exist(test: str) -> None:
    """A test that follows a hint elsewhere exists."""
    file, _, name = test.partition("::")
    assert f"def {name}(" in (Path(__file__).parents[2] / file).read_text()
