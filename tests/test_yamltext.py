"""YAML in and out."""

from __future__ import annotations

import pytest
import yaml

from mergekit_interleave import yamltext
from mergekit_interleave.errors import DirectiveError


def test_a_range_with_a_colon_is_text() -> None:
    """PyYAML alone reads 8:24 as the number 504; when that is mended, `resolve` can go."""
    assert yamltext.read("repeat: 8:24", "x") == {"repeat": "8:24"}
    assert yaml.safe_load("repeat: 8:24") == {"repeat": 504}


def test_a_block_document_with_commas_is_no_one_line_form() -> None:
    """What is a mapping already is taken as it is."""
    assert yamltext.read("model: a, b", "x") == {"model": "a, b"}


def test_a_key_given_twice_is_an_error() -> None:
    """PyYAML alone would take the last one in silence."""
    with pytest.raises(DirectiveError, match="line 2, column 1: the key `a` stands there twice"):
        yamltext.read("a: 1\na: 2", "x")


def test_shared_lists_are_written_out() -> None:
    """Mergekit's readers are people, too: no anchors, and numbers on one line."""
    shared = [0, 4]
    assert yamltext.write({"a": shared, "b": shared}) == "a: [0, 4]\nb: [0, 4]\n"
