"""YAML is read and written."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.directive import yaml_io
from mergekit_interleave.errors import DirectiveError


def test_a_range_with_a_colon_is_text() -> None:
    """PyYAML alone reads 504; if this fails, `resolve` can go."""
    assert yaml_io.read("repeat: 8:24", "x") == {"repeat": "8:24"}
    assert yaml.safe_load("repeat: 8:24") == {"repeat": 504}


def test_a_block_document_with_commas_is_no_one_line_form() -> None:
    """A valid mapping is not read as the one-line form."""
    assert yaml_io.read("model: a, b", "x") == {"model": "a, b"}


@pytest.mark.parametrize(
    ("text", "document"),
    [
        ("a: after [3, 9], b: 1", {"a": "after [3, 9]", "b": 1}),
        ("b: 1, a: after [9]  # as published", {"a": "after [9]", "b": 1}),
        ("b: 'x: y [1], z', a: after [9]", {"a": "after [9]", "b": "x: y [1], z"}),
        ('b: "it\'s: y [1]", a: after [9]', {"a": "after [9]", "b": "it's: y [1]"}),
        ("a: after [], b: [1]", {"a": "after []", "b": [1]}),
    ],
)
def test_a_word_and_a_list_in_one_line(text: str, document: object) -> None:
    """A value may be a word and a list in the one-line form, and quoted text stays unchanged."""
    assert yaml_io.read(text, "x") == document


def test_a_word_and_a_list_are_written_without_quotes() -> None:
    """At the top of a document such a value has no quotes; deeper it has those that YAML needs."""
    document = {"a": "after [3, 9]", "b": {"c": "after [3]"}, "after [1]": ["after [2]"]}
    inline = yaml_io.write_inline(document)
    assert inline.startswith("a: after [3, 9], b: {c: 'after [3]'}, ")
    assert yaml_io.read(inline, "x") == document
    lines = yaml_io.write_lines(document)
    assert lines.startswith("a: after [3, 9]\nb: {c: 'after [3]'}\n")
    assert yaml.safe_load(lines) == document


def test_a_key_given_twice_is_an_error() -> None:
    """A duplicate key, which PyYAML alone would accept, is refused."""
    with pytest.raises(DirectiveError, match=r"line 2, column 1: .*`a`"):
        yaml_io.read("a: 1\na: 2", "x")


def test_shared_lists_are_written_out() -> None:
    """YAML is written without anchors, and lists of numbers are on one line."""
    shared = [0, 4]
    assert yaml_io.write({"a": shared, "b": shared}) == "a: [0, 4]\nb: [0, 4]\n"


_TEN = (", ".join([f"*a{i}"] * 10) for i in range(11))
BOMB = "[&a0 [x], " + ", ".join(f"&a{i} [{ten}]" for i, ten in enumerate(_TEN, start=1)) + "]"


class TestAliases:
    """Aliases are read and counted as the values that they represent."""

    def test_a_few(self) -> None:
        """A few aliases are allowed."""
        assert yaml_io.read("a: &x [1, 2]\nb: *x\n", "here") == {"a": [1, 2], "b": [1, 2]}

    @pytest.mark.parametrize("text", [f"interleave: {BOMB}", "a: &a [*a]", "&a {b: *a}"])
    def test_bombs(self, text: str) -> None:
        """A few lines that expand to billions of values, or without end, are refused quickly."""
        started = time.monotonic()
        with pytest.raises(DirectiveError, match=r"here: .*400,000"):
            yaml_io.read(text, "here")
        assert time.monotonic() - started < 5

    def test_no_objects(self) -> None:
        """Tags that would construct objects are refused."""
        with pytest.raises(DirectiveError, match=r"here: .*os\.system"):
            yaml_io.read("a: !!python/object/apply:os.system [echo]", "here")


WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t"), max_size=9
) | st.from_regex(r"[a-z] ?\[[0-9, :#'\n]{0,4}\]", fullmatch=True)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | WORDS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    )
)
def test_one_line_is_one_line(value: object) -> None:
    """Any value is written on one line and read back as the same value."""
    text = yaml_io.write_inline({"key": value, "other": 1})
    assert len(text.split("\n")) == 1
    assert yaml_io.read(text, "x") == {"key": value, "other": 1}
    assert yaml_io.read(yaml_io.write_lines({"key": value}), "x") == {"key": value}
