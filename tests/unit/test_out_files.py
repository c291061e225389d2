"""The table of the files of a model's directory."""

from __future__ import annotations

import pytest

from mergekit_interleave import _out_files


@pytest.mark.parametrize(
    ("path", "copied"),
    [
        ("tokenizer.json", True),
        ("1_Pooling/config.json", True),
        ("1_Pooling/README.md", True),
        ("config.json", False),
        ("model-00001-of-00002.safetensors", False),
        ("1_Dense/model.safetensors", False),
        ("original/consolidated.00.pth", False),
        ("deep/consolidated.00", False),
        (".cache/a/b", False),
        ("notes.txt", True),
    ],
)
def test_what_is_copied_from_the_base(path: str, *, copied: bool) -> None:
    """What another writes is not; what no row names is."""
    assert _out_files.is_copied(path) is copied


@pytest.mark.parametrize(
    ("path", "usual"),
    [
        ("config.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("model/mine.safetensors", False),
        ("mine.safetensors", False),
        ("layers.svg", False),
        ("notes.txt", False),
    ],
)
def test_what_force_replaces_without_a_manifest(path: str, *, usual: bool) -> None:
    """Only the usual files of a model, and none in a folder."""
    assert _out_files.is_usual(path) is usual


def test_every_file_has_one_row() -> None:
    """No pattern is listed twice, and the writers are few."""
    listed = [row.pattern for row in _out_files.FILES]
    assert len(listed) == len(set(listed))
    assert {row.writer for row in _out_files.FILES} == {"run", "engine", "base", "others"}


def test_card_and_picture_may_be_replaced() -> None:
    """They are for people; `verify` asks for all other files."""
    assert _out_files.patterns(lambda row: row.replaceable) == ("README.md", "layers.svg")
