"""The lint that tests run on generated cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import card_lint
import pytest
import yaml

GOOD: dict[str, Any] = {
    "base_model": ["org/base"],
    "base_model_relation": "merge",
    "license": "mit",
    "tags": ["merge"],
}


def text(front: dict[str, Any], body: str = "# Title\n") -> str:
    """Return the text of a card."""
    return f"---\n{yaml.safe_dump(front)}---\n\n{body}"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"base_model": "/models/llama"}, "base_model: '/models/llama'"),
        ({"base_model": ["./x"]}, "base_model: './x'"),
        ({"base_model": ["a/b", "a/b"]}, "base_model: lists a model twice"),
        ({"base_model": [5]}, "base_model: 5"),
        ({"base_model_relation": "expanded"}, "base_model_relation: "),
        ({"base_model_relation": None}, "base_model_relation: "),
        ({"license": "my-own"}, "'my-own'"),
        ({"license": "other"}, "license_name: is missing"),
        ({"license": "other", "license_name": "x"}, "license_link: is missing"),
        ({"license_link": "LICENSE"}, "license_link: LICENSE"),
        ({"tags": []}, "tags: missing"),
        ({"tags": "merge"}, "tags: missing"),
        ({"language": 5}, "language: is not a word"),
        ({"pipeline_tag": {}}, "pipeline_tag: is not a word"),
        ({"library_name": ["a", "b"]}, "library_name: is not a word"),
    ],
)
def test_invalid_front_matter(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    """Invalid front matter is found without the Hub."""
    found = list(card_lint.problems(text({**GOOD, **change}), tmp_path))
    assert any(problem in words for words in found), found


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("# T\nmade from /home/someone/models/llama\n", "names a directory: /home/someone"),
        ("# T\n`F:\\models\\llama`\n", r"names a directory: F:\models\llama"),
        ("# Untitled Model (1)\n", "has no title"),
        ("no heading\n", "has no title"),
        ("# T\n![map](layers.svg)\n", "layers.svg"),
    ],
)
def test_an_invalid_body(body: str, problem: str, tmp_path: Path) -> None:
    """Local paths, a missing title and dead links are found."""
    found = list(card_lint.problems(text(GOOD, body), tmp_path))
    assert any(problem in words for words in found), found


@pytest.mark.parametrize(
    "body",
    [
        "# T\n[x](https://huggingface.co/org/base) and https://arxiv.org/abs/2401.02415\n",
        "# T\norg/base, text/plain, 4/5, and/or, ~/x, ./a/b, 0-3 [4] / 5\n",
        "# T\n[here](#below)\n",
    ],
)
def test_a_valid_body(body: str, tmp_path: Path) -> None:
    """Links and model names are not taken for paths."""
    assert not list(card_lint.problems(text(GOOD, body), tmp_path))


def test_no_front_matter(tmp_path: Path) -> None:
    """Missing or malformed front matter is a problem."""
    assert list(card_lint.problems("# T\n", tmp_path)) == ["front matter is missing"]
    assert list(card_lint.problems("---\n{\n---\n# T\n", tmp_path))
