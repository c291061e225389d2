"""`freeze_original_layers` freezes a loaded model except for its new layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Cli
from transformers import AutoModelForCausalLM

from mergekit_interleave import freeze_original_layers
from mergekit_interleave.errors import CheckpointError, RefusedError


@pytest.fixture(scope="module")
def deeper(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with two new layers, 4 and 9."""
    from mergekit_interleave.cli import main as cli

    out = tmp_path_factory.mktemp("freeze") / "deeper"
    words = ["run", "interleave: every 4", str(out), "--model", str(tiny), "--engine", "stream"]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(words)
    assert not exit_info.value.code
    return out


def load(path: Path) -> Any:
    """Load the model as a user does."""
    return AutoModelForCausalLM.from_pretrained(path)


def trained(model: Any) -> set[str]:
    """The parameters that an optimizer would get."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_new_layers_are_trained_and_nothing_else(deeper: Path) -> None:
    """The layers are read from where the model was loaded."""
    model = load(deeper)
    names = freeze_original_layers(model)
    own = {
        f"model.layers.{index}.{name}"
        for index in (4, 9)
        for name, _ in model.model.layers[index].named_parameters()
    }
    assert trained(model) == {*names} == own


def test_training_leaves_the_rest_as_it_was(deeper: Path) -> None:
    """After some steps every original tensor is equal to the bit, and every new one has changed."""
    model = load(deeper)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = freeze_original_layers(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.arange(24).reshape(2, 12)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {*names}
    assert losses[-1] < losses[0]


def test_what_was_trained_before_is_frozen(deeper: Path) -> None:
    """An earlier choice of parameters is replaced."""
    model = load(deeper)
    model.requires_grad_()
    model.model.layers[4].requires_grad_(requires_grad=False)
    names = freeze_original_layers(model)
    assert trained(model) == {*names}


@pytest.mark.parametrize("how", ["a file", "a directory", "the recipe"])
def test_the_manifest_may_be_named(deeper: Path, how: str) -> None:
    """It can be passed for a model that a trainer has saved elsewhere."""
    model = load(deeper)
    model.config._name_or_path = model.name_or_path = ""  # noqa: SLF001
    place = {
        "a file": deeper / "interleave.json",
        "a directory": deeper,
        "the recipe": deeper / "mergekit_config.yml",
    }[how]
    assert len(freeze_original_layers(model, place)) == 18
    with pytest.raises(CheckpointError, match="loaded from"):
        freeze_original_layers(model)


def test_a_model_within_another_is_found(deeper: Path) -> None:
    """torch.compile and data parallelism wrap the model in another module."""
    model = load(deeper)
    names = freeze_original_layers(model)
    assert freeze_original_layers(torch.compile(model)) == [f"_orig_mod.{name}" for name in names]
    wrapped = torch.nn.Sequential()
    wrapped.add_module("module", model)
    assert freeze_original_layers(wrapped) == [f"module.{name}" for name in names]


def test_adapters_are_not_frozen_unasked(deeper: Path) -> None:
    """A model with a LoRA is refused, because the LoRA would be frozen."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(deeper), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(RefusedError, match="adapters"):
        freeze_original_layers(model)


def test_integers_cannot_be_trained(deeper: Path) -> None:
    """Quantized weights have no gradients."""
    model = load(deeper)
    weight = model.model.layers[4].mlp.down_proj
    weight.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RefusedError, match="quantized"):
        freeze_original_layers(model)


def test_shared_weights_are_not_trained_with_a_new_layer(deeper: Path) -> None:
    """An original layer that shares the tensor would change."""
    model = load(deeper)
    model.model.layers[4].mlp = model.model.layers[3].mlp
    with pytest.raises(RefusedError, match="same parameter"):
        freeze_original_layers(model)


def test_a_path_is_no_model() -> None:
    """The error names what was passed."""
    with pytest.raises(TypeError, match=r"not 'deeper'"):
        freeze_original_layers("deeper")


def test_another_model_is_noticed(deeper: Path, tiny: Path) -> None:
    """A base of 8 layers is not the model of 10 layers that the file records."""
    with pytest.raises(RefusedError, match=r"10 layers.* 8"):
        freeze_original_layers(load(tiny), deeper)


def test_nothing_new_is_nothing_to_train(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """A layout that only drops layers has no new ones."""
    out = tmp_path / "shorter"
    assert mk("run", "drop: [2, 4]", out, "--model", tiny).status == 0
    with pytest.raises(RefusedError, match="nothing to train"):
        freeze_original_layers(load(out))


def test_a_directory_without_a_record(tiny: Path) -> None:
    """A base has no interleave.json."""
    with pytest.raises(CheckpointError, match=r"interleave\.json") as caught:
        freeze_original_layers(load(tiny))
    assert "freeze_original_layers(model, 'path/interleave.json')" in caught.value.__notes__[0]
    with pytest.raises(CheckpointError):
        freeze_original_layers(load(tiny), tiny / "nowhere.json")


def test_a_broken_manifest_is_one_error(deeper: Path, tmp_path: Path) -> None:
    """The recipe beside it is not used instead."""
    out = tmp_path / "out"
    shutil.copytree(deeper, out)
    model = load(out)
    (out / "interleave.json").write_text(json.dumps({"version": 1, "layers": 3}))
    with pytest.raises(CheckpointError, match="not an interleave"):
        freeze_original_layers(model)
