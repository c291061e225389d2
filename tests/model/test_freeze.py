"""`freeze_original_layers` freezes a loaded model except for its new layers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Cli
from transformers import AutoModelForCausalLM

from mergekit_interleave import freeze_original_layers
from mergekit_interleave.errors import CheckpointError, DirectiveError, RefusedError


@pytest.fixture(scope="module")
def deeper(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model with two new layers, 4 and 9."""
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
    """Return the parameters that require gradients."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_new_layers_are_trained_and_nothing_else(deeper: Path) -> None:
    """Only new layers require gradients; the layout is read from the model's directory."""
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
    """A model without a path needs its interleave.json, directory or recipe as an argument."""
    model = load(deeper)
    model.config._name_or_path = model.name_or_path = ""  # noqa: SLF001
    place = {
        "a file": deeper / "interleave.json",
        "a directory": deeper,
        "the recipe": deeper / "mergekit_config.yml",
    }[how]
    assert len(freeze_original_layers(model, place)) == 18
    with pytest.raises(CheckpointError) as caught:
        freeze_original_layers(model)
    assert "interleave.json" in str(caught.value.hint)


def test_a_model_within_another_is_found(deeper: Path) -> None:
    """A model that torch.compile or data parallelism wraps in another module is accepted."""
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
    """A quantized model is refused, because its weights have no gradients."""
    model = load(deeper)
    weight = model.model.layers[4].mlp.down_proj
    weight.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RefusedError, match="quantized"):
        freeze_original_layers(model)


def test_shared_weights_are_not_trained_with_a_new_layer(deeper: Path) -> None:
    """A tensor shared with an original layer is refused, because that layer would change."""
    model = load(deeper)
    model.model.layers[4].mlp = model.model.layers[3].mlp
    with pytest.raises(RefusedError, match=r"layers\.4\.mlp\..*layers\.3\.mlp\."):
        freeze_original_layers(model)


def test_other_layers_and_the_head(deeper: Path) -> None:
    """Layers can be named by their indices, and the head and the embeddings by name."""
    model = load(deeper)
    names = freeze_original_layers(model, layers="-1:end", also=["lm_head", "embed_tokens"])
    assert trained(model) == {*names}
    assert {name.rpartition(".layers.")[2].partition(".")[0] for name in names} == {
        "9",
        "lm_head",
        "model",
    }
    assert not freeze_original_layers(model, layers="0:1")[0].startswith("lm_head")


def test_a_tied_head(deeper: Path) -> None:
    """A tensor that is the head and the embeddings is trained under both names."""
    model = load(deeper)
    model.lm_head.weight = model.model.embed_tokens.weight
    names = freeze_original_layers(model, also=["lm_head"])
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {*names}


def test_words_that_name_nothing(deeper: Path) -> None:
    """The hint is a call of the function, not a flag."""
    model = load(deeper)
    with pytest.raises(DirectiveError, match="also"):
        freeze_original_layers(model, also=["head"])
    with pytest.raises(RefusedError, match="seams") as caught:
        freeze_original_layers(model, layers="seams")
    assert 'freeze_original_layers(model, layers="new")' in (caught.value.hint or "")


ALONE = """
import json, pathlib, sys
for name in ("mergekit", "typer", "transformers", "huggingface_hub", "accelerate", "pydantic",
             "rich", "safetensors", "tqdm", "packaging"):
    sys.modules[name] = None
import torch
from mergekit_interleave import freeze_original_layers
layer = lambda: torch.nn.ModuleDict({"mlp": torch.nn.Linear(2, 2)})
layers = torch.nn.ModuleList([layer() for _ in range(10)])
model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": layers})})
names = freeze_original_layers(model, sys.argv[1])
assert names == [name for name, p in model.named_parameters() if p.requires_grad]
try:
    freeze_original_layers(model)
except Exception as error:
    assert "interleave.json" in error.hint, error
else:
    raise AssertionError("nothing says where interleave.json is")
print(*names)
"""


def test_torch_alone_is_enough(deeper: Path) -> None:
    """Besides torch, freezing needs only PyYAML, as in the environment of any trainer."""
    words = [sys.executable, "-c", ALONE, str(deeper)]
    made = subprocess.run(words, capture_output=True, text=True, check=False)
    assert made.stderr == ""
    assert made.stdout.split() == [
        f"model.layers.{index}.mlp.{kind}" for index in (4, 9) for kind in ("weight", "bias")
    ]


def test_a_path_instead_of_a_model() -> None:
    """A path instead of a model is a TypeError that shows the argument."""
    with pytest.raises(TypeError, match=r"not 'deeper'"):
        freeze_original_layers("deeper")


def test_another_model_is_noticed(deeper: Path, tiny: Path) -> None:
    """A base of 8 layers is refused if the file records 10 layers."""
    with pytest.raises(RefusedError, match=r"10 layers.* 8"):
        freeze_original_layers(load(tiny), deeper)


def test_a_model_without_new_layers(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """A layout that only drops layers is refused, because it has no new layers."""
    out = tmp_path / "shorter"
    assert mk("run", "drop: [2, 4]", out, "--model", tiny).status == 0
    with pytest.raises(RefusedError, match=r"\bnew\b"):
        freeze_original_layers(load(out))


def test_a_directory_without_a_record(tiny: Path) -> None:
    """A directory without interleave.json is an error, and the hint tells how to name one."""
    with pytest.raises(CheckpointError, match=r"interleave\.json") as caught:
        freeze_original_layers(load(tiny))
    assert "interleave.json" in caught.value.__notes__[0]
    with pytest.raises(CheckpointError, match=r"nowhere\.json"):
        freeze_original_layers(load(tiny), tiny / "nowhere.json")


def test_a_broken_manifest_is_one_error(deeper: Path, tmp_path: Path) -> None:
    """A malformed interleave.json is an error, even if the recipe is beside it."""
    out = tmp_path / "out"
    shutil.copytree(deeper, out)
    model = load(out)
    (out / "interleave.json").write_text(json.dumps({"version": 1, "layers": 3}))
    with pytest.raises(CheckpointError, match=r"out/interleave\.json: "):
        freeze_original_layers(model)
