"""GGUF models and their bases in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_files import make_gguf

import mergekit_interleave as api
from mergekit_interleave.errors import DirectiveError, RefusedError, RequirementError
from mergekit_interleave.verification import llama_cpp


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_an_identity(kind: str, tmp_path: Path) -> None:
    """An identity computes exactly what its base computes, and the report says on what."""
    base = make_gguf(tmp_path / "base.gguf", kind=kind)
    api.run("append: 1", tmp_path / "out.gguf", model=base)
    report = api.verify(tmp_path / "out.gguf", against=base, forward=True)
    assert report.is_exact
    assert report.forward
    assert report.forward["exact"] is True
    assert report.forward["largest_difference"] == 0
    assert report.forward["greedy_tokens"] >= 16
    assert any("log-probabilities" in line for line in report.lines())
    assert report.as_dict()["forward"]["tools"].keys() == {"xllamacpp"}


def test_another_layout(tmp_path: Path) -> None:
    """Of a model that is no identity, differences are reported, and are no error."""
    base = make_gguf(tmp_path / "base.gguf")
    api.run("repeat: [1, 3]", tmp_path / "out.gguf", model=base)
    report = api.verify(tmp_path / "out.gguf", against=base, forward=True)
    assert report.forward
    assert "exact" not in report.forward
    assert report.forward["largest_difference"] > 0
    report.check()


def test_a_layer_that_is_no_identity(tmp_path: Path) -> None:
    """A layer that only seems to be an identity is found by what it computes."""
    base = make_gguf(tmp_path / "base.gguf", architecture="llama")
    words = {"zero": ["attn_output"], "allow_non_identity": True}
    api.run("append: 1", tmp_path / "out.gguf", model=base, **words)
    report = api.verify(tmp_path / "out.gguf", against=base, forward=True)
    assert report.forward
    assert report.forward["largest_difference"] > 0


def test_what_llama_cpp_does_not_load(tmp_path: Path) -> None:
    """A file that llama.cpp refuses is grown, and `verify --forward` says why it is refused."""
    base = make_gguf(tmp_path / "base.gguf", architecture="qwen3")  # without the norms of qwen3
    api.run("append: 1", tmp_path / "out.gguf", model=base)
    assert api.verify(tmp_path / "out.gguf", against=base).is_exact
    with pytest.raises(RefusedError, match=r"llama\.cpp"):
        api.verify(tmp_path / "out.gguf", against=base, forward=True)


def test_a_base_is_needed(tmp_path: Path) -> None:
    """`--forward` needs the base."""
    base = make_gguf(tmp_path / "base.gguf")
    api.run("append: 1", tmp_path / "out.gguf", model=base)
    with pytest.raises(DirectiveError):
        api.verify(tmp_path / "out.gguf", forward=True)


def test_without_xllamacpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If xllamacpp is missing, the error names it."""
    base = make_gguf(tmp_path / "base.gguf")
    api.run("append: 1", tmp_path / "out.gguf", model=base)
    monkeypatch.setattr(llama_cpp, "WANTED", "xllamacpp>=9999")
    with pytest.raises(RequirementError, match="xllamacpp"):
        api.verify(tmp_path / "out.gguf", against=base, forward=True)


def test_no_module_of_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module beside a downloaded model is not run."""
    base = make_gguf(tmp_path / "base.gguf")
    api.run("append: 1", tmp_path / "out.gguf", model=base)
    for name in ("xllamacpp", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    assert api.verify("out.gguf", against="base.gguf", forward=True).is_exact


@pytest.mark.parametrize("number", [float("nan"), float("inf"), None])
def test_what_is_no_number(number: float | None) -> None:
    """A log-probability that is no number is not equal to any."""
    one: list[llama_cpp.Steps] = [[[1, {"1": number}]]]
    assert llama_cpp.largest_difference(one, [[[1, {"1": -0.5}]]]) == float("inf")
    assert llama_cpp.largest_difference(one, one) == float("inf")


def test_differences() -> None:
    """Differences count up to where the texts part, and of tokens that both list."""
    one = [[[1, {"1": -0.5, "2": -1.0}], [2, {"2": -0.1}]]]
    other = [[[1, {"1": -0.5, "2": -1.25}], [3, {"3": -0.1}]]]
    assert llama_cpp.largest_difference(one, one) == 0
    assert llama_cpp.largest_difference(one, other) == float("inf")
    other[0][1] = [3, {"2": -0.2, "3": -0.1}]
    assert llama_cpp.largest_difference(one, other) == 0.25
