"""Directives and keywords in each form that the Python API accepts."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mergekit_interleave.commands import inputs
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.errors import DirectiveError

TEXT = "model: org/name, interleave: every 4"


def parsed(directive: Any = None, **words: Any) -> Directive:
    """Return the directive that a command makes of its arguments."""
    return inputs.parse(inputs.read(directive), words)  # type: ignore[arg-type]


def test_all_forms_of_a_directive_are_the_same(tmp_path: Path) -> None:
    """Text, mapping, file name, path, open file and parsed directive are equivalent."""
    file = tmp_path / "directive.yml"
    file.write_text("model: org/name\ninterleave: every 4\n")
    expected = parsed(TEXT)
    assert expected.growth is not None
    mapping = {"model": "org/name", "interleave": "every 4"}
    for form in (mapping, str(file), file, io.StringIO(file.read_text()), expected):
        assert parsed(form) == expected
    assert parsed(model="org/name", every=4) == expected


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ({"repeat": [8, 24]}, {"repeat": "8:24"}),
        ({"repeat": (8, 24)}, {"repeat": "8:24"}),
        ({"repeat": {"layers": [8, 24], "times": 3}}, {"repeat": "8:24x3"}),
        ({"stack": [[0, 24], [8, 32]]}, {"stack": "0:24,8:32"}),
        ({"windows": {"size": 16, "stride": 8}}, {"windows": "16:8"}),
        ({"after": [9, 3]}, {"after": "3,9"}),
        ({"after": (3, 9)}, {"after": "3,9"}),
        ({"after": 3}, {"after": "3"}),
        ({"drop": [[2, 3], [5, 7]]}, {"drop": "2:3,5:7"}),
        (
            {"append": 2, "zero": ["o_proj", "down_proj"]},
            {"append": "2", "zero": "o_proj,down_proj"},
        ),
        ({"append": 2, "scale": 0.5}, {"append": "2", "scale": "0.5"}),
        ({"append": 2, "scale": {"q_proj": 0.5}}, {"append": "2", "scale": "q_proj=0.5"}),
        (
            {"add": 3, "layers": 32, "dtype": "float16"},
            {"add": "3", "layers": "32", "dtype": "float16"},
        ),
        ({"append": 1, "model": Path("org/name")}, {"append": "1", "model": "org/name"}),
        (
            {"append": 1, "model": {"model": {"path": "a+b", "revision": "main"}}},
            {"append": "1", "model": {"model": {"path": "a+b", "revision": "main"}}},
        ),
    ],
)
def test_values_mean_the_same_as_text(words: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Lists, tuples, mappings and numbers mean the same as the text on the command line."""
    assert parsed(**words) == parsed(**flags)


def test_keywords_replace_directive_values() -> None:
    """A keyword replaces the directive's value, and None replaces nothing."""
    assert parsed(TEXT, every=2, zero=None) == parsed("model: org/name, interleave: every 2")


def test_a_mapping_may_hold_tuples_and_paths() -> None:
    """A mapping may contain tuples and paths in place of lists and text."""
    found = parsed({"model": Path("org/name"), "repeat": (8, 24)})
    assert found == parsed("model: org/name, repeat: [8, 24]")


@pytest.mark.parametrize(
    ("directive", "words", "names"),
    [
        (None, {"evry": 4}, "evry"),
        (None, {"every": 0}, "every"),
        (None, {"every": 4, "add": 2}, "every"),
        (None, {"every": True}, "every"),
        ({"interleave": "every 4", "zreo": "auto"}, {}, "zreo"),
        (7, {}, "7"),
        ("-", {}, "-"),
        (Path("missing.yml"), {}, "missing.yml"),
    ],
)
def test_mistakes_are_named(directive: Any, words: Any, names: str) -> None:
    """A mistake raises DirectiveError and is named."""
    with pytest.raises(DirectiveError) as raised:
        parsed(directive, **words)
    assert names in str(raised.value)


@pytest.mark.parametrize(
    ("size", "nbytes"), [(None, None), (5, 5), ("5GB", 5 * 10**9), ("4KiB", 4096)]
)
def test_sizes(size: int | str | None, nbytes: int | None) -> None:
    """A size is a number of bytes or a text with a unit."""
    assert inputs.parse_size(size, "max_memory") == nbytes


@pytest.mark.parametrize("size", ["big", 0, -1, "0"])
def test_invalid_sizes(size: int | str) -> None:
    """The error for an invalid size names the argument."""
    with pytest.raises(DirectiveError, match="max_memory"):
        inputs.parse_size(size, "max_memory")


def test_models() -> None:
    """Models are one value or a list of texts, paths and mappings."""
    assert inputs.parse_models(None, "against") == []
    (one,) = inputs.parse_models("org/a@main", "against")
    assert (one.path, one.model.revision) == ("org/a", "main")
    several = inputs.parse_models(["org/a", Path("org/b"), {"model": "org/c"}], "against")
    assert [str(model) for model in several] == ["org/a", "org/b", "org/c"]
