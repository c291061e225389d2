"""Following a hint leads to success, whatever its situation, and every hint has its situation."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import hints
import pytest
from harness import Cli
from hints import Hint

from mergekit_interleave.errors import InterleaveError


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the places in the source that give a hint."""
    places: list[str] = []

    def record(self: InterleaveError, name: str, value: object) -> None:
        if name == "hint" and value:
            frame = sys._getframe(1)
            while frame.f_code.co_name == "__init__" and frame.f_back is not None:
                frame = frame.f_back
            file, line = Path(frame.f_code.co_filename), frame.f_lineno
            inside = [s for s in hints.sites() if s.file == file and s.first <= line <= s.last]
            places.extend(s.name for s in sorted(inside, key=lambda s: s.last - s.first)[:1])
        object.__setattr__(self, name, value)

    monkeypatch.setattr(InterleaveError, "__setattr__", record, raising=False)
    yield places


@pytest.mark.parametrize("hint", hints.HINTS, ids=lambda hint: hint.site)
def test_a_hint_leads_to_success(
    hint: Hint, given: list[str], mk: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The situation gives the hint, and what the hint says succeeds."""
    shutil.copytree(tiny, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    if hint.setup is not None:
        hint.setup(tmp_path)
    given.clear()
    with monkeypatch.context() as patch:
        for name, value in hint.environment.items():
            patch.setenv(name, value)
        if callable(hint.bad):
            with pytest.raises(InterleaveError) as error:
                hint.bad(tmp_path)
            said = str(error.value.hint)
        else:
            result = mk(*shlex.split(hint.bad))
            assert result.status in (1, 2), result.out
            said = result.err.splitlines()[-1]
            assert said.startswith("hint: "), result.err
    assert hint.site in given, (given, said)
    assert hint.said in said
    if hint.fix is not None:
        hint.fix(tmp_path)
    if callable(hint.good):
        hint.good(tmp_path)
    else:
        result = mk(*shlex.split(hint.good))
        assert result.status == 0, result.err


def test_every_hint_has_a_situation() -> None:
    """Every place in the source that gives a hint is in the list, and the list has no other."""
    listed = [hint.site for hint in hints.HINTS] + list(hints.ELSEWHERE)
    assert sorted(set(listed)) == sorted(site.name for site in hints.sites())


@pytest.mark.parametrize("test", hints.ELSEWHERE.values())
def test_the_tests_elsewhere_exist(test: str) -> None:
    """A test that follows a hint elsewhere exists."""
    file, _, name = test.partition("::")
    assert f"def {name}(" in (Path(__file__).parents[2] / file).read_text()
