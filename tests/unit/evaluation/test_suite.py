"""The offline tasks have verified items, which are the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.evaluation.offline import suite
from mergekit_interleave.scanning import sequences


def test_the_files(tmp_path: Path) -> None:
    """Each task has its items, with the right answer among the choices, and a version."""
    pytest.importorskip("reasoning_gym")
    suite.write(tmp_path)
    tasks = [yaml.safe_load(file.read_text()) for file in sorted(tmp_path.glob("*.yaml"))]
    assert {suite.TAG, *(task["task"] for task in tasks)} == {*suite.NAMES}
    assert all(task["metadata"]["version"] == suite.VERSION for task in tasks)
    items = {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in tmp_path.glob("*.jsonl")
    }
    assert len(items["arithmetic"]) == len(items["logic"]) == suite.COUNT
    for item in items["logic"]:
        assert 0 <= item["answer"] < len(item["choices"]) == len({*item["choices"]})
    shown = tasks[0]["fewshot_config"]["samples"]
    assert len(shown) == suite.SHOTS
    assert not [item for item in items["arithmetic"] if item in shown]
    passages = [item["text"] for item in items["text"]]
    assert len(passages) > 60
    assert "Gutenberg" not in "".join(passages)
    scanned = " ".join(sequences.default_text()[0].split())
    assert not [passage for passage in passages if passage in scanned]
    again = tmp_path / "again"
    again.mkdir()
    suite.write(again)
    for name in items:
        assert (again / f"{name}.jsonl").read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()


@given(st.lists(st.text("ab. \n", min_size=1, max_size=20), max_size=8), st.integers(1, 30))
def test_passages(paragraphs: list[str], least: int) -> None:
    """Passages are long enough, follow one another, and leave out only the end."""
    text = "\n\n".join(paragraphs)
    found = suite.passages(text, least)
    assert all(len(passage) >= least for passage in found)
    assert "".join(text.split()).startswith("".join("".join(found).split()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("offline", True), ("offline_*", True), ("offline_text", True), ("arc_easy", False),
     ("mmlu_*", False), ("off", False)],
)  # fmt: skip
def test_names(name: str, expected: bool) -> None:
    """The items are made only for the names of offline tasks."""
    assert suite.is_offline(name) is expected
