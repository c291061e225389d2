"""Evaluation results in the form that the Hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from mergekit_interleave.errors import OutputError
from mergekit_interleave.output import hub_results

TOOLS = {"lm_eval": "0.4.13"}


def row(task: str = "arc_easy", metric: str = "acc", **keys: Any) -> dict[str, Any]:
    """Return a result of a data set of the Hub."""
    return {
        "task": task,
        "metric": metric,
        "filter": "none",
        "version": "1",
        "num_fewshot": 5,
        "items": 100,
        "limit": None,
        "date": "2026-11-29",
        "grown": 0.25,
        "dataset": {"path": "allenai/ai2_arc", "revision": None},
        **keys,
    }


def test_files() -> None:
    """Each metric has a file of its own, and a task without a data set of the Hub has none."""
    rows = [
        row(),
        row(metric="acc_norm"),
        row("gsm8k", "exact_match", filter="strict-match"),
        row("gsm8k", "exact_match", filter="flexible-extract"),
        row("own", dataset=None),
    ]
    texts = hub_results.texts(rows, TOOLS)
    names = ("arc_easy", "arc_easy_acc_norm", "gsm8k", "gsm8k_exact_match_flexible-extract")
    assert [*texts] == [f".eval_results/{name}.yaml" for name in names]
    for text in texts.values():
        (entry,) = parse_eval_result_entries(yaml.safe_load(text))
        assert (entry.dataset_id, entry.value) == ("allenai/ai2_arc", 0.25)
        assert "lm_eval 0.4.13" in entry.notes
        assert "5-shot" in entry.notes


def test_notes_of_a_limit() -> None:
    """The notes say so if not all items were used."""
    (text,) = hub_results.texts([row(limit=100)], TOOLS).values()
    assert "100 items" in text
    (text,) = hub_results.texts([row()], TOOLS).values()
    assert "items" not in text


def test_names_of_others() -> None:
    """A name of a task leads to no other directory."""
    (name,) = hub_results.texts([row("../../etc/x y")], TOOLS)
    assert name == ".eval_results/-etc-x-y.yaml"


def test_results_that_are_no_longer_true(tmp_path: Path) -> None:
    """Files of earlier results are removed, and files of others stay."""
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / ".eval_results" / "mine.yaml").write_text("[]")
    files = hub_results.write(tmp_path, {"files": ["config.json"]}, {".eval_results/a.yaml": "a"})
    assert files == [".eval_results/a.yaml", "config.json"]
    files = hub_results.write(tmp_path, {"files": files}, {".eval_results/b.yaml": "b"})
    assert files == [".eval_results/b.yaml", "config.json"]
    found = sorted(file.name for file in (tmp_path / ".eval_results").iterdir())
    assert found == ["b.yaml", "mine.yaml"]


def test_no_directory(tmp_path: Path) -> None:
    """A file in place of the directory is one error."""
    (tmp_path / ".eval_results").write_text("")
    with pytest.raises(OutputError, match="eval_results"):
        hub_results.write(tmp_path, {}, {".eval_results/a.yaml": "a"})
