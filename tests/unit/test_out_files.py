"""The table of the files in a model's directory."""

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
def test_files_copied_from_the_base(path: str, *, copied: bool) -> None:
    """Files of other writers are not copied from the base; unknown files are."""
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
def test_files_that_force_replaces_without_a_manifest(path: str, *, usual: bool) -> None:
    """Without interleave.json, --force replaces only a model's usual files, outside of folders."""
    assert _out_files.is_usual(path) is usual


def test_every_file_has_one_row() -> None:
    """No pattern is listed twice, and each row has a known writer."""
    listed = [row.pattern for row in _out_files.FILES]
    assert len(listed) == len(set(listed))
    assert {row.writer for row in _out_files.FILES} == {"run", "engine", "base", "others"}


def test_what_may_be_replaced() -> None:
    """Only the card, its picture and evaluation results may be replaced after the run."""
    replaceable = _out_files.patterns(lambda row: row.replaceable)
    assert replaceable == ("README.md", "layers.svg", ".eval_results/*")
    assert not _out_files.is_copied(".eval_results/arc_easy.yaml")
