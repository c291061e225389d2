"""`run` and `verify` of every growth line give the tensors that the line describes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from harness import Cli, assert_same_tensors, load_tensors, make_llama

from mergekit_interleave.directive import yaml_io

LINES: list[tuple[str, list[int]]] = [
    ("windows: {size: 4, stride: 2}", [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7]),
    ("windows: 5:3", [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]),
    ("interleave: after [7, 0, 4], zero: none", [0, 0, 1, 2, 3, 4, 4, 5, 6, 7, 7]),
    ("drop: [2, -2]", [0, 1, 6, 7]),
    ("drop: [[0, 1], [4, 5]]", [1, 2, 3, 5, 6, 7]),
    ("repeat: [-2, end]", [0, 1, 2, 3, 4, 5, 6, 6, 7, 7]),
    ("repeat: [25%, 50%]", [0, 1, 2, 2, 3, 3, 4, 5, 6, 7]),
    ("stack: [[0, 75%], [-4, end]]", [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]),
    ("stack: [0:2, windows 3:1@2:6, 6:8x2]", [0, 1, 2, 3, 4, 3, 4, 5, 6, 6, 7, 7]),
    ("layout: [{layers: [0, 4], times: 2, as: block}, [4, 8]]", [*range(4), *range(8)]),
]


@pytest.mark.parametrize(("line", "sources"), LINES, ids=[line for line, _ in LINES])
def test_layers(mk: Cli, tiny: Path, tmp_path: Path, line: str, sources: list[int]) -> None:
    """Both engines write the layers that the line names, and `verify` accepts them."""
    out, other = tmp_path / "out", tmp_path / "other"
    for place, engine in ((out, "stream"), (other, "mergekit")):
        result = mk("run", line, place, "--model", tiny, "--engine", engine)
        assert result.status == 0, result.err
    assert_same_tensors(out, other)
    base, made = load_tensors(tiny), load_tensors(out)
    for index, source in enumerate(sources):
        for part in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm"):
            name = f"layers.{index}.{part}.weight"
            assert torch.equal(made[f"model.{name}"], base[f"model.layers.{source}.{part}.weight"])
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == len(sources)
    assert mk("verify", out, "--against", tiny).status == 0


@pytest.mark.parametrize("engine", ["stream", "mergekit"])
def test_identities_after_some_layers(mk: Cli, tiny: Path, tmp_path: Path, engine: str) -> None:
    """`after` gives a model with the logits of its base, and every file of it says the same."""
    out, picture = tmp_path / "out", tmp_path / "layers.svg"
    result = mk("run", "--after", "6,2,3", out, "--model", tiny, "--engine", engine)
    assert result.status == 0, result.err
    checked = mk("verify", out, "--against", tiny, "--forward")
    assert checked.status == 0, checked.err
    made = load_tensors(out)
    zeros = {
        (layer, part)
        for layer in range(11)
        for part in ("self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj")
        if not made[f"model.layers.{layer}.{part}.weight"].any()
    }
    assert zeros == {(i, part) for i in (3, 5, 9) for part in ("self_attn.o_proj", "mlp.down_proj")}
    recorded = json.loads((out / "interleave.json").read_text())
    assert recorded["directive"]["interleave"] == "after [2, 3, 6]"
    assert [i for i, layer in enumerate(recorded["layers"]) if layer["new"]] == [3, 5, 9]
    Path(tmp_path / "again.yml").write_text(yaml_io.write(recorded["directive"]))
    planned = mk("plan", tmp_path / "again.yml", "--model", tiny, "--svg", picture)
    sentence = "3 new layers, zeroed, after layers 2, 3 and 6 of 8: block expansion"
    assert sentence in planned.out, planned.err
    assert picture.read_text() == (out / "layers.svg").read_text()
    card = (out / "README.md").read_text()
    assert "interleave: after [2, 3, 6]" in card
    assert yaml.safe_load(mk("explain", out).out)["interleave"] == "after [2, 3, 6]"


LAYOUT = """\
models: {a: one, b: two}
layout:
- a 0:4
- {layers: [b 2:4, a 3:5], scale: {q_proj: sqrt(1/2), "*": 0.5}}
- {layers: b 4:6x2, zero: [o_proj, down_proj]}
- b -2:end
"""


def test_steps_of_several_models(mk: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of a step apply to each of its layers and to nothing else."""
    monkeypatch.chdir(tmp_path)
    make_llama(Path("one"))
    make_llama(Path("two"))
    Path("layout.yml").write_text(LAYOUT)
    result = mk("run", "layout.yml", "out")
    assert result.status == 0, result.err
    one, two, out = (load_tensors(Path(name)) for name in ("one", "two", "out"))
    sources = [*((one, i) for i in range(4)), (two, 2), (two, 3), (one, 3), (one, 4)]
    sources += [(two, 4), (two, 4), (two, 5), (two, 5), (two, 6), (two, 7)]
    for index, (source, layer) in enumerate(sources):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
            factor = 1.0
            if 4 <= index < 8:
                factor = 0.5**0.5 if part.endswith("q_proj") else 0.5
            if 8 <= index < 12 and part.endswith("o_proj"):
                factor = 0.0
            wanted = source[f"model.layers.{layer}.{part}.weight"] * factor
            torch.testing.assert_close(out[f"model.layers.{index}.{part}.weight"], wanted)
    assert torch.equal(out["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert torch.equal(out["model.norm.weight"], two["model.norm.weight"])
    assert mk("verify", "out", "--against", "one", "--against", "two").status == 0
    # The recorded directive and the explained one give the same recipe.
    stored = json.loads(Path("out/interleave.json").read_text())["directive"]
    Path("again.yml").write_text(yaml_io.write(stored))
    recipe = mk("gen", "again.yml").out
    assert (
        yaml.safe_load(recipe)["slices"]
        == yaml.safe_load(Path("out/mergekit_config.yml").read_text())["slices"]
    )
    explained = mk("explain", "out").out
    assert yaml.safe_load(mk("gen", "-", stdin=explained).out) == yaml.safe_load(recipe)


def test_a_scale_that_reaches_outside(mk: Cli, tiny: Path) -> None:
    """A scale that matches `lm_head` is refused in a growth line, and a warning in a step."""
    result = mk("gen", "append: 1, zero: none, scale: 0.5", "--model", tiny)
    assert result.status == 1
    assert re.search(r"^error: scale: .*\blm_head\.weight\b", result.err), result.err
    result = mk("gen", "layout: [0:8, {layers: 7:8, scale: 0.5}]", "--model", tiny)
    assert result.status == 0
    assert re.search(r"^warning: scale: .*\blm_head\.weight\b", result.err), result.err


def test_names_that_match_nothing(mk: Cli, tiny: Path) -> None:
    """A name that matches no tensor is an error in `zero`, and a warning in `scale`."""
    words = ("--model", tiny)
    result = mk("gen", "layout: [0:8, {layers: 4:6, zero: [p_roj]}]", *words)
    assert (result.status, "error: zero: 'p_roj'" in result.err) == (1, True), result.err
    result = mk("gen", "layout: [0:8, {layers: 4:6, zero: [o_proj]}, 6:8]", *words)
    assert (result.status, "mlp.down_proj" in result.err) == (1, True)
    result = mk("gen", "repeat: [4, 6], scale: {p_roj: 0.5}", *words)
    assert result.status == 0
    assert re.search(r"^warning: .*'p_roj'", result.err), result.err
    result = mk("gen", "repeat: [4, 6], scale: {o_proj: 0}", *words)
    assert (result.status, result.err) == (0, "")


def test_flags(mk: Cli, tiny: Path) -> None:
    """Flags have the same effect as the document's keys."""
    one = mk("gen", "repeat: [2, 4], scale: {q_proj: 1/3}, apply_to: all", "--model", tiny)
    two = mk(
        "gen", "--repeat", "2:4", "--scale", "q_proj=1/3", "--apply-to", "all", "--model", tiny
    )
    assert one.status == two.status == 0
    assert one.out == two.out
    assert [mk("gen", flag, value, "--model", tiny).status for flag, value in (
        ("--windows", "4:2"), ("--drop", "1:2,-2:end"), ("--repeat", "-4:end"),
    )] == [0, 0, 0]  # fmt: skip
    result = mk("gen", "layout: [one 0:4, two 0:4]", "--model", tiny)
    assert (result.status, "error: model:" in result.err) == (2, True)


def layers(text: str) -> list[tuple[str, list[int], bool]]:
    """Return the slices of a mergekit config: model, range, whether they are scaled."""
    sources = [part["sources"][0] for part in yaml.safe_load(text)["slices"]]
    return [(x["model"], x["layer_range"], "parameters" in x) for x in sources]


def test_a_step_overrides_the_directive(mk: Cli, tiny: Path) -> None:
    """`zero: none` of a step overrides the directive's `zero`."""
    text = "zero: auto, layout: [0:8, {layers: 4:6, zero: none}, 6:8]"
    slices = layers(mk("gen", text, "--model", tiny).out)
    assert [(bounds, scaled) for _, bounds, scaled in slices] == [
        ([0, 8], False), ([4, 6], False), ([6, 8], True)
    ]  # fmt: skip


def test_a_directory_is_one_model_however_it_is_spelled(
    mk: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Different spellings of a directory are one model: short names, paths, a revision."""
    monkeypatch.chdir(tmp_path)
    make_llama(Path("one"))
    for text in (
        "models: {a: one, b: ./one/}, layout: [a 0:8, b 4:8], zero: auto",
        f"layout: [one 0:8, {tmp_path}/one 4:8], zero: auto",
        "layout: [one 0:8, one@main 4:8], zero: auto",
    ):
        result = mk("gen", text)
        assert result.status == 0, result.err
        assert [(model, scaled) for model, _, scaled in layers(result.out)] == [
            ("one", False), ("one", True)
        ]  # fmt: skip


def test_keys_and_flags_without_effect(mk: Cli, tiny: Path) -> None:
    """Keys and flags without an effect are refused, and so are contradictory ones."""
    for words, named, status in (
        (["drop: 2:4, scale: {q_proj: 0.5}"], "zero, scale: ", 1),
        (["drop: 2:4", "--zero", "auto"], "zero, scale: ", 1),
        (["layout: [0:4, {layers: 2:8, zero: auto}]", "--scale", "q_proj=0.5"], "zero, scale: ", 1),
        (["--repeat", "2:4", "--zero", "o_proj,down_proj", "--scale", "o_proj=2"], "o_proj", 2),
        (["layout: [0:8, {layers: 4:8, zero: auto, scale: {o_proj: 2}}]"], "o_proj", 2),
        (["--repeat", "2:4", "--apply-to", "all"], "apply_to: ", 2),
        (["--scale", "{q_proj: 1}", "--scale", "k_proj=1", "--repeat", "2:4"], "--scale", 2),
        (["models: {a: x/y}, layout: [a 0:4, b 2:4]"], "layout[1]: b ", 2),
    ):
        result = mk("gen", *words, *([] if "layout: [a" in words[0] else ["--model", tiny]))
        error = result.err.splitlines()[0]
        assert (result.status, named in error) == (status, True), result.err
    for text in ("append: 2, apply_to: last", "interleave: every 4, apply_to: all"):
        assert mk("gen", text, "--model", tiny).status == 0


def test_flags_beside_a_mergekit_config(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """Flags that a mergekit config already sets are refused, and so is a wrong depth."""
    file = tmp_path / "cfg.yml"
    file.write_text(mk("gen", "--repeat", "2:4", "--model", tiny).out)
    for flag, value in (("--zero", "auto"), ("--scale", "q_proj=2"), ("--apply-to", "all")):
        result = mk("gen", file, flag, value)
        assert (result.status, flag in result.err) == (2, True)
    result = mk("gen", file, "--layers", "9")
    assert result.status == 1
    assert re.search(r"^error: layers: 9\b.*\b8\b", result.err), result.err
    assert mk("gen", file, "--layers", "8").status == 0


def test_text_forms_agree(mk: Cli, tiny: Path) -> None:
    """Different notations of the same range give the same recipe."""
    for one, other in (
        ("repeat: 2:4x 3", "repeat: {layers: [2, 4], times: 3}"),
        ("layout: [{layers: 2:4@block, times: 3}]", "layout: [2:4x3@block]"),
        ("layout: [{layers: 2:4x3, as: block}]", "layout: [2:4x3@block]"),
        ("drop: '2:4, 5:6'", "drop: [[2, 4], [5, 6]]"),
        ("\ufeffdrop: [2, 4]", "drop: [2, 4]"),
    ):
        first, second = (mk("gen", "-", "--model", tiny, stdin=text) for text in (one, other))
        assert first.status == 0, first.err
        assert first.out == second.out


def test_short_names_stand_for_models_in_mergekits_keys(mk: Cli) -> None:
    """The keys of mergekit accept short names, and `models` with a flag as growth line works."""
    text = "models: {a: o/x, b: o/y}, layout: [a 0:4, b 2:4], base_model: b, tokenizer_source: a"
    made = yaml.safe_load(mk("gen", text, "--layers", "4").out)
    assert (made["base_model"], made["tokenizer_source"]) == ("o/y", "o/x")
    result = mk("gen", "models: {a: o/x}, model: a", "--drop", "2:3", "--layers", "4")
    assert [model for model, _, _ in layers(result.out)] == ["o/x", "o/x"]


def test_a_directive_for_verify(mk: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--recipe` accepts a layout of several models, which are matched in order."""
    monkeypatch.chdir(tmp_path)
    make_llama(Path("one"))
    make_llama(Path("two"))
    Path("layout.yml").write_text("models: {a: x/one, b: x/two}\nlayout: [b 0:4, a 2:8]\n")
    assert mk("run", "layout: [two 0:4, one 2:8]", "out").status == 0
    words = ("verify", "out", "--recipe", "layout.yml")
    assert mk(*words, "--against", "two", "--against", "one").status == 0
    assert mk(*words, "--against", "one", "--against", "two").status == 1
    result = mk(*words, "--against", "one")
    assert result.status == 2
    assert re.search(r"^error: --against: .*\b2\b.*\b1\b", result.err), result.err


def test_what_is_stored_reads_back(
    mk: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If some models have short names, the stored directive gives all of them short names."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "three"):
        make_llama(Path(name))
    text = "models: {a: one, b: two}, model: a, layout: [0:4, b 2:6, three 6:8]"
    assert mk("run", text, "out", "--engine", "stream").status == 0
    stored = json.loads(Path("out/interleave.json").read_text())["directive"]
    assert stored["models"] == {"a": "one", "b": "two", "c": "three"}
    Path("elsewhere").mkdir()
    Path("elsewhere/c.yml").write_text(yaml_io.write(stored))
    recipe = mk("gen", "c.yml", cwd=Path("elsewhere")).out
    assert layers(recipe) == layers(Path("out/mergekit_config.yml").read_text())
