"""The data of two families agrees with the models that transformers builds."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import zoo
from harness import load_tensors, make_llama
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2CLS, ACT2FN

from mergekit_interleave.architectures import family as families
from mergekit_interleave.directive.scale import zeroed_scales

FAMILIES = ["llama", "mistral"]


def last_block(model: Any) -> Any:
    """Return the input and the output of the last layer for some tokens."""
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[-1]

    def look(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen["in"] = args[0] if args else kwargs["hidden_states"]
        seen["out"] = output[0] if isinstance(output, tuple) else output

    handle = layer.register_forward_hook(look, with_kwargs=True)
    model(torch.arange(3, 13).reshape(1, 10))
    handle.remove()
    return seen["in"], seen["out"]


def family_of(name: str) -> families.Family:
    """Return a family from the data."""
    family = families.family_of(name)
    assert family is not None
    return family


def writers_of(family: families.Family, path: Path, index: int) -> list[str]:
    """Return the residual writers among the stored tensors of a layer."""
    prefix = f"{family.layer_prefix}.{index}."
    return [n for n in load_tensors(path) if n.startswith(prefix) and family.writes(n)]


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a family and a tiny checkpoint of it."""
    path = tmp_path_factory.mktemp("families") / request.param
    make_llama(path, layers=2, mistral=request.param == "mistral")
    return family_of(request.param), path


def test_the_names_are_those_of_real_checkpoints(built: tuple[families.Family, Path]) -> None:
    """Every tensor belongs to a layer, `before_layers` or `after_layers`."""
    family, path = built
    names = set(load_tensors(path))
    layers = {name for name in names if name.startswith(f"{family.layer_prefix}.")}
    assert names - layers == {*family.before_layers, *family.after_layers}
    for index in range(2):
        assert len(writers_of(family, path, index)) == 2


def test_zeroing_the_writers_makes_an_identity_and_needs_each(
    built: tuple[families.Family, Path],
) -> None:
    """A layer returns its input exactly if all its residual writers are zero.

    Each zeroed tensor still gets a gradient, so that it can be trained.
    """
    family, path = built
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tensors = dict(model.named_parameters())
    writers = writers_of(family, path, 1)
    kept = {name: tensors[name].detach().clone() for name in writers}
    for left in [None, *writers]:
        with torch.no_grad():
            for name in writers:
                tensors[name].copy_(kept[name] if name == left else torch.zeros_like(kept[name]))
        before, after = last_block(model)
        assert torch.equal(before, after) == (left is None)
    with torch.no_grad():
        for name in writers:
            tensors[name].zero_()
    model(torch.arange(3, 13).reshape(1, 10)).logits.square().sum().backward()
    assert all(float(tensors[name].grad.abs().max()) > 0 for name in writers)


def test_the_names_to_zero_match_the_writers_and_nothing_else(
    built: tuple[families.Family, Path],
) -> None:
    """The filters, which match substrings of tensor names, match the residual writers only."""
    family, path = built
    scales = zeroed_scales(family.residual_writers)
    zeroed = {n for n in load_tensors(path) if any(s.value == 0 and s.matches(n) for s in scales)}
    assert zeroed == {n for index in range(2) for n in writers_of(family, path, index)}


def test_rotary_buffers_are_really_not_loaded(tmp_path: Path) -> None:
    """A checkpoint with other values in its rotary buffers computes the same logits."""
    path = make_llama(tmp_path / "old", layers=1)
    tensors = load_tensors(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((4,), 7.0)
    tokens = torch.arange(3, 13).reshape(1, 10)
    before = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    after = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "bloom", "qwen3_5_text", "mixtral", "opt", "zaya", "gemma3", "qwen2_vl"],
)
def test_the_tensors_before_and_after_the_layers_are_measured(name: str) -> None:
    """The data has the tensors that the class uses before its first and after its last layer."""
    family = families.family_of_config(zoo.toy_config(name).to_dict())
    assert family is not None
    measured = zoo.ends(name)
    assert measured == {
        "before_layers": [*family.before_layers],
        "after_layers": [*family.after_layers],
    }


@pytest.mark.parametrize("name", families.known_types())
def test_the_types_that_mergekit_defines(name: str) -> None:
    """The data says for which types mergekit takes the head from the last slice."""
    family = family_of(name)
    assert family.mergekit_defined == zoo.defined_by_mergekit(name, family.after_layers)


@pytest.mark.parametrize(
    "name", ["llama", "mixtral", "apertus", "gemma4_text", "qwen3_moe", "granite"]
)
def test_closing_factors(name: str, tmp_path: Path) -> None:
    """The closing factors are the modules whose zero acts like the zero of a residual writer."""
    zoo.quiet()
    base = zoo.save(name, tmp_path)
    tensors = load_tensors(base)
    writers = {w: {*f} for w, f in families.Family("").closing_factors.items()}
    for writer, factors in writers.items():
        for factor in factors:
            modules = {n.rpartition(".")[0] for n in tensors}
            closed = {
                m: sibling
                for m in modules
                if m.endswith(f".{writer}")
                and (sibling := f"{m.rpartition('.')[0]}.{factor}") in modules
            }
            if closed:
                same = torch.equal(
                    _logits_with_zeros(base, tensors, closed),
                    _logits_with_zeros(base, tensors, closed.values()),
                )
                assert same == (factor in family_of(name).closing_factors.get(writer, ()))


def _logits_with_zeros(base: Path, tensors: Any, modules: Collection[str]) -> torch.Tensor:
    zeroed = {
        n: torch.zeros_like(t) if n.rpartition(".")[0] in modules else t for n, t in tensors.items()
    }
    save_file(zeroed, base / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(toys.tokens()).logits
    return logits


def test_which_activations_are_not_zero_at_zero() -> None:
    """The data names the activation functions that open a gate although its input is zero."""
    found = {name for name in ACT2CLS if ACT2FN[name](torch.zeros(2, 2)).any()}
    assert found == set(json.loads(families.DATA.read_text())["nonzero_at_zero"])
    config = {"model_type": "llama", "hidden_act": "sigmoid"}
    family = families.family_of_config(config)
    assert family is not None
    assert not family.closing_factors


def test_lists_are_known() -> None:
    """Each list of a config class is named as a list about layers, or as one that is not."""
    unknown = []
    for model_type in families.known_types():
        family = family_of(model_type)
        try:
            config = toys.config(model_type).to_dict()
        except (AttributeError, KeyError, TypeError, ValueError):
            continue  # this version of transformers cannot build the type
        known = family.facts.lists.union(families.not_per_layer())
        unknown += [] if family.refused else [(model_type, key) for key in _lists(config, known)]
    assert not unknown


def _lists(value: object, known: Collection[str], place: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, entry in value.items():
            if key not in known and not (isinstance(entry, dict) and "model_type" in entry):
                yield from _lists(entry, known, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        yield place
