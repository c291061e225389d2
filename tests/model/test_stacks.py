"""Stacks of several models: what must agree comes from what their class computes."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zoo
from harness import Cli, load_tensors, make_llama, set_keys
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_interleave.checkpoint import computation
from mergekit_interleave.errors import RefusedError


def logits(model: Any) -> torch.Tensor:
    """Return the logits of some tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(zoo.toys.tokens()).logits
    return found


def layout(a: Path, b: Path, steps: str = "a 0:5, b 3:8", **keys: str) -> str:
    """Return a directive that stacks two models."""
    return "\n".join(
        [
            f"models: {{a: {a}, b: {b}}}",
            f"layout: [{steps}]",
            *(f"{k}: {v}" for k, v in keys.items()),
        ]
    )


def words_of(error: str, *models: Path) -> set[str]:
    """Return the words of an error that names some models, without their paths."""
    for model in models:
        assert str(model) in error
        error = error.replace(str(model), "")
    return {*re.findall(r"[\w.']+", error)}


@pytest.fixture(params=["qwen2", "gemma3_text"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Return a toy and a finetune of it, of a type with windows in some layers."""
    zoo.quiet()
    base = zoo.save(request.param, tmp_path / "a")
    return base, zoo.finetune(base, tmp_path / "b")


TYPES = [
    "qwen3", "gemma2", "phi3", "qwen3_moe", "qwen3_5_text", "gemma3", "lfm2",
    pytest.param("deepseek_v4", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_a_stack_of_two_finetunes(name: str, tmp_path: Path) -> None:
    """The stack has the logits and the text of a model whose layers were assigned by hand.

    If `gen` accepts it, so has the model that mergekit-yaml and `fix-config` write.
    """
    zoo.quiet()
    outcome = zoo.stack(zoo.save(name, tmp_path / "base"), tmp_path)
    assert (outcome.result, outcome.hint) == ("exact", ""), outcome


@pytest.mark.parametrize("engine", ["mergekit", "stream"])
def test_both_engines(mk: Cli, pair: tuple[Path, Path], tmp_path: Path, engine: str) -> None:
    """Either engine writes the embeddings of the first model, and norm and head of the last."""
    a, b = pair
    result = mk("run", "-", tmp_path / "out", "--engine", engine, stdin=layout(a, b))
    assert result.status == 0, result.err
    one, other, out = map(load_tensors, (a, b, tmp_path / "out"))
    embeddings, ends = "model.embed_tokens.weight", {"model.norm.weight", "lm_head.weight"}
    assert torch.equal(out[embeddings], one[embeddings])
    assert ends & out.keys() == ends & other.keys()  # Gemma's head is its embeddings
    for name in ends & out.keys():
        assert torch.equal(out[name], other[name]), name
    tensor = "model.layers.{}.mlp.up_proj.weight".format
    assert torch.equal(out[tensor(5)], other[tensor(3)])
    verified = mk("verify", tmp_path / "out", "--against", a, "--against", b)
    assert verified.status == 0, verified.err


INERT = {
    "eos_token_id": 7,
    "bos_token_id": 9,
    "pad_token_id": 3,
    "use_cache": False,
    "initializer_range": 0.5,
    "attention_dropout": 0.25,
    "max_position_embeddings": 4096,
    "transformers_version": "4.40.0",
    "_name_or_path": "org/other",
    "id2label": {"0": "x", "1": "y"},
}


def test_settings_that_change_no_computation_may_differ(
    mk: Cli, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Token ids, dropout, cache and the like do not prevent a stack."""
    a, b = pair
    set_keys(b / "config.json", **INERT)
    result = mk("run", "-", tmp_path / "out", stdin=layout(a, b))
    assert result.status == 0, result.err


@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", 0.01), ("sliding_window", 12), ("rope_theta", 5e5), ("hidden_act", "relu")],
)
def test_settings_that_change_the_computation_must_agree(
    mk: Cli, pair: tuple[Path, Path], tmp_path: Path, key: str, value: object
) -> None:
    """The error names the setting and both values; allow_crimes=true stacks nevertheless."""
    a, b = pair
    config = json.loads((b / "config.json").read_text())
    if key == "rope_theta":
        rope = copy.deepcopy(config["rope_parameters"])
        for part in rope.values() if "full_attention" in rope else (rope,):
            part["rope_theta"] = value
        set_keys(b / "config.json", rope_parameters=rope)
    else:
        gemma = key == "hidden_act" and "hidden_activation" in config
        set_keys(b / "config.json", **{"hidden_activation" if gemma else key: value})
    result = mk("run", "-", tmp_path / "out", stdin=layout(a, b))
    assert result.status == 1
    error, hint = result.err.splitlines()
    named = words_of(error, a, b)
    assert repr(value) in named
    assert any(key in word for word in named)
    assert "allow_crimes=true" in hint
    assert not (tmp_path / "out").exists()
    allowed = mk(
        "run", "-", tmp_path / "out", "--mergekit", "allow_crimes=true", stdin=layout(a, b)
    )
    assert allowed.status == 0, allowed.err


def test_shapes_must_agree_and_no_hint_denies_it(mk: Cli, tmp_path: Path) -> None:
    """Layers of other shapes cannot be stacked, and allow_crimes is not offered."""
    a = make_llama(tmp_path / "a")
    b = make_llama(tmp_path / "b", intermediate_size=64)
    result = mk("run", "-", tmp_path / "out", stdin=layout(a, b))
    assert result.status == 1
    assert {"intermediate_size", "64", "48"} <= words_of(result.err, a, b)
    assert "allow_crimes" not in result.err


def test_models_of_different_depths(mk: Cli, tmp_path: Path) -> None:
    """The depth and the lists of layers may differ, because they move with the layers."""
    zoo.quiet()
    a = zoo.save("qwen2", tmp_path / "a")
    other = zoo.toys.config("qwen2")
    other.num_hidden_layers, other.layer_types = 4, ["sliding_attention", "full_attention"] * 2
    zoo.toys.animated(lambda: AutoModelForCausalLM.from_config(other)).save_pretrained(
        tmp_path / "b"
    )
    result = mk(
        "run", "-", tmp_path / "out", stdin=layout(a, tmp_path / "b", "a 0:3, b 0:4, a 6:8")
    )
    assert result.status == 0, result.err
    first, second, out = (
        json.loads((path / "config.json").read_text())
        for path in (a, tmp_path / "b", tmp_path / "out")
    )
    kinds = first["layer_types"]
    assert out["layer_types"] == [*kinds[:3], *second["layer_types"], *kinds[6:]]


def test_types_of_the_same_computation(mk: Cli, tmp_path: Path) -> None:
    """A Mistral without a window computes what a Llama does, so both can be stacked."""
    a = make_llama(tmp_path / "a")
    b = make_llama(tmp_path / "b", mistral=True, sliding_window=None, rms_norm_eps=1e-6)
    result = mk("run", "-", tmp_path / "out", stdin=layout(a, b))
    assert result.status == 0, result.err
    set_keys(b / "config.json", sliding_window=16)
    result = mk("run", "-", tmp_path / "again", stdin=layout(a, b))
    assert result.status == 1
    assert {"'mistral'", "'llama'"} <= words_of(result.err, a, b)


@pytest.mark.parametrize(
    ("name", "named"),
    [("zamba", r"\bshared_transf\b"), ("beam", r"\blayer 5\b.*\blayer 3\b")],
)
def test_layers_that_compute_something_else_at_their_new_place(
    mk: Cli, tmp_path: Path, name: str, named: str
) -> None:
    """A class that shares tensors among layers, or computes with an index, is run and refused."""
    zoo.quiet()
    a = zoo.save(name, tmp_path / "a")
    b = zoo.finetune(a, tmp_path / "b")
    result = mk("run", "-", tmp_path / "out", stdin=layout(a, b))
    assert result.status == 1
    assert re.search(named, result.err), result.err
    assert not (tmp_path / "out").exists()


def test_gen_refuses_what_mergekit_would_take_from_the_wrong_model(mk: Cli, tmp_path: Path) -> None:
    """Mergekit takes LFM2's final norm from the first slice; a stack that ends there is fine."""
    zoo.quiet()
    a = zoo.save("lfm2", tmp_path / "a")
    b = zoo.finetune(a, tmp_path / "b")
    result = mk("gen", "-", stdin=layout(a, b))
    assert (result.status, result.out) == (1, "")
    assert "`mk-interleave run`" in result.err
    assert mk("gen", "-", stdin=layout(a, b, "a 0:3, b 2:6, a 5:8")).status == 0


def test_gen_names_settings_that_differ(mk: Cli, tmp_path: Path) -> None:
    """`gen` loads no class, so it only names what differs, and the command that checks it."""
    a, b = make_llama(tmp_path / "a"), make_llama(tmp_path / "b")
    assert mk("gen", "-", stdin=layout(a, b)).err == ""
    set_keys(b / "config.json", rms_norm_eps=0.1, eos_token_id=5)
    result = mk("gen", "-", stdin=layout(a, b))
    assert result.status == 0
    assert "rms_norm_eps" in result.err
    assert "eos_token_id" not in result.err
    assert "`mk-interleave plan`" in result.err
    assert mk("plan", "-", stdin=layout(a, b)).status == 1


def settings(config: dict[str, Any], place: str = "") -> Iterator[tuple[str, object]]:
    """Yield the keys of a config, with the values to try instead."""
    other = {"silu": "gelu", "gelu_pytorch_tanh": "silu", "gelu": "relu", "gelu_new": "relu"}
    for key, value in config.items():
        if isinstance(value, dict) and key != "id2label":
            yield from settings(value, f"{place}{key}.")
        elif isinstance(value, bool):
            yield place + key, not value
        elif isinstance(value, int):
            yield place + key, value + 1 if value < 3 else value * 2
        elif isinstance(value, float):
            yield place + key, value * 1.5 + 0.125
        elif isinstance(value, str) and value in other:
            yield place + key, other[value]


def changed(config: Any, key: str, value: object) -> Any:
    """Return a config object with another value of a key."""
    values = config.to_dict()
    *outer, last = key.split(".")
    part = values
    for name in outer:
        part = part[name]
    part[last] = value
    return type(config).from_dict(values)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma2",
        "qwen3_moe",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "granite", "gpt_oss")),
    ],
)
def test_a_setting_that_changes_logits_changes_the_record(name: str) -> None:
    """Each setting is changed in turn: other logits mean another record."""
    zoo.quiet()
    config, model = zoo.toys.config(name), zoo.toys.build(name)
    before, expected = computation.record(zoo.toys.config(name), 8), logits(model)
    moved = []
    for key, value in settings(config.to_dict()):
        try:
            other = AutoModelForCausalLM.from_config(changed(config, key, value)).eval().float()
            other.load_state_dict(model.state_dict())
            same = torch.equal(expected, logits(other))
            after = computation.record(changed(config, key, value), 8)
        except Exception:  # noqa: BLE001, S112 - no such model, or one of other shapes
            continue
        assert same or before != after, key
        moved += [] if same else [key]
    assert any("rope_theta" in key for key in moved)
    assert any("eps" in key for key in moved)
    assert "max_position_embeddings" not in moved


def test_a_class_that_cannot_be_run_without_weights(mk: Cli, tmp_path: Path) -> None:
    """Then every setting must agree, apart from token ids."""
    zoo.quiet()
    with pytest.raises(RefusedError):
        computation.record(zoo.toys.config("jetmoe"), 8)
    a = zoo.save("jetmoe", tmp_path / "a")
    b = zoo.finetune(a, tmp_path / "b")
    set_keys(b / "config.json", eos_token_id=5)
    assert mk("run", "-", tmp_path / "out", stdin=layout(a, b)).status == 0
    set_keys(b / "config.json", initializer_range=0.5)
    result = mk("run", "-", tmp_path / "again", stdin=layout(a, b))
    assert result.status == 1
    assert {"initializer_range", "0.5"} <= words_of(result.err, a, b)


class TestVocabularies:
    """Models with different vocabularies."""

    @pytest.fixture
    def two(self, tmp_path: Path) -> tuple[Path, Path]:
        """Return a model with 64 tokens, and one with 67, three of which are new."""
        a = make_llama(tmp_path / "a")
        b = make_llama(tmp_path / "b", vocab_size=67)
        tokenizer = AutoTokenizer.from_pretrained(b)
        tokenizer.add_tokens(["<x>", "<y>", "<z>"])
        tokenizer.save_pretrained(b)
        return a, b

    def test_both_ends_from_one_model(
        self, mk: Cli, two: tuple[Path, Path], tmp_path: Path
    ) -> None:
        """Then the other vocabulary does not matter."""
        a, b = two
        result = mk("run", "-", tmp_path / "out", stdin=layout(a, b, "a 0:4, b 2:6, a 4:8"))
        assert result.status == 0, result.err
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["vocab_size"], config["num_hidden_layers"]) == (64, 12)

    def test_ends_from_two_models(self, mk: Cli, two: tuple[Path, Path], tmp_path: Path) -> None:
        """They are refused, and each of the two hints works."""
        a, b = two
        result = mk("run", "-", tmp_path / "out", stdin=layout(a, b))
        assert result.status == 1
        assert {"vocab_size", "67", "64"} <= words_of(result.err, a, b)
        assert "`tokenizer_source: union`" in result.err.splitlines()[-1]
        for name, text in (
            ("one", layout(a, b, "a 0:4, b 2:6, a 6:8")),
            ("union", layout(a, b, tokenizer_source="union")),
        ):
            followed = mk("run", "-", tmp_path / name, stdin=text)
            assert followed.status == 0, followed.err

    @pytest.mark.parametrize("source", ["union", "base", "b"])
    def test_a_tokenizer_for_both(
        self, mk: Cli, two: tuple[Path, Path], tmp_path: Path, source: str
    ) -> None:
        """The rows are in the order of the new tokenizer, and the logits are those by hand."""
        a, b = two
        keys = {"tokenizer_source": source, "base_model": "a"}
        out = tmp_path / "out"
        result = mk("run", "-", out, stdin=layout(a, b, **keys))
        assert result.status == 0, result.err
        rows = 64 if source == "base" else 67
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert len(tokenizer) == rows
        assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
        tensors = load_tensors(out)
        one, other = load_tensors(a), load_tensors(b)
        embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
        assert tensors[embeddings].shape[0] == tensors[head].shape[0] == rows
        expected = AutoModelForCausalLM.from_pretrained(a, dtype=torch.float32)
        expected.resize_token_embeddings(rows)
        layers = AutoModelForCausalLM.from_pretrained(b, dtype=torch.float32).model.layers
        expected.model.layers.extend(layers[3:8])
        del expected.model.layers[5:8]
        for index, layer in enumerate(expected.model.layers):
            layer.self_attn.layer_idx = index
        expected.config.num_hidden_layers = 10
        with torch.no_grad():
            expected.model.embed_tokens.weight[:64] = one[embeddings]
            expected.model.norm.weight.copy_(other["model.norm.weight"])
            expected.lm_head.weight.copy_(other[head][:rows])
        tokens = torch.arange(3, 60).reshape(1, -1)  # both tokenizers have these
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            assert torch.allclose(found(tokens).logits, expected(tokens).logits, atol=1e-4)
        verified = mk("verify", out, "--against", a, "--against", b)
        assert verified.status == 0, verified.err

    def test_the_recipe_of_mergekit_yaml(
        self, mk: Cli, two: tuple[Path, Path], tmp_path: Path
    ) -> None:
        """The YAML form with `tokenizer_source` is accepted, too."""
        a, b = two
        sources = [
            {"sources": [{"model": str(a), "layer_range": [0, 5]}]},
            {"sources": [{"model": str(b), "layer_range": [3, 8]}]},
        ]
        text = {"slices": sources, "merge_method": "passthrough", "tokenizer_source": "union"}
        result = mk("run", "-", tmp_path / "out", stdin=yaml.safe_dump(text))
        assert result.status == 0, result.err
