"""`mk-interleave sample`: what the base and deeper models say, with nothing written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from harness import Cli, make_llama, tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import mergekit_interleave as api
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.virtual import sampling

WORDS = " ".join(f"word{number}" for number in range(3, 40))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama of 8 layers with a tokenizer."""
    return make_llama(tmp_path_factory.mktemp("sample") / "base")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a file with a text that is longer than the context of the base."""
    file = tmp_path / "text.txt"
    file.write_text(" ".join([WORDS] * 5))
    return file


def found(mk: Cli, *words: object) -> list[dict[str, Any]]:
    """Run `sample --json`, and return its models."""
    result = mk("sample", *words, "--json")
    assert result.status == 0, result.err
    models: list[dict[str, Any]] = json.loads(result.out)["models"]
    return models


def test_what_models_say(mk: Cli, base: Path, text: Path, tmp_path: Path) -> None:
    """Text and perplexity are those of the base, and of the models that `run` writes."""
    before = {*tmp_path.iterdir()}
    plans = ("repeat: [2, 5]", "interleave: every 4")
    words = ("--model", base, "--prompt", "word5 word6", "--text", text, "--max-new-tokens", 8)
    models = found(mk, *plans, *words)
    assert {*tmp_path.iterdir()} == before
    assert [model["layers"] for model in models] == [8, 11, 10]
    words_of = AutoTokenizer.from_pretrained(base)
    prompt = words_of("word5 word6", return_tensors="pt").input_ids
    for number, plan in enumerate((None, *plans)):
        path = base
        if plan is not None:
            path = tmp_path / str(number)
            api.run(plan, path, model=base)
        model = AutoModelForCausalLM.from_pretrained(path)
        tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        expected = words_of.decode(tokens, skip_special_tokens=True)
        assert models[number]["continuations"][0]["text"] == expected
        assert models[number]["perplexity"]["value"] == pytest.approx(
            _perplexity(model, words_of(text.read_text(), return_tensors="pt").input_ids)
        )
    # New layers that are identities change nothing.
    assert models[2]["perplexity"] == models[0]["perplexity"]


def _perplexity(model: Any, tokens: torch.Tensor) -> float:
    """Return the perplexity on tokens, in windows that overlap by one token."""
    losses = []
    width = model.config.max_position_embeddings
    for start in range(0, tokens.shape[1] - 1, width - 1):
        part = tokens[:, start : start + width]
        with torch.no_grad():
            loss = model(part, labels=part).loss
        losses += [float(loss)] * (part.shape[1] - 1)
    return math.exp(sum(losses) / len(losses))


def test_the_number_of_tokens(mk: Cli, base: Path, text: Path) -> None:
    """Every token of the text but the first is predicted once."""
    tokens = len(AutoTokenizer.from_pretrained(base)(text.read_text()).input_ids)
    for model in found(mk, "append: 1", "--model", base, "--text", text):
        assert model["perplexity"]["tokens"] == tokens - 1


def test_memory(mk: Cli, base: Path, text: Path) -> None:
    """The base has its weights, and repeated layers have none of their own."""
    first, second = found(mk, "repeat: [2, 5]", "--model", base, "--text", text)
    stored = sum(
        tensor.nbytes for tensor in AutoModelForCausalLM.from_pretrained(base).parameters()
    )
    assert (first["bytes"], second["bytes"]) == (stored, 0)


def test_a_file_of_directives(mk: Cli, base: Path, text: Path, tmp_path: Path) -> None:
    """A file may hold one directive per line, or one directive."""
    several, one = tmp_path / "several.txt", tmp_path / "one.yml"
    several.write_text("# tried\nrepeat: [2, 5]\n\ninterleave: every 4, zero: none\n")
    one.write_text("interleave: every 4\nzero: none\n")
    words = ("--model", base, "--text", text)
    names = [model["name"] for model in found(mk, several, *words)]
    assert names == ["base", "repeat: [2, 5]", "interleave: every 4, zero: none"]
    assert [model["name"] for model in found(mk, one, *words)] == [names[0], names[2]]
    assert len(found(mk, several, one, *words)) == 4


def test_flags(mk: Cli, base: Path, text: Path) -> None:
    """Flags make a directive, as for other commands."""
    _, model = found(mk, "--every", 2, "--model", base, "--text", text)
    assert (model["name"], model["layers"]) == ("interleave: every 2", 12)


def test_sampling(mk: Cli, base: Path) -> None:
    """A seed makes sampled text repeatable, and another seed changes it."""
    words = ("append: 1", "--model", base, "--prompt", "word5", "--temperature", 5)
    one, same, other = (
        found(mk, *words, "--seed", seed)[0]["continuations"][0]["text"] for seed in (1, 1, 2)
    )
    assert one == same != other


def test_the_report(mk: Cli, base: Path, text: Path) -> None:
    """Each prompt is followed by what every model wrote, and a table ends the report."""
    result = mk(
        "sample", "append: 1", "--model", base, "--text", text, "--prompt", "word5", "--prompt",
        "word6", "--max-new-tokens", 3,
    )  # fmt: skip
    assert result.status == 0, result.err
    assert result.err == ""
    lines = result.out.splitlines()
    assert [line for line in lines if line.startswith("prompt: ")] == [
        "prompt: word5",
        "prompt: word6",
    ]
    assert sum(line.startswith("--- base") for line in lines) == 2
    assert [line.split("  ")[-1] for line in lines[-2:]] == ["base", "append: 1"]


def test_chat(mk: Cli, base: Path, tmp_path: Path) -> None:
    """`--chat` applies the chat template; without one, it is an error."""
    words = ("append: 1", "--prompt", "word5", "--chat", "--max-new-tokens", 4)
    result = mk("sample", *words, "--model", base)
    assert (result.status, "--chat" in result.err) == (2, True)
    talking = make_llama(tmp_path / "base")
    chatting = AutoTokenizer.from_pretrained(talking)
    chatting.chat_template = "word7 word8 {{ messages[0].content }} word9"
    chatting.save_pretrained(talking)
    said = found(mk, *words, "--model", talking)[0]["continuations"][0]["text"]
    plain = found(
        mk, "append: 1", "--prompt", "word7 word8 word5 word9", "--max-new-tokens", 4, "--model",
        talking,
    )  # fmt: skip
    assert said == plain[0]["continuations"][0]["text"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "--prompt"),
        (("--prompt", " "), "prompt"),
        (("--text", "missing.txt"), "missing.txt"),
        (("--prompt", "word5", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("--prompt", "word5", "--max-new-tokens", "many"), "--max-new-tokens"),
        (("--prompt", "word5", "--temperature", "-1"), "--temperature"),
        (("--prompt", "word5", "--temperature", "1e-40"), "--temperature"),
        (("--prompt", "word5", "--seed", "0.5"), "--seed"),
        (("--prompt", "word5", "--seed", "18446744073709551616"), "--seed"),
        (("--text", __file__, "--chat"), "--chat"),
        (("drop: [2, 4]", "--every", "2", "--prompt", "word5"), "growth flag"),
        (("drop: [2, 4], dtype: float16", "--prompt", "word5"), "float16"),
    ],
)
def test_wrong_options(words: tuple[str, ...], named: str, mk: Cli, base: Path) -> None:
    """A missing, empty or malformed option is one error that names it."""
    result = mk("sample", "append: 1", "--model", base, *words)
    assert (result.status, result.out) == (2, "")
    assert named in result.err


def test_a_short_text(mk: Cli, base: Path, tmp_path: Path) -> None:
    """A text of one token predicts nothing."""
    (tmp_path / "short.txt").write_text("word5")
    result = mk("sample", "append: 1", "--model", base, "--text", tmp_path / "short.txt")
    assert (result.status, "short.txt" in result.err) == (2, True)


def test_no_tokenizer(mk: Cli, text: Path, tmp_path: Path) -> None:
    """A base without a tokenizer cannot read the text."""
    silent = make_llama(tmp_path / "silent")
    for file in silent.glob("token*"):
        file.unlink()
    result = mk("sample", "append: 1", "--model", silent, "--text", text)
    assert (result.status, "tokenizer" in result.err) == (1, True)


def test_a_model_that_predicts_no_text(mk: Cli, base: Path, text: Path, tmp_path: Path) -> None:
    """A classifier neither continues a prompt nor has a perplexity."""
    classifier = AutoModelForSequenceClassification.from_pretrained(base)
    classifier.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "classifier")
    words = ("--prompt", "word5", "--text", text)
    result = mk("sample", "append: 1", "--model", tmp_path / "classifier", *words)
    assert (result.status, "SequenceClassification" in result.err) == (1, True)


def test_a_foreign_tokenizer(mk: Cli, text: Path, tmp_path: Path) -> None:
    """A tokenizer with more tokens than the model has embeddings belongs to another model."""
    source = make_llama(tmp_path / "base", vocab_size=20)
    for words in (("--prompt", "word5 word30"), ("--text", text)):
        result = mk("sample", "append: 1", "--model", source, *words)
        assert (result.status, "tokenizer" in result.err) == (2, True)


def test_the_last_position(mk: Cli, tmp_path: Path) -> None:
    """Text beyond the last position that a model has an embedding for is refused."""
    source = zoo.save("gpt2", tmp_path / "gpt2")
    tokenizer(128).save_pretrained(source)
    words = ("append: 1", "--model", source, "--prompt", "word5")
    result = mk("sample", *words, "--max-new-tokens", 200)
    assert (result.status, "positions" in result.err) == (2, True)
    assert found(mk, *words, "--max-new-tokens", 3)


def test_a_dtype(mk: Cli, base: Path, text: Path, tmp_path: Path) -> None:
    """A directive with a dtype is measured in it, and so is the base."""
    plan = "repeat: [2, 5], dtype: bfloat16"
    api.run(plan, tmp_path / "out", model=base)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokens = AutoTokenizer.from_pretrained(base)(text.read_text(), return_tensors="pt").input_ids
    _, grown = found(mk, plan, "--model", base, "--text", text)
    assert grown["perplexity"] == sampling.perplexity(written, tokens).as_dict()


def test_generation_settings(base: Path) -> None:
    """The model's own penalties and limits on generation are not applied, and stay its own."""
    loaded = AutoModelForCausalLM.from_pretrained(base)
    plain, _ = api.sample("append: 1", base=loaded, prompt="word5").models
    loaded.generation_config.repetition_penalty = 9.0
    loaded.generation_config.max_length = 7
    own, _ = api.sample("append: 1", base=loaded, prompt="word5").models
    assert own.continuations[0].text == plain.continuations[0].text
    assert loaded.generation_config.repetition_penalty == 9.0


def test_training_mode(text: Path, tmp_path: Path) -> None:
    """A base in training mode is measured without dropout, and left in its mode."""
    source = zoo.save("gpt2", tmp_path / "gpt2")
    tokenizer(128).save_pretrained(source)
    loaded = AutoModelForCausalLM.from_pretrained(source).train()
    loaded.lm_head.eval()
    one, grown = api.sample("interleave: every 4", base=loaded, text=text).models
    assert one.perplexity == grown.perplexity
    assert (loaded.training, loaded.lm_head.training) == (True, False)


def test_not_a_number(mk: Cli, base: Path, text: Path, tmp_path: Path) -> None:
    """A perplexity that is not a number is null in JSON, which has no such number."""
    broken = AutoModelForCausalLM.from_pretrained(base)
    broken.lm_head.weight.data[:] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "broken")
    models = found(mk, "append: 1", "--model", tmp_path / "broken", "--text", text)
    assert [model["perplexity"]["value"] for model in models] == [None, None]


def test_a_wrong_line(mk: Cli, base: Path, text: Path, tmp_path: Path) -> None:
    """In a file with one directive per line, the error names the line."""
    (tmp_path / "list.txt").write_text("repeat: [2, 5]\n\nbogus: 3\ndrop: [2, 4]\n")
    result = mk("sample", tmp_path / "list.txt", "--model", base, "--text", text)
    assert (result.status, "list.txt, line 3" in result.err) == (2, True)


@pytest.mark.parametrize("wrong", [{"prompt": [1]}, {"temperature": None}, {"text": "a\0b"}])
def test_wrong_values(wrong: dict[str, Any], base: Path) -> None:
    """In Python, a value of another type is refused, too."""
    with pytest.raises(DirectiveError):
        api.sample("append: 1", model=base, **{"prompt": "word5", **wrong})


def test_several_bases(mk: Cli, base: Path, text: Path, tmp_path: Path) -> None:
    """Directives that grow different models have no common base."""
    other = make_llama(tmp_path / "other")
    plans = [f"model: {path}, append: 1" for path in (base, other)]
    result = mk("sample", *plans, "--text", text)
    assert (result.status, str(other) in result.err) == (2, True)


def test_a_loaded_base(base: Path) -> None:
    """In Python, a base that is loaded already is used, and stays as it is."""
    loaded = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    report = api.sample("append: 1", base=loaded, prompt="word5", max_new_tokens=3)
    assert [model.layers for model in report.models] == [8, 9]
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())
    with pytest.raises(DirectiveError, match="base"):
        api.sample("append: 1", model="nowhere", base=7, prompt="word5")


def test_the_second_model_of_a_stack(base: Path, tmp_path: Path) -> None:
    """A loaded base must be the model of the first layer, which the report calls the base."""
    other = make_llama(tmp_path / "other")
    plan = {"models": {"a": str(other), "b": str(base)}, "layout": ["a 0:5", "b 3:8"]}
    with pytest.raises(DirectiveError, match=str(base)):
        api.sample(plan, base=AutoModelForCausalLM.from_pretrained(base), prompt="word5")
