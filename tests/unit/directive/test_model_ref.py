"""Model references are kept as written."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_interleave.directive.model_ref import ModelPath, ModelRef, parse_model
from mergekit_interleave.errors import DirectiveError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", ModelRef(ModelPath("org/name"))),
        ("org/name@v1", ModelRef(ModelPath("org/name", "v1"))),
        ("./models/x/", ModelRef(ModelPath("./models/x/"))),
        ("org/a@v1+org/b@v2", ModelRef(ModelPath("org/a", "v1"), ModelPath("org/b", "v2"))),
    ],
)
def test_a_string(text: str, expected: ModelRef) -> None:
    """A string is read in mergekit's form and written back unchanged."""
    assert parse_model(text, "model") == expected
    assert expected.to_yaml() == text


def test_an_existing_path_is_that_path(tmp_path: Path) -> None:
    """An existing path with + or @ is read as a path and written in the mapping form."""
    path = tmp_path / "a+b@c"
    path.mkdir()
    ref = parse_model(str(path), "model")
    assert ref == ModelRef(ModelPath(str(path)))
    assert ref.to_yaml() == {"model": {"path": str(path)}}


def test_the_mapping_form_is_read() -> None:
    """The mapping form has revision, LoRA and architecture."""
    value = {
        "model": {"path": "org/a", "revision": "v1"},
        "lora": "org/b",
        "override_architecture": "LlamaForCausalLM",
    }
    ref = parse_model(value, "model")
    assert ref == ModelRef(ModelPath("org/a", "v1"), ModelPath("org/b"), "LlamaForCausalLM")
    assert parse_model(ref.to_yaml(), "model") == ref


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("http://www.huggingface.co/org/na.me-1/", "org/na.me-1"),
        ("huggingface.co/org/name", "org/name"),
        ("https://hf.co/org/name/tree/v1.0", "org/name@v1.0"),
        ("hf://org/name", "org/name"),
        ("https://huggingface.co/org/name/blob/main/config.json?x=1", "org/name@main"),
    ],
)
def test_a_url_of_the_hub(url: str, name: str) -> None:
    """A URL is refused; the hint names the Hub id in it, with its revision."""
    for value in (url, {"path": url}):
        with pytest.raises(DirectiveError, match=r"^m\.model: ") as error:
            parse_model({"model": value}, "m")
        assert str(error.value.hint).endswith(f": {name}")


def test_another_url() -> None:
    """A URL elsewhere is refused as such."""
    with pytest.raises(DirectiveError, match="URL"):
        parse_model("https://example.com/org/name", "model")
