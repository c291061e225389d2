"""`mk-interleave scan --for training`: which layers a model needs least."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from harness import Cli, make_llama, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_interleave as api

TEXT = " ".join(f"word{number}" for number in range(3, 43))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a file with a text of 40 tokens."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of 6 layers, of which 1 and 4 are identities."""
    folder = tmp_path_factory.mktemp("grown")
    base = make_llama(folder / "base", layers=4)
    api.run("interleave: after [0, 2]", folder / "grown", model=base, engine="stream")
    return folder / "grown"


def own_words(model: Path, file: Path) -> Path:
    """Write items with answers drawn from a model, so that no other model expects them more."""
    words = AutoTokenizer.from_pretrained(model)
    prompts = [f"word{number}" for number in range(3, 23)]
    torch.manual_seed(0)
    written = AutoModelForCausalLM.from_pretrained(model).generate(
        words(prompts, return_tensors="pt").input_ids,
        max_new_tokens=40,
        do_sample=True,
        suppress_tokens=[0, 1, 2],
    )
    answers = words.batch_decode(written[:, 1:])
    lines = [
        json.dumps({"prompt": prompt, "answer": f" {answer}"})
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    file.write_text("\n".join(lines))
    return file


def log_likelihood(model: Any, tokens: torch.Tensor, start: int) -> float:
    """Return the log-likelihood of all tokens from `start`."""
    with torch.no_grad():
        found = model(tokens).logits[0, start - 1 : -1].double().log_softmax(-1)
    return float(found.gather(1, tokens[0, start:, None]).sum())


def without_each(model: Path, tokens: torch.Tensor, start: int) -> list[float]:
    """Return the change of the log-likelihood without each layer, by models of their own."""
    base = log_likelihood(AutoModelForCausalLM.from_pretrained(model), tokens, start)
    depth = AutoModelForCausalLM.from_pretrained(model).config.num_hidden_layers
    return [
        log_likelihood(api.load(f"drop: {i}:{i + 1}", model=model), tokens, start) - base
        for i in range(depth)
    ]


def test_changes_are_those_of_models_without_a_layer(tiny: Path, text: Path) -> None:
    """The change per token is that of the model that `load` builds, and gives the ranks."""
    report = api.scan_for_training(model=tiny, text=text)
    tokens = AutoTokenizer.from_pretrained(tiny)(TEXT, return_tensors="pt").input_ids
    expected = [change / 39 for change in without_each(tiny, tokens, 1)]
    assert report.tokens == 39
    assert [each.change for each in report.layers] == pytest.approx(expected, abs=1e-5)
    ranking = sorted(range(8), key=lambda layer: -expected[layer])
    assert [report.layers[layer].rank for layer in ranking] == [*range(1, 9)]
    assert report.after == tuple(sorted(ranking[:2]))  # a quarter of 8
    assert report.directive == f"interleave: after {sorted(ranking[:2])}"


def test_items(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """With items, only the tokens of the answers count."""
    file = tmp_path / "items.jsonl"
    file.write_text('{"prompt": "word3 word4 word5", "answer": " word6 word7"}\n')
    result = mk("scan", "--for", "training", "--model", tiny, "--items", file, "--json")
    assert result.status == 0, result.err
    found = json.loads(result.out)
    words = AutoTokenizer.from_pretrained(tiny)
    tokens = words("word3 word4 word5 word6 word7", return_tensors="pt").input_ids
    expected = [change / 2 for change in without_each(tiny, tokens, 3)]
    assert found["tokens"] == 2
    assert [each["change"] for each in found["layers"]] == pytest.approx(expected, abs=1e-4)


def test_identities_matter_least(mk: Cli, grown: Path, tmp_path: Path) -> None:
    """Layers that change nothing have influence 0, change 0 and the first ranks."""
    items, out = own_words(grown, tmp_path / "items.jsonl"), tmp_path / "out"
    result = mk(
        *("scan", "--for", "training", "--model", grown, "--items", items, "--add", 2),
        *("--out", out),
    )
    assert result.status == 0, result.err
    found = json.loads((out / "training.json").read_text())
    layers = {each["layer"]: each for each in found["layers"]}
    for layer in (1, 4):
        assert (layers[layer]["block_influence"], layers[layer]["change"]) == (0, 0)
    assert [layers[1]["rank"], layers[4]["rank"]] == [1, 2]
    assert all(layers[other]["change"] < 0 for other in (0, 2, 3, 5))
    assert found["after"] == [1, 4]
    assert found["directive"] == "interleave: after [1, 4]"
    assert "`interleave: after [1, 4]`" in result.out
    planned = api.plan(out / "training.yml")
    assert len(planned.layout) == 8
    assert planned.identities == {2, 6}
    deeper = mk("run", out / "training.yml", tmp_path / "deeper")
    assert deeper.status == 0, deeper.err


def test_table_and_json_agree(mk: Cli, tiny: Path, text: Path) -> None:
    """The table has a row for each layer, in the order of the ranks."""
    words = ("scan", "--for", "training", "--model", tiny, "--text", text, "--add", 8)
    found = json.loads(mk(*words, "--json").out)
    assert found["after"] == [*range(8)]
    lines = mk(*words).out.splitlines()
    rows = [line.split() for line in lines[-8:]]
    ranking = sorted(found["layers"], key=lambda each: each["rank"])
    assert [int(row[0]) for row in rows] == [each["layer"] for each in ranking]
    assert [int(row[-1]) for row in rows] == [*range(1, 9)]
    for row, each in zip(rows, ranking, strict=True):
        assert float(row[1]) == pytest.approx(each["block_influence"], abs=1e-4)
        assert float(row[2]) == pytest.approx(each["change"], abs=1e-4)


def toy(name: str, path: Path) -> Path:
    """Save a toy model with a tokenizer."""
    zoo.save(name, path)
    save_tokenizer(path)
    return path


def test_a_layer_that_must_stay(tmp_path: Path, text: Path) -> None:
    """A layer that `run` does not leave out has no change and no rank, but a reason."""
    base = toy("gpt_neox_japanese", tmp_path / "base")
    report = api.scan_for_training(model=base, text=text)
    *others, last = report.layers
    assert (last.change, last.rank) == (None, None)
    assert "last layer" in str(last.reason)
    assert last.influence is not None
    assert {each.rank for each in others} == {*range(1, 8)}
    assert last.layer not in report.after
    with pytest.raises(api.LayoutError, match="7 layers"):
        api.scan_for_training(model=base, text=text, add=8)


def test_new_layers_that_run_refuses(mk: Cli, tmp_path: Path, text: Path) -> None:
    """Where no new layers may follow those layers, a warning says so, and no directive is given."""
    base, out = toy("jamba", tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    (out / "training.yml").write_text("of an earlier scan")
    result = mk("scan", "--for", "training", "--model", base, "--text", text, "--out", out)
    assert result.status == 0, result.err
    found = json.loads((out / "training.json").read_text())
    assert found["directive"] is None
    assert any("interleave: after [7]" in warning for warning in found["warnings"])
    assert "warning: `run` refuses" in result.err
    assert not (out / "training.yml").exists()


def test_no_block_influence(tmp_path: Path, text: Path) -> None:
    """Layers of two stacks are ranked without a Block Influence, and a warning says why."""
    report = api.scan_for_training(model=toy("hrm_text", tmp_path / "base"), text=text)
    assert {each.influence for each in report.layers} == {None}
    assert {each.rank for each in report.layers} == {*range(1, 9)}
    assert any("Block Influence" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("--for fun", 2),
        ("--space drops --for training", 2),
        ("--workers 2 --for training", 2),
        ("--combine 2 --for training", 2),
        ("--top 3 --for training", 2),
        ("--seed 1 --for training", 2),
        ("--ray local --for training", 2),
        ("--dtype int8 --for training", 2),
        ("--report found --for training", 2),
        ("FILE --for training", 2),
        ("--add 2", 2),
        ("--add 0 --for training", 2),
        ("--add two --for training", 2),
        ("--add 9 --for training", 1),
        ("--tokens 0 --for training", 2),
        ("--text missing.txt --for training", 2),
        ("--out {text} --for training", 1),
    ],
)
def test_bad_input(mk: Cli, tiny: Path, text: Path, words: str, status: int) -> None:
    """Wrong options are one error that names the first of them."""
    given = words.format(text=text).split()
    result = mk("scan", "--model", tiny, *given)
    assert result.status == status
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert given[0] in errors[0] or given[1] in errors[0]
    assert not result.out


def test_no_model(mk: Cli) -> None:
    """Without a model there is nothing to rank."""
    assert mk("scan", "--for", "training").status == 2


def test_one_layer(tmp_path: Path, text: Path) -> None:
    """A model without its only layer cannot be measured."""
    base = make_llama(tmp_path / "base", layers=1)
    with pytest.raises(api.LayoutError, match="one layer"):
        api.scan_for_training(model=base, text=text)
    two = make_llama(tmp_path / "two", layers=2)
    assert len(api.scan_for_training(model=two, text=text).after) == 1
