"""`mk-interleave scan`: layouts that are measured, compared with the models that `run` writes."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from harness import Cli, make_llama, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit_interleave as api
from mergekit_interleave.checkpoint import meta_model
from mergekit_interleave.commands.scan_job import Job
from mergekit_interleave.errors import CheckpointError, DirectiveError, Warn
from mergekit_interleave.scanning.measure import Measure

WORDS = [f"word{number}" for number in range(3, 60)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama of 8 layers with a tokenizer."""
    return make_llama(tmp_path_factory.mktemp("scan") / "base")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text of 700 random words."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(random.Random(1).choices(WORDS, k=700)))  # noqa: S311 - a test
    return file


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return items with answers of one and of several words."""
    draw = random.Random(2)  # noqa: S311 - a test
    file = tmp_path_factory.mktemp("items") / "items.jsonl"
    lines = []
    for number in range(14):
        answer = " " + " ".join(draw.choices(WORDS, k=1 + number % 3))
        item = {"prompt": " ".join(draw.choices(WORDS, k=1 + number)), "answer": answer}
        item |= {"choices": [answer, " word4"]} if number % 2 else {}
        lines.append(json.dumps(item))
    file.write_text("\n".join(lines))
    return file


def lines_of(out: Path) -> list[dict[str, Any]]:
    """Return the lines of the results."""
    return [json.loads(line) for line in (out / "scan.jsonl").read_text().splitlines()]


def log_likelihood(path: Path, text: Path, items: Path) -> list[float]:
    """Return the score of each window of the text and of each item."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    encode = AutoTokenizer.from_pretrained(path).encode
    tokens = encode(text.read_text())
    rows = [(tokens[at : at + 64], 1) for at in range(0, len(tokens) - 1, 63)]
    for line in items.read_text().splitlines():
        item = json.loads(line)
        whole = encode(item["prompt"] + item["answer"])
        rows.append((whole, len(encode(item["prompt"]))))
    found = []
    for row, start in rows:
        given = torch.tensor([row])
        with torch.no_grad():
            scores = model(given).logits[0, :-1].log_softmax(-1)
        found.append(float(scores.gather(1, given[0, 1:, None])[start - 1 :].sum()))
    return found


def test_scores(mk: Cli, base: Path, text: Path, items: Path, tmp_path: Path) -> None:
    """The scores of layouts are those of the models that `run` writes."""
    plans = (
        "repeat: 2:5@block",
        "repeat: 1:4",
        "drop: 3:5",
        "interleave: every 4",
        "repeat: 3:4x5",
        "repeat: 2:4, zero: none, scale: {o_proj: 0.5}",
        f"models: {{a: {base}, b: {make_llama(tmp_path / 'other')}}}, layout: [a 0:5, b 3:8]",
    )
    (tmp_path / "plans.txt").write_text("\n".join(plans))
    words = ("--model", base, "--text", text, "--items", items, "--out", tmp_path / "found")
    result = mk("scan", tmp_path / "plans.txt", *words)
    assert result.status == 0, result.err
    scores = np.load(tmp_path / "found" / "scores.npy")
    assert scores.shape == (8, 12 + 14)
    np.testing.assert_allclose(scores[0], log_likelihood(base, text, items), atol=1e-4, rtol=0)
    for row, plan in enumerate(plans, 1):
        api.run(plan, tmp_path / str(row), model=None if "models" in plan else base)
        expected = log_likelihood(tmp_path / str(row), text, items)
        np.testing.assert_allclose(scores[row], expected, atol=1e-4, rtol=0)
    found = lines_of(tmp_path / "found")
    assert [line["directive"] for line in found] == [*plans]
    for row, line in enumerate(found, 1):
        assert line["log_likelihood"] == pytest.approx(scores[row].sum())
        assert line["base_log_likelihood"] == pytest.approx(scores[0].sum())
    assert np.array_equal(scores[4], scores[0])  # identities


def test_what_comes_out(mk: Cli, base: Path, text: Path, tmp_path: Path) -> None:
    """A scan leaves its results, a map and a directive for `run`; a second call only reads them."""
    out = tmp_path / "found"
    words = ("scan", "--model", base, "--text", text, "--space", "drops", "--out", out)
    result = mk(*words, "--tokens", 1300)
    assert result.status == 0, result.err
    verdict, *_ = result.out.splitlines()
    found = lines_of(out)
    assert len(found) == 35
    assert {*found[0]} == {
        "directive", "space", "cell", "log_likelihood", "base_log_likelihood", "tokens", "items"
    }  # fmt: skip
    assert "<svg" in (out / "scan.svg").read_text()
    helps = "helps" in verdict
    assert (out / "best.yml").exists() is helps
    if helps:
        assert mk("run", out / "best.yml", tmp_path / "grown").status == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert mk(*words, "--tokens", 1300).out == result.out == mk("scan", "--report", out).out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    report = json.loads(mk("scan", "--report", out, "--json").out)
    assert report["verdict"] == verdict


def test_a_planted_gain(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a layer of the base is scrambled, leaving that layer out is found to help."""
    model = AutoModelForCausalLM.from_pretrained(base)
    data = tmp_path / "scrambled"
    words = AutoTokenizer.from_pretrained(base)
    tokens = words(text.read_text(), return_tensors="pt").input_ids
    _teach(model, tokens)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.model.layers[5].parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=1.0, generator=draw)
    model.save_pretrained(data)
    words.save_pretrained(data)
    out = tmp_path / "found"
    monkeypatch.chdir(tmp_path)
    found = api.scan(model="scrambled", space="drops", text=text, tokens=1300, out=out)
    assert found.best == "drop: 5:6"
    assert "Outlined: 5:6 helps" in (out / "scan.svg").read_text()
    monkeypatch.chdir(out)  # `best.yml` has the whole path of the model
    api.run(out / "best.yml", tmp_path / "grown")


def test_a_planted_loss(base: Path, text: Path, tmp_path: Path) -> None:
    """A layer left out, and its neighbour repeated to fill the depth, is reported as worse."""
    model = AutoModelForCausalLM.from_pretrained(base)
    words = AutoTokenizer.from_pretrained(base)
    _teach(model, words(text.read_text(), return_tensors="pt").input_ids)
    for folder in (model, words):
        folder.save_pretrained(tmp_path / "taught")
    (tmp_path / "plans.txt").write_text("stack: 0:4, 3:4, 5:8")
    report = api.scan(tmp_path / "plans.txt", model=tmp_path / "taught", text=text, tokens=1300)
    (found,) = report.analysis.findings
    assert report.best is None
    assert found.selected < 0
    assert found.interval[1] < 0


def _teach(model: Any, tokens: torch.Tensor) -> None:
    """Let a model learn a text by heart, so that a broken layer makes it worse."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = tokens[0, : 5 * 128].view(5, 128)
    for _ in range(30):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_identities_do_not_help(base: Path, text: Path, tmp_path: Path) -> None:
    """Zeroed copies change nothing, and the verdict says so."""
    file = tmp_path / "plans.txt"
    file.write_text("\n".join(f"interleave: every {number}" for number in range(1, 7)))
    api.scan(file, model=base, text=text, tokens=1300, out=tmp_path / "out")
    (tmp_path / "out" / "best.yml").write_text("repeat: 1:2")  # of an earlier release
    found = api.scan(file, model=base, text=text, tokens=1300, out=tmp_path / "out")
    assert not (tmp_path / "out" / "best.yml").exists()
    assert found.best is None
    assert not found.differences.any()


def test_combined_blocks(mk: Cli, text: Path, items: Path, tmp_path: Path) -> None:
    """Each round measures the best so far with one block more; a stopped scan comes to the same."""
    base = make_llama(tmp_path / "base", layers=5)
    out, again = tmp_path / "found", tmp_path / "again"
    words = ("scan", "--model", base, "--items", items, "--space", "blocks")
    result = mk(*words, "--combine", 3, "--out", out)
    assert result.status == 0, result.err
    for more in (("--combine", 2), ("--combine", 3)):
        assert mk(*words, "--out", again, *more).status == 0
    for name in ("scan.json", "scan.jsonl", "scores.npy", "scan.svg"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name
    assert mk("scan", "--report", out).out == result.out
    found = lines_of(out)
    counts = [line["directive"].count(",") for line in found]
    assert counts[:15] == [0] * 15
    assert counts == sorted(counts)
    assert {*counts} == {0, 2, 3}  # as many ranges as blocks, and one more
    assert all("cell" not in line for line in found[15:])
    last = found[-1]["directive"]
    api.run(last, tmp_path / "grown", model=base)
    expected = log_likelihood(tmp_path / "grown", text, items)[-found[0]["items"] :]
    np.testing.assert_allclose(np.load(out / "scores.npy")[-1], expected, atol=1e-4, rtol=0)
    assert (
        len(api.scanned(out).differences)
        == len(found)
        == json.loads(mk("scan", "--report", out, "--json").out)["layouts"]
    )


def test_combinations_of_the_best(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first combination has the best block of the selection part, which alone chooses.

    All rounds measure with one base, which is loaded and checked once.
    """
    out, started, start = tmp_path / "found", list[Job](), Job.start

    def note(job: Job, warn: Warn) -> Measure:
        started.append(job)
        return start(job, warn)

    monkeypatch.setattr(Job, "start", note)
    report = api.scan(model=base, text=text, combine=2, out=out)
    assert len(started) == 1
    blocks = [row for row, each in enumerate(report.candidates) if each.space == "blocks"]
    selection = report.analysis.split.selection
    best = max(blocks, key=lambda row: report.differences[row, selection].mean())
    start, stop = report.candidates[best].cell or (0, 0)
    first = report.candidates[len(blocks)].directive
    assert f"{stop}, {start}:" in first
    assert report.analysis.tried == len(report.candidates) > len(blocks)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--combine", "1"), "--combine"),
        (("--items", "missing.jsonl"), "missing.jsonl"),
        (("--combine", "9"), "8 layers"),
        (("--combine", "2", "--space", "drops"), "space blocks"),
        (("--tokens", "0"), "--tokens"),
        (("--tokens", "40"), "sequences"),
        (("--top", "0"), "--top"),
        (("--seed", "-1"), "--seed"),
        (("--dtype", "bogus"), "--dtype"),
        (("--device", "bogus"), "--device"),
        (("--space", "bogus"), "--space"),
        (("--text", "missing.txt"), "missing.txt"),
        (("missing.txt",), "missing.txt"),
        ((__file__, "--space", "drops"), "--space"),
        (("--items", __file__), "line 1"),
        (("--report", "there", "--out", "here"), "--out"),
        (("--report", "there", "--top", "3"), "--top"),
        (("--report", "there", "--for", "training"), "--for"),
    ],
)
def test_wrong_options(words: tuple[str, ...], named: str, mk: Cli, base: Path) -> None:
    """A wrong option is one error that names it."""
    model = () if "--report" in words else ("--model", base)
    result = mk("scan", *words, *model)
    assert (result.status, result.out) == (2, ""), result.err
    assert named in result.err


def test_a_model_that_cannot_be_loaded(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a second model cannot be loaded, that is an error, and its layouts are measured later."""
    from mergekit_interleave.virtual import sources

    other, loaded = make_llama(tmp_path / "other"), sources.load_source
    (tmp_path / "plans.txt").write_text(
        f"repeat: 1:3\nmodels: {{a: {base}, b: {other}}}, layout: [a 0:5, b 3:8]"
    )
    how = {"candidates": tmp_path / "plans.txt", "model": base, "text": text}

    def broken(checkpoint: Any, *words: Any) -> Any:
        if checkpoint.path == other:
            with meta_model.transformers_errors("load the model"):
                raise OSError("Input/output error")
        return loaded(checkpoint, *words)

    monkeypatch.setattr(sources, "load_source", broken)
    with pytest.raises(CheckpointError, match="Input/output error"):
        api.scan(**how, out=tmp_path / "found")
    monkeypatch.undo()
    assert np.isfinite(api.scan(**how, out=tmp_path / "found").differences).all()


def test_a_changed_config(base: Path, text: Path, tmp_path: Path) -> None:
    """A model whose config.json changed is another model, though its weights are the same."""
    place = shutil.copytree(base, tmp_path / "base")
    how = {"model": place, "text": text, "space": "drops", "out": tmp_path / "found"}
    api.scan(**how)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(DirectiveError, match="another model"):
        api.scan(**how)


def test_a_changed_second_model(base: Path, text: Path, tmp_path: Path) -> None:
    """A stack whose second model changed meanwhile is not continued."""
    other = make_llama(tmp_path / "other")
    directive = f"models: {{a: {base}, b: {other}}}, layout: [a 0:5, b 3:8]"
    (tmp_path / "plans.txt").write_text(directive)
    how = {"candidates": tmp_path / "plans.txt", "model": base, "text": text}
    api.scan(**how, out=tmp_path / "found")
    zoo.finetune(other, tmp_path / "changed")
    shutil.copytree(tmp_path / "changed", other, dirs_exist_ok=True)
    with pytest.raises(DirectiveError, match="another model"):
        api.scan(**how, out=tmp_path / "found")


def test_the_map_of_windows(text: Path, tmp_path: Path) -> None:
    """Each layout of the space `windows` has its cell, by the size and stride of its windows."""
    out, base = tmp_path / "found", make_llama(tmp_path / "base", layers=4)
    api.scan(model=base, text=text, space="windows", out=out)
    picture = (out / "scan.svg").read_text()
    for line in lines_of(out):
        size, stride = re.findall(r"\d+", line["directive"])[:2]
        assert line["cell"] == [int(size), int(stride)]
        assert f"windows of {size} layers, every {stride} layers" in picture


def test_equal_items(base: Path, items: Path, tmp_path: Path) -> None:
    """Equal items are measured once, because both halves would have them."""
    lines = items.read_text().splitlines()
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(lines * 4))
    report = api.scan(model=base, items=file, space="drops")
    assert len(report.tokens) == len(lines)
    assert str(3 * len(lines)) in report.warnings[0]


def test_long_items(mk: Cli, tmp_path: Path) -> None:
    """An item that is longer than the model's positions is an error, whatever the key's name is."""
    source = zoo.save("gpt2", tmp_path / "gpt2")
    tokenizer(128).save_pretrained(source)
    item = {"prompt": " ".join(["word5"] * 2000), "answer": " word6"}
    (tmp_path / "items.jsonl").write_text(json.dumps(item))
    result = mk("scan", "--model", source, "--items", tmp_path / "items.jsonl")
    assert (result.status, "line 1" in result.err, "positions" in result.err) == (2, True, True)


def test_a_foreign_tokenizer(mk: Cli, text: Path, tmp_path: Path) -> None:
    """A tokenizer with more tokens than the model has embeddings belongs to another model."""
    source = make_llama(tmp_path / "base", vocab_size=20)
    for words in (("--space", "drops"), ("--for", "training")):
        result = mk("scan", *words, "--model", source, "--text", text)
        assert (result.status, "tokenizer" in result.err) == (2, True)


@pytest.mark.parametrize(
    ("line", "status"), [("bogus: 3", 2), ("repeat: 4:99", 1), ("model: other, append: 1", 2)]
)
def test_a_wrong_line(line: str, status: int, mk: Cli, base: Path, tmp_path: Path) -> None:
    """A directive that `run` refuses, or that names another model, is an error with its line."""
    (tmp_path / "plans.txt").write_text(f"# tried\n\ndrop: 1:2\n{line}\n")
    result = mk("scan", tmp_path / "plans.txt", "--model", base)
    assert (result.status, "plans.txt, line 4" in result.err) == (status, True)


def test_another_scan(base: Path, text: Path, tmp_path: Path) -> None:
    """Results of another model, text or space are not continued."""
    out, how = tmp_path / "found", {"text": text, "space": "layers", "tokens": 1300}
    (tmp_path / "one.txt").write_text("drop: 1:2")
    api.scan(tmp_path / "one.txt", model=base, text=text, tokens=1300, out=out)
    other = make_llama(tmp_path / "other")
    for changed in ({"model": other}, {"tokens": 1299}, {"space": "drops"}):
        with pytest.raises(DirectiveError, match="found"):
            api.scan(**{"model": base, **how, **changed}, out=out)
    with pytest.raises(CheckpointError, match="nowhere"):
        api.scanned(tmp_path / "nowhere")


def test_an_unfinished_scan(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interrupt, what was measured is kept, and the same call measures only the rest."""
    from mergekit_interleave.scanning.measure import Measure

    how = {"model": base, "text": text, "tokens": 1300, "space": "blocks"}
    api.scan(**how, out=tmp_path / "whole")
    calls, scores = [], Measure.scores

    def stopping(self: Measure, *words: Any) -> Any:
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scores(self, *words)

    monkeypatch.setattr("mergekit_interleave.commands.scan.BATCH", 512)
    monkeypatch.setattr(Measure, "scores", stopping)
    api_out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        api.scan(**how, out=api_out)
    with pytest.raises(DirectiveError, match="not measured"):
        api.scanned(api_out)
    api.scan(**how, out=api_out)
    assert len(calls) == 3  # the one that was interrupted is made again
    for line, other in zip(lines_of(api_out), lines_of(tmp_path / "whole"), strict=True):
        assert line["log_likelihood"] == pytest.approx(other["log_likelihood"], abs=1e-3)
