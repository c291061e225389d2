"""`gen` and `explain` handle streams of documents for mergekit-multi."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from harness import Cli, load_tensors, make_llama

from mergekit_interleave.errors import UnrepresentableError
from mergekit_interleave.planning import mergekit_support

BLEND = """\
# blend first
name:    blend   # spaces and comments stay
merge_method: linear
models:
  - {model: ./one, parameters: {weight: 0.25}}
  - {model: ./two, parameters: {weight: 0.75}}
dtype: float32
const_tag: &X 1
"""
DEEP = "name: deep\nmodel: blend\ninterleave: every 4\ndtype: float32\n"
LAST = "model: deep\nrepeat: [-2, end]\nscale: {q_proj: 1/3}\n"


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_llama(Path("one"))
    make_llama(Path("two"))


def ranges(text: str) -> list[list[int]]:
    """Return the ranges of a mergekit config."""
    slices = yaml.safe_load(text)["slices"]
    return [part["sources"][0]["layer_range"] for part in slices]


def test_growth_lines_are_expanded_and_the_rest_stays(mk: Cli) -> None:
    """Other documents stay equal to the byte, and a model may be an earlier document's name."""
    Path("pipeline.yml").write_text(f"{BLEND}---\n{DEEP}---\n{LAST}")
    result = mk("gen", "pipeline.yml")
    assert result.status == 0, result.err
    first, second, third = result.out.split("---\n")
    assert first == BLEND
    assert yaml.safe_load(second)["name"] == "deep"
    assert yaml.safe_load(second)["dtype"] == "float32"
    assert ranges(second) == [[0, 4], [3, 4], [4, 8], [7, 8]]
    assert ranges(third) == [[0, 8], [8, 9], [8, 9], [9, 10], [9, 10]]
    assert "name" not in yaml.safe_load(third)


def test_mergekit_multi_runs_it(shell: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """mergekit-multi reads the stream and writes the tensors that the documents describe."""
    Path("pipeline.yml").write_text(f"{BLEND}---\n{DEEP}---\n{LAST}")
    words = "mk-interleave gen pipeline.yml | mergekit-multi /dev/stdin -I ./inter --out-path ./out"
    done = shell(words)
    assert done.returncode == 0, done.stderr
    one, two, out = (load_tensors(Path(name)) for name in ("one", "two", "out"))
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 12
    # Layer 8 of `deep` is the blend's layer 7, and layer 9 is a zeroed copy of it.
    for new, old, zeroed in ((7, 6, False), (8, 7, False), (10, 7, True), (11, 7, True)):
        for name in ("self_attn.o_proj", "mlp.up_proj"):
            tensor = f"model.layers.{old}.{name}.weight"
            blend = one[tensor] * 0.25 + two[tensor] * 0.75
            wanted = torch.zeros_like(blend) if zeroed and "o_proj" in name else blend
            found = out[f"model.layers.{new}.{name}.weight"]
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    scaled, plain = (out[f"model.layers.{i}.self_attn.q_proj.weight"] for i in (11, 10))
    torch.testing.assert_close(scaled, plain / 3)


def test_slices_tell_the_depth(mk: Cli) -> None:
    """The slices of an unreadable model give its depth; Llama's names are assumed in a warning."""
    source = "{model: no/where, layer_range: [0, 6]}"
    slices = f"name: a\nmerge_method: slerp\nslices:\n- sources:\n  - {source}\n"
    result = mk("gen", "-", stdin=f"{slices}---\nmodel: a\nappend: 1\n")
    assert result.status == 0, result.err
    assert ranges(result.out.split("---\n")[1]) == [[0, 6], [5, 6]]
    assert "assumed" in result.err


@pytest.mark.parametrize(
    ("stream", "named"),
    [
        (f"{DEEP}---\n{BLEND}", ["document 1: ", " blend: "]),
        (f"{BLEND}---\nmodel: blend\nrepeat: [4, 9]\n", ["document 2: [4, 9] ", "blend", " 8 "]),
        (f"{BLEND}---\nmodel: blend\ninterleave: often\n", ["document 2: interleave: ", "'often'"]),
        (
            f"{BLEND}---\nmodel: blend\nappend: 1\nstack: [[0, 4]]\n",
            ["document 2: ", "`append`", "`stack`"],
        ),
        (f"{BLEND}---\nmodel: blend\nappend: 1\nfoo: 1\n", ["document 2: ", "'foo'"]),
    ],
)
def test_an_error_names_the_document(mk: Cli, stream: str, named: list[str]) -> None:
    """An error names the document, and nothing is written."""
    result = mk("gen", "-", stdin=stream)
    assert result.status in (1, 2)
    assert result.out == ""
    error = result.err.splitlines()[0]
    assert error.startswith("error: ")
    assert all(name in error for name in named), error


def test_flags_and_run_take_one_document(mk: Cli) -> None:
    """A stream is refused together with flags, and refused by `run`."""
    stream = f"{BLEND}---\n{DEEP}"
    result = mk("gen", "-", "--model", "one", stdin=stream)
    assert (result.status, "multi-document" in result.err) == (2, True)
    Path("pipeline.yml").write_text(stream)
    result = mk("run", "pipeline.yml", "out")
    assert (result.status, "error: pipeline.yml: " in result.err) == (2, True)
    assert "`gen`" in result.err


def test_a_single_document_may_have_a_name(mk: Cli) -> None:
    """A single document may have a name, as mergekit-multi's documents have."""
    result = mk("gen", "-", stdin="name: deep\nmodel: ./one\nappend: 1\n")
    assert result.status == 0, result.err
    assert yaml.safe_load(result.out)["name"] == "deep"
    assert mk("gen", "-", stdin=BLEND).out == BLEND


def test_marks_and_merge_keys(mk: Cli) -> None:
    """A byte order mark is accepted, and a growth line may come from a merge key."""
    stream = f"\ufeff{BLEND}---\nmodel: ./one\ndrop: [0, 2]\n"
    first, second = mk("gen", "-", stdin=stream).out.split("---\n")
    assert (first, ranges(second)) == (BLEND, [[2, 8]])
    merged = "name: q\n<<: {drop: [0, 4]}\nmodel: ./one\n"
    assert ranges(mk("gen", "-", stdin=f"{BLEND}---\n{merged}").out.split("---\n")[1]) == [[4, 8]]
    assert mk("gen", "-", stdin="name: q\n? [a]\n: 1\n").status == 2
    assert mk("gen", "{[a, b]: 1, repeat: [0, 4]}", "--model", "one").status == 2


def test_a_name_is_accepted_everywhere(mk: Cli) -> None:
    """A `name` has no effect on `plan` and `run`, and `explain` keeps it."""
    Path("deep.yml").write_text("name: deep\nmodel: ./one\ninterleave: every 4\n")
    assert mk("plan", "deep.yml").status == 0
    assert mk("run", "deep.yml", "out", "--engine", "stream").status == 0
    config = mk("gen", "deep.yml").out
    explained = yaml.safe_load(mk("explain", "-", stdin=config).out)
    assert explained == {"name": "deep", "model": "./one", "interleave": "every 4"}


def test_explained_streams_know_their_names(mk: Cli) -> None:
    """A document may use an earlier document's result, whose depth is then known."""
    stream = mk("gen", "-", stdin=f"{BLEND}---\n{DEEP}---\nmodel: deep\ninterleave: every 5\n").out
    explained = mk("explain", "-", stdin=stream).out
    last = yaml.safe_load(explained.split("---\n")[2])
    assert last == {"model": "deep", "interleave": "every 5"}
    assert mk("gen", "-", stdin=explained).out == stream


def test_a_misspelled_growth_line(mk: Cli) -> None:
    """A misspelled growth line is an error, because the document has no merge method either."""
    result = mk("gen", "-", stdin=f"{BLEND}---\nname: mid\nmodel: blend\nstakc: [[0, 4]]\n")
    error, hint = result.err.splitlines()
    assert (result.status, "document 2: " in error, "'stakc'" in error) == (2, True, True)
    assert "`stack`" in hint


def test_errors_of_every_kind_name_the_document(mk: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that consists of a reason only also names the document."""

    def refuse(*_: object) -> None:
        raise UnrepresentableError("unrepresentable")

    monkeypatch.setattr(mergekit_support, "check", refuse)
    result = mk("gen", "-", stdin=f"{BLEND}---\n{DEEP}")
    assert result.status == 1
    assert re.search(r"^error: .*\bdocument 2: .*\bunrepresentable\b", result.err), result.err


def test_a_whole_model_of_unknown_depth_stays(mk: Cli) -> None:
    """`explain` keeps a document of unknown depth unchanged, and explains the others."""
    whole = "name: a\nmerge_method: passthrough\nmodels: [{model: no/where}]\n"
    stacked = yaml.safe_dump(yaml.safe_load(mk("gen", "--repeat", "2:4", "--model", "one").out))
    result = mk("explain", "-", stdin=f"{whole}---\n{stacked}")
    first, second = result.out.split("---\n")
    assert first == whole
    assert yaml.safe_load(second)["repeat"] == [2, 4]
    assert re.search(r"^warning: .*\bno/where\b", result.err, re.MULTILINE), result.err


def test_marks_between_documents(mk: Cli) -> None:
    """`%YAML` needs `---` after it and `...` before it, and both are kept."""
    linear = "name: z\nmerge_method: linear\nmodels: [{model: a/b}]\n"
    for stream in (
        f"{linear}...\n%YAML 1.1\n---\nmodel: ./one\nappend: 1\n",
        f"model: ./one\nappend: 1\n...\n%YAML 1.1\n---\n{linear}",
    ):
        result = mk("gen", "-", stdin=stream)
        assert result.status == 0, result.err
        assert linear in result.out
        documents = list(yaml.safe_load_all(result.out))
        assert sorted("slices" in document for document in documents) == [False, True]
        assert ("%YAML" in result.out) == ("...\n%YAML" in result.out)
        again = mk("explain", "-", stdin=result.out).out
        assert len(list(yaml.safe_load_all(again))) == 2


def test_results_of_every_kind_of_document(mk: Cli) -> None:
    """The depth of a result is known from modules, and from growth lines in `explain`."""
    source = "{sources: [{model: ./one, layer_range: [0, 6]}]}"
    modules = f"modules: {{default: {{slices: [{source}]}}}}"
    stream = f"name: n0\nmerge_method: passthrough\n{modules}\n---\nmodel: n0\nappend: 1\n"
    result = mk("gen", "-", stdin=stream)
    assert ranges(result.out.split("---\n")[1]) == [[0, 6], [5, 6]], result.err
    slices = "".join(
        f"- sources: [{{model: n0, layer_range: {r}}}]\n" for r in ("[0, 9]", "[8, 9]")
    )
    grown = "name: n0\nmodel: ./one\nrepeat: [0, 2]\n"
    spelled = f"slices:\n{slices}merge_method: passthrough\n"
    explained = mk("explain", "-", stdin=f"{grown}---\n{spelled}").out
    assert "10 → 10 layers" in explained
    assert yaml.safe_load(explained.split("---\n")[1])["stack"] == [[0, 9], [8, 9]]


def test_windows_line_ends_stay(mk: Cli) -> None:
    """Windows line endings in a file are kept."""
    text = BLEND.replace("\n", "\r\n")
    Path("crlf.yml").write_bytes(f"{text}---\r\nmodel: ./one\r\nappend: 1\r\n".encode())
    assert mk("gen", "crlf.yml").out.startswith(text)
