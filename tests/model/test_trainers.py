"""Each trainer's settings select exactly the new layers, by the trainer's own rule."""

from __future__ import annotations

import ast
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import composites
import peft
import pytest
import torch
import yaml
import zoo
from harness import Cli, edit_json, make_llama, set_keys, state_release
from transformers import AutoModelForCausalLM

from mergekit_interleave import _requirements
from mergekit_interleave.architectures.task import Task
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.cli import main as cli
from mergekit_interleave.commands.train import train
from mergekit_interleave.errors import DirectiveError, RefusedError
from mergekit_interleave.training import lora_target, peft_rules, write
from mergekit_interleave.training import target as targets
from mergekit_interleave.training.target import TrainingTarget
from mergekit_interleave.training.trainers import axolotl, llamafactory, ms_swift, registry

PROJECTIONS = [
    *[f"self_attn.{name}_proj" for name in "qkvo"],
    *[f"mlp.{name}_proj" for name in ("gate", "up", "down")],
]
NAMES = [name for name in registry.TRAINERS if name not in ("torchtune", "litgpt")]


def target(depth: int = 50, new: tuple[int, ...] = (4, 14), **changes: Any) -> TrainingTarget:
    """Return a Llama that consists of names only."""
    stack = "model.layers"
    modules = [f"{stack}.{i}.{name}" for i in range(depth) for name in PROJECTIONS]
    norms = [f"{stack}.{i}.input_layernorm.weight" for i in range(depth)]
    weights = [f"{name}.weight" for name in modules]
    closed = [w for w in weights if w.endswith(("o_proj.weight", "down_proj.weight"))]
    fields: dict[str, Any] = {
        "directory": "deeper",
        "model_type": "llama",
        "task": Task("text-generation"),
        "depth": depth,
        "config": SimpleNamespace(num_hidden_layers=depth),
        "layers": new,
        "stacks": (stack,),
        "parameters": ("model.embed_tokens.weight", *weights, *norms),
        "modules": ("model", *modules, *(f"{stack}.{i}" for i in range(depth))),
        "linear": frozenset(modules),
        "experts": frozenset(),
        "zeroed": frozenset(w for w in closed if int(w.split(".")[2]) in new),
        "half_dtype": None,
        "is_quantized": False,
        "has_remote_code": False,
        **changes,
    }
    return TrainingTarget(**fields)


def with_a_tower(**changes: Any) -> TrainingTarget:
    """Return the same target with an image tower that has as many layers and the same names."""
    own = target(**changes)
    stack, tower = "model.language_model.layers", "model.vision_tower.encoder.layers"

    def moved(names: Any, to: str) -> list[str]:
        return [name.replace("model.layers", to) for name in names]

    return replace(
        own,
        model_type="llava",
        task=Task("image-text-to-text", "AutoModelForImageTextToText"),
        stacks=(stack,),
        parameters=(*moved(own.parameters, tower), *moved(own.parameters, stack)),
        modules=(*moved(own.modules, tower), *moved(own.modules, stack)),
        linear=frozenset([*moved(own.linear, tower), *moved(own.linear, stack)]),
        zeroed=frozenset(moved(own.zeroed, stack)),
    )


def with_experts(own: TrainingTarget, layers: Iterable[int] | None = None) -> TrainingTarget:
    """Add experts, stacked as in transformers 5."""
    names = [f"model.layers.{i}.mlp.experts.down_proj" for i in layers or range(own.depth)]
    return replace(own, parameters=(*own.parameters, *names), experts=frozenset(names))


def selected(name: str, text: str, of: TrainingTarget) -> set[str]:
    """Return the weights that a trainer trains or adapts with its settings."""
    if name == "ms-swift":
        return by_swift(text, of)
    if text.startswith("from "):
        return executed(text, of)
    settings = yaml.safe_load(text)
    match name:
        case "axolotl" if "adapter" not in settings:
            return axolotl.trained_parameters(of.parameters, settings["unfrozen_parameters"])
        case "axolotl":
            return adapted(
                of,
                settings["lora_target_modules"],
                settings.get("lora_target_parameters", []),
                settings.get("peft_layers_to_transform"),
                settings.get("peft_layers_pattern", [None])[0],
                settings.get("lora_modules_to_save", []),
            )
        case "llamafactory":
            return by_llamafactory(settings, of)
        case _:
            targets = settings["lora_target_modules"]
            one = targets[0] if len(targets) == 1 else targets
            return adapted(
                of,
                one,
                settings.get("lora_target_parameters", []),
                saved=settings.get("lora_modules_to_save", []),
            )


def by_swift(text: str, of: TrainingTarget) -> set[str]:
    """Return the weights that ms-swift selects by its command-line arguments."""
    words = shlex.split(text.replace("\\\n", " "))
    flags = [i for i, word in enumerate(words) if word.startswith("--")]
    settings = {
        words[start][2:]: words[start + 1 : stop]
        for start, stop in zip(flags, [*flags[1:], len(words)], strict=True)
    }
    if settings["tuner_type"] == ["full"]:
        assert settings["freeze_parameters_ratio"] == ["1"]
        return ms_swift.trained_parameters(of.parameters, settings["trainable_parameters"])
    targets = (
        settings["target_regex"][0] if "target_regex" in settings else settings["target_modules"]
    )
    return adapted(
        of,
        targets,
        settings.get("target_parameters", []),
        saved=settings.get("modules_to_save", []),
    )


def by_llamafactory(settings: dict[str, Any], of: TrainingTarget) -> set[str]:
    """Return the weights that LLaMA-Factory selects by its YAML."""
    if settings["finetuning_type"] == "freeze":
        pro, count = settings.get("use_llama_pro", False), settings["freeze_trainable_layers"]
        layers = llamafactory.freeze_mode_layers(of.depth, count, llama_pro=pro)
        modules = settings["freeze_trainable_modules"]
        named = [""] if modules == "all" else modules.split(",")
        extra = settings.get("freeze_extra_modules", "").split(",")
        extra = [module for module in extra if module]
        return llamafactory.trained_parameters(of.parameters, layers, named, extra)
    targets = settings["lora_target"].split(",")
    saved = settings["additional_target"].split(",") if "additional_target" in settings else []
    if of.task.tag == "image-text-to-text":
        modules = llamafactory.adapted_modules(of.linear, targets)
        return {f"{module}.weight" for module in modules} | saved_weights(of, saved)
    return adapted(of, targets, [], saved=saved)


def adapted(  # noqa: PLR0913, PLR0917 - PEFT's own settings
    of: TrainingTarget,
    targets: Any,
    parameters: list[str],
    layers: list[int] | None = None,
    pattern: str | None = None,
    saved: Iterable[str] = (),
) -> set[str]:
    """Return the weights that PEFT adapts or, by `modules_to_save`, trains in full."""
    found = peft_rules.adapted_modules(of.modules, targets, layers, pattern)
    return (
        {f"{name}.weight" for name in found}
        | peft_rules.adapted_parameters(of.parameters, parameters)
        | saved_weights(of, saved)
    )


def saved_weights(of: TrainingTarget, saved: Iterable[str]) -> set[str]:
    """Return the weights that PEFT trains in full by `modules_to_save`."""
    return {f"{name}.weight" for name in peft_rules.saved_modules(of.modules, [*saved])}


def executed(text: str, of: TrainingTarget) -> set[str]:
    """Return the weights that Python code selects by its arguments; `test_zoo` runs the code."""
    tree = ast.parse(text)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        settings = {
            k.arg: ast.literal_eval(k.value)
            for k in call.keywords
            if k.arg not in ("trust_remote_code", "dtype")
        }
        if "target_modules" in settings:
            return adapted(
                of,
                settings["target_modules"],
                settings.get("target_parameters", []),
                settings.get("layers_to_transform"),
                settings.get("layers_pattern"),
                settings.get("modules_to_save", []),
            )
    loop = next(node for node in ast.walk(tree) if isinstance(node, ast.For))
    stack = ast.unparse(loop.body[0]).removeprefix("model.").partition("[index]")[0]
    trained = [f"{stack}.{index}." for index in ast.literal_eval(loop.iter)]
    for line in map(ast.unparse, tree.body):
        match = re.fullmatch(r"model\.(.+)\.requires_grad_\(True\)", line)
        trained += [f"{match[1]}."] if match else []
    return {name for name in of.parameters if name.startswith(tuple(trained))}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "model",
    [target(), target(new=(4,)), with_a_tower()],
    ids=["llama", "one new layer", "image tower"],
)
def test_settings_select_the_new_layers(name: str, method: str, model: TrainingTarget) -> None:
    """The settings select the new layers only: 4 does not select 40, nor a layer of a tower."""
    refused = (name, method) == ("llamafactory", "full")  # refused for all three models
    if method not in registry.TRAINERS[name].methods or refused:
        with pytest.raises(RefusedError):
            write.write(model, name, method)
        return
    text = write.write(model, name, method).text
    expected = model.trained if method == "full" else model.adapted
    assert selected(name, text, model) == expected


def with_a_head(also: tuple[str, ...], **changes: Any) -> TrainingTarget:
    """Return a Llama whose head or embeddings are trained too."""
    own = target(**changes)
    parameters = (*own.parameters, "model.norm.weight", "lm_head.weight")
    modules = (*own.modules, "model.embed_tokens", "model.norm", "lm_head")
    return replace(own, parameters=parameters, modules=modules, also=also, only_new=False)


@pytest.mark.parametrize("also", [("lm_head",), ("lm_head", "model.embed_tokens")])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_settings_select_the_head_too(name: str, method: str, also: tuple[str, ...]) -> None:
    """Head and embeddings are trained in full beside the layers, and nothing else is."""
    model = with_a_head(also, depth=10, new=(4, 9))
    if method not in registry.TRAINERS[name].methods:
        return
    expected = model.trained if method == "full" else model.adapted
    assert len(model.trained - model.adapted) > len(also)
    outside = {f"{module}.weight" for module in also}
    assert selected(name, write.write(model, name, method).text, model) == expected | outside


def test_a_tied_head_is_trained_in_full_only() -> None:
    """A LoRA would untie the head from the embeddings, so it is refused; a note names both."""
    model = replace(with_a_head(("model.embed_tokens",)), tied=True)
    for name in ("peft", "unsloth"):
        with pytest.raises(RefusedError) as caught:
            write.write(model, name)
        assert "--for transformers" in (caught.value.hint or "")
    found = write.write(model, "transformers")
    assert "model.model.embed_tokens.requires_grad_(True)" in found.text
    assert any("model.embed_tokens" in note for note in found.notes)


PRECISION = {
    ("transformers", "full"): 'dtype="float32"',
    ("trl", "full"): 'dtype="float32"',
    ("trl", "lora"): "dtype: float32\n{key}: true",
    ("peft", "lora"): 'dtype="float32"',
    ("llamafactory", "full"): "{key}: true",
    ("llamafactory", "lora"): "{key}: true",
    ("axolotl", "full"): "bf16: false",
    ("ms-swift", "full"): "--torch_dtype float32 \\\n--{key} true",
}
"""What each trainer gets if the weights have 16 bits."""


@pytest.mark.parametrize(("dtype", "key"), [("bfloat16", "bf16"), ("float16", "fp16")])
@pytest.mark.parametrize(("name", "method"), PRECISION)
def test_weights_that_are_trained_have_32_bits(
    name: str, method: str, dtype: str, key: str
) -> None:
    """The settings say so for 16-bit weights, and do not compute in 16 bits for other weights."""
    model = target(depth=10, new=(4, 9))
    wanted = PRECISION[name, method].format(key=key)
    assert wanted in write.write(replace(model, half_dtype=dtype), name, method).text
    if "{key}" in PRECISION[name, method]:
        assert wanted not in write.write(model, name, method).text
    if method == "lora":
        packed = replace(model, half_dtype=dtype, is_quantized=True)
        assert wanted not in write.write(packed, name, method).text


EXACT = {
    ("axolotl", "full"): ["bf16: false", "bf16: false", "bf16: false"],
    ("axolotl", "lora"): ["bf16: false\ntf32", "bf16: false\nfp16: true", "base_model: deeper\na"],
    ("ms-swift", "full"): ["--torch_dtype float32"] * 3,
    ("ms-swift", "lora"): [f"--torch_dtype {each}" for each in ("float32", "float16", "bfloat16")],
    ("unsloth", "lora"): [f"    dtype=torch.{d},\n" for d in ("float32", "float16", "bfloat16")],
}
"""What the settings say for weights in float32, float16 and bfloat16, in this order."""


@pytest.mark.parametrize(("name", "method"), EXACT)
def test_the_original_layers_are_loaded_without_rounding(name: str, method: str) -> None:
    """A trainer whose default dtype would round the weights is told another one."""
    model = target(depth=10, new=(4, 9))
    for dtype, wanted in zip((None, "float16", "bfloat16"), EXACT[name, method], strict=True):
        assert wanted in write.write(replace(model, half_dtype=dtype), name, method).text
    if method == "lora":
        text = write.write(replace(model, is_quantized=True), name, method).text
        assert not re.search("bf16|fp16|dtype", text)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_llamafactory_rounds_weights_of_32_bits(method: str) -> None:
    """No setting of LLaMA-Factory keeps the original layers in float32, so a note says that."""
    model = target(depth=10, new=(4, 9))
    for dtype, rounds in ((None, True), ("float16", False), ("bfloat16", False)):
        notes = write.write(replace(model, half_dtype=dtype), "llamafactory", method).notes
        assert any("ZeRO-3" in note for note in notes) == rounds
    packed = write.write(replace(model, is_quantized=True), "llamafactory", "lora")
    assert not any("ZeRO-3" in note for note in packed.notes)


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_is_to_be_merged(name: str) -> None:
    """Every LoRA comes with the step that makes a whole model of it, unless it is of integers."""
    if "lora" in registry.TRAINERS[name].methods:
        for packed in (False, True):
            found = write.write(target(is_quantized=packed), name, "lora")
            places = [found.text, *found.notes]
            assert sum("merge_and_unload" in place for place in places) == (not packed)
            assert ("merge_and_unload" in found.text) == (name == "peft" and not packed)


def test_help_lists_the_trainers_that_work(mk: Cli) -> None:
    """The help and the hint for an unknown name list exactly the trainers with a method."""
    listed = {name for name in registry.TRAINERS if name in mk("train", "--help").out}
    assert listed == {*NAMES}
    hint = mk("train", "nowhere", "--for", "zzz").err.splitlines()[-1]
    assert {name for name in registry.TRAINERS if name in hint} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_default_method(name: str) -> None:
    """The default is full training, except for trainers that support only adapters."""
    model = target(depth=10, new=(4, 9))
    best = write.write(model, name)
    assert best.method == ("lora" if name in ("peft", "unsloth") else "full")
    assert best.text == write.write(model, name, best.method).text


class TestLlamaFactory:
    """LLaMA-Factory's freeze mode supports three sets of layers; others get LoRA settings."""

    @pytest.mark.parametrize(
        ("depth", "new", "expected"),
        [
            (10, (4, 9), {"use_llama_pro": True, "freeze_trainable_layers": 2}),
            (10, (8, 9), {"freeze_trainable_layers": 2}),
            (10, (0, 1), {"freeze_trainable_layers": -2}),
        ],
    )
    def test_its_freeze_mode(
        self, depth: int, new: tuple[int, ...], expected: dict[str, Any]
    ) -> None:
        """The freeze mode trains the last layer of each group, the last layers or the first."""
        found = yaml.safe_load(write.write(target(depth, new), "llamafactory").text)
        fixed = {
            "model_name_or_path": "deeper",
            "finetuning_type": "freeze",
            "freeze_trainable_modules": "all",
        }
        assert found == {**fixed, **expected}

    def test_other_layers_get_its_lora_settings(self) -> None:
        """A note gives the reason for LoRA settings; `--method full` is an error."""
        model = target(37, (4, 9, 14, 19, 24, 29, 34))
        found = write.write(model, "llamafactory")
        assert yaml.safe_load(found.text)["finetuning_type"] == "lora"
        assert "4, 9, 14, 19, 24, 29, 34" in found.notes[0]
        with pytest.raises(RefusedError, match=r"LLaMA-Factory.* 37 layers"):
            write.write(model, "llamafactory", "full")

    def test_its_own_count_of_layers(self) -> None:
        """A config that counts two per layer, as LongCat Flash does, gets LoRA settings."""
        found = write.write(
            target(10, (4, 9), config=SimpleNamespace(num_hidden_layers=20)), "llamafactory"
        )
        assert found.method == "lora"
        assert {"20", "10"} <= {*found.notes[0].replace(";", "").split()}

    def test_experts_as_separate_modules(self) -> None:
        """With one module per expert, as in transformers 4, expert 4 is not layer 4."""
        model = with_experts(target(10, (4, 9)))
        settings = yaml.safe_load(write.write(model, "llamafactory").text)
        modules = settings["freeze_trainable_modules"].split(",")
        assert modules == ["self_attn", "mlp", "input_layernorm"]
        older = [f"model.layers.{i}.mlp.experts.{j}.w1" for i in range(10) for j in range(16)]
        found = llamafactory.trained_parameters(older, (4, 9), modules)
        assert found == {*model.within(older)}
        assert found < llamafactory.trained_parameters(older, (4, 9))

    def test_modules_that_the_first_layers_lack(self) -> None:
        """Modules that the first layers lack are refused, because LLaMA-Factory refuses them."""
        model = with_experts(target(10, (4, 9)), layers=(3, 4, 9))
        later = tuple(name.replace("mlp.experts", "moe.experts") for name in model.parameters)
        model = replace(model, parameters=later)
        with pytest.raises(RefusedError, match=r"LLaMA-Factory.* moe$"):
            write.write(model, "llamafactory", "full")

    def test_a_tower_of_the_same_indices_is_noticed(self) -> None:
        """A tower with the same indices is refused, because its layers would be trained too."""
        with pytest.raises(RefusedError, match=r"\bmodel\.vision_tower\.encoder\.layers\.4\."):
            write.write(with_a_tower(depth=10, new=(4, 9)), "llamafactory", "full")


def test_zeroed_norms_are_trained_in_full() -> None:
    """Norms that `zero: norms` zeroes are trained in full, or a LoRA would get no gradient."""
    own = target()
    norms = frozenset(n for n in own.within(own.parameters) if "layernorm" in n)
    modules = (*own.modules, *(name.removesuffix(".weight") for name in norms))
    model = replace(own, zeroed=norms, modules=modules)
    text = write.write(model, "peft").text
    assert "modules_to_save" in text
    saved = lora_target.choose(model, lora_target.by_layers(model)).saved
    assert {*saved} == {name.removesuffix(".weight") for name in norms}
    with pytest.raises(RefusedError, match=r"^unsloth: .*layernorm"):
        write.write(model, "unsloth")


def test_stacked_experts_are_selected_as_parameters() -> None:
    """Stacked experts are targeted as parameters, and the settings state the LoRA dropout."""
    model = with_experts(target())
    for name in NAMES:
        text = write.write(model, name, "lora").text if name != "transformers" else ""
        if name not in ("transformers", "llamafactory"):
            assert selected(name, text, model) == model.adapted
            assert "dropout" in text
    settings = yaml.safe_load(write.write(model, "axolotl", "lora").text)
    assert not {*settings["lora_target_modules"]} & peft_rules.EXPERT_NAMES


def test_identities_come_with_a_note() -> None:
    """A note warns of DoRA, which divides by the norm of a zero; copies get no note."""
    model = target()
    assert "DoRA" in " ".join(write.write(model, "peft").notes)
    assert not write.write(replace(model, zeroed=frozenset()), "peft").notes


DEAD = {
    "pissa": {"init_lora_weights": "pissa"},
    "ia3": {"feedforward_modules": ["layers.8.mlp.down_proj"]},
    "oft": {"oft_block_size": 4},
    "boft": {"boft_block_size": 4},
    "hra": {"r": 4},
}


@pytest.mark.parametrize("kind", ["lora", "dora", *DEAD])
def test_the_note_is_true_of_peft(kind: str, deeper: Path) -> None:
    """A LoRA changes a zeroed layer in step two, DoRA gives NaN, the others never change it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(deeper)
    name = "LoraConfig" if kind in ("lora", "dora", "pissa") else f"{kind.upper()}Config"
    words = {"use_dora": True} if kind == "dora" else DEAD.get(kind, {})
    targets = [f"layers.8.{projection}" for projection in PROJECTIONS]
    adapted = peft.get_peft_model(model, getattr(peft, name)(target_modules=targets, **words))
    own = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.1)
    loss = torch.zeros(())
    moves = False
    for _ in range(3):
        optimizer.zero_grad()
        loss = adapted(input_ids=torch.arange(1, 9)[None]).logits.square().mean()
        loss.backward()
        moves |= any(p.grad is not None and bool(p.grad.any()) for p in own)
        optimizer.step()
    assert bool(loss.isnan()) == (kind == "dora")
    assert moves == (kind in ("lora", "dora"))


def test_quantized_weights_get_a_lora() -> None:
    """Quantized weights get a LoRA, because integers have no gradient."""
    model = target(is_quantized=True)
    found = write.write(model, "axolotl")
    assert found.method == "lora"
    assert "quantized" in found.notes[0]
    with pytest.raises(RefusedError, match="quantized"):
        write.write(model, "transformers")


def test_remote_code() -> None:
    """The settings allow a model's own code in each trainer that asks for permission."""
    model = target(10, (4, 9), has_remote_code=True)
    text = write.write(model, "transformers").text
    assert 'from_pretrained("deeper", trust_remote_code=True)' in text
    for name, trainer in registry.TRAINERS.items():
        for method in trainer.methods:
            is_allowed = "trust_remote_code" in write.write(model, name, method).text
            assert is_allowed == (name != "ms-swift"), name  # ms-swift always runs it


def test_axolotl_gets_a_rank() -> None:
    """The Axolotl settings state a rank: without one it passes None, which PEFT rejects."""
    settings = yaml.safe_load(write.write(target(), "axolotl", "lora").text)
    assert (settings["lora_r"], settings["lora_alpha"]) == (16, 32)


def test_unsloth_is_told_not_to_quantize() -> None:
    """The Unsloth settings turn off its default quantization, which changes original layers."""
    assert "load_in_4bit=False" in write.write(target(), "unsloth").text


def test_a_note_on_half_precision(mk: Cli, tmp_path: Path) -> None:
    """A note warns of 16-bit weights, except for trainers that load the model themselves."""
    base = make_llama(tmp_path / "base", dtype=torch.bfloat16)
    assert mk("run", "--every", "4", tmp_path / "out", "--model", base).status == 0
    assert "bfloat16" in mk("train", tmp_path / "out", "--for", "trl").err
    assert "float" not in mk("train", tmp_path / "out", "--for", "llamafactory").err


def test_unknown_names_are_usage_errors() -> None:
    """An unknown trainer or method is an error, and the hint lists the known trainers."""
    with pytest.raises(DirectiveError, match="'deepspeed'") as caught:
        registry.find("deepspeed")
    assert "axolotl" in str(caught.value.hint)
    with pytest.raises(DirectiveError, match="'dora'"):
        registry.find("peft", "dora")


@pytest.mark.parametrize("name", ["torchtune", "litgpt"])
@pytest.mark.parametrize("method", [None, "full", "lora"])
def test_trainers_without_such_a_setting(mk: Cli, name: str, method: str | None) -> None:
    """Trainers without such a setting are refused before the model is opened."""
    words = [] if method is None else ["--method", method]
    result = mk("train", "nowhere", "--for", name, *words)
    assert (result.status, result.out) == (1, "")
    assert registry.TRAINERS[name].title in result.err


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama of 45 layers, 5 of them new."""
    folder = tmp_path_factory.mktemp("train")
    make_llama(folder / "base", layers=40)
    words = ["run", "interleave: every 8", str(folder / "deeper"), "--model", str(folder / "base")]
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*words, "--engine", "stream"])
    assert not exit_info.value.code
    return folder / "deeper"


def test_the_function_changes_no_log_level(
    deeper: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train` prints nothing, and leaves the log level of transformers unchanged."""
    log = logging.getLogger("transformers")
    before = log.level
    try:
        log.setLevel(logging.INFO)
        found = train(deeper, trainer="axolotl")
        assert log.level == logging.INFO
    finally:
        log.setLevel(before)
    assert yaml.safe_load(found.text)["base_model"] == str(deeper)
    assert capsys.readouterr().out == ""


def test_settings_and_nothing_else_go_to_standard_output(mk: Cli, deeper: Path) -> None:
    """The settings go to standard output, and notes go to standard error."""
    result = mk("train", deeper, "--for", "axolotl", "--method", "lora")
    assert result.status == 0
    settings = yaml.safe_load(result.out)
    assert settings["base_model"] == str(deeper)
    assert settings["peft_layers_to_transform"] == [8, 17, 26, 35, 44]
    assert {line.split(":")[0] for line in result.err.splitlines()} == {"note"}


def test_the_recipe(mk: Cli, deeper: Path, tmp_path: Path) -> None:
    """The layout is read from a mergekit config in the directory, or from `--recipe FILE`."""
    for name in ("config.json", "mergekit_config.yml"):
        shutil.copy(deeper / name, tmp_path / name)
    expected = mk("train", deeper, "--for", "ms-swift").out.replace(str(deeper), str(tmp_path))
    assert mk("train", tmp_path, "--for", "ms-swift").out == expected
    (tmp_path / "mergekit_config.yml").unlink()
    assert "--recipe FILE" in mk("train", tmp_path, "--for", "ms-swift").err
    named = mk("train", tmp_path, "--for", "ms-swift", "--recipe", deeper / "interleave.json")
    assert named.out == expected
    other = mk("train", tmp_path, "--for", "ms-swift", "--recipe", deeper / "config.json")
    assert (other.status, other.out) == (1, "")
    assert str(deeper / "config.json") in other.err
    (tmp_path / "cfg.yml").write_text("interleave: every 8\nmodel: base\n")
    asked = mk("train", tmp_path, "--for", "ms-swift", "--recipe", tmp_path / "cfg.yml")
    assert (asked.status, asked.out) == (2, "")
    assert "`mk-interleave gen`" in asked.err


def test_warnings_of_the_recipe(mk: Cli, deeper: Path, tmp_path: Path) -> None:
    """A key that mergekit ignores is a warning in the report and in the command's output."""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text((deeper / "mergekit_config.yml").read_text() + "colour: blue\n")
    found = train(deeper, trainer="axolotl", recipe=recipe)
    assert len(found.warnings) == 1
    assert "colour" in found.warnings[0]
    result = mk("train", deeper, "--for", "axolotl", "--recipe", recipe)
    assert (result.status, result.out) == (0, found.text)
    assert result.err.splitlines() == [f"warning: {found.warnings[0]}"]


def test_models_with_nothing_to_train(mk: Cli, deeper: Path, tmp_path: Path) -> None:
    """A base without new layers is refused, and so is a config.json of another depth."""
    result = mk("train", deeper.parent / "base", "--for", "trl")
    assert (result.status, result.out) == (1, "")
    for name in ("config.json", "interleave.json"):
        shutil.copy(deeper / name, tmp_path / name)
    set_keys(tmp_path / "config.json", num_hidden_layers=40)
    wrong = mk("train", tmp_path, "--for", "trl")
    assert (wrong.status, "40" in wrong.err, "45" in wrong.err) == (1, True, True)


def test_odd_names_of_directories(mk: Cli, deeper: Path, tmp_path: Path) -> None:
    """A path that is not valid text is refused; any other letters work, also in Python code."""
    odd = tmp_path / os.fsdecode(b"n\xff")
    shutil.copytree(deeper, odd)
    refused = mk("train", odd, "--for", "axolotl")
    assert (refused.status, refused.out) == (1, "")
    assert "\\udcff" in refused.err
    face = tmp_path / "\N{GRINNING FACE} ü"
    shutil.copytree(deeper, face)
    text = mk("train", face, "--for", "transformers").out
    load = next(line for line in text.splitlines() if "from_pretrained" in line)
    assert ast.literal_eval(load.partition("from_pretrained(")[2][:-1]) == str(face)


def test_shared_weights_are_not_trained_with_a_new_layer(tmp_path: Path, mk: Cli) -> None:
    """A new layer that shares weights with an original one is refused, as in Zamba."""
    zoo.quiet()
    base, out = zoo.save("zamba", tmp_path / "base"), tmp_path / "out"
    assert mk("run", "--every", "4", out, "--model", base, "--engine", "stream").status == 0
    result = mk("train", out, "--for", "transformers")
    assert result.status == 1
    assert re.search(r"^error: model\.layers\.9\..* model\.layers\.8\.", result.err), result.err


def test_a_tower_whose_names_end_alike(tmp_path: Path, mk: Cli) -> None:
    """Llama 4's tower is not selected, although it also has `model.layers` of equal depth."""
    zoo.quiet()
    base, out = zoo.save("llama4", tmp_path / "base"), tmp_path / "out"
    assert mk("run", "--every", "4", out, "--model", base, "--engine", "stream").status == 0
    edit_json(out / "config.json", lambda c: c["vision_config"].update(num_hidden_layers=10))
    found = yaml.safe_load(mk("train", out, "--for", "axolotl").out)
    assert found["unfrozen_parameters"] == ["language_model.model.layers.(4|9)."]


@pytest.mark.parametrize("name", ["internvl", "llava"])
def test_a_class_token_is_no_expert(name: str, tmp_path: Path, mk: Cli) -> None:
    """Parameters of a vision model, also with three axes, are not taken for the text's experts."""
    zoo.quiet()
    composites.build(name).save_pretrained(tmp_path / "base")
    result = mk("run", "append: 1", tmp_path / "out", "--model", tmp_path / "base")
    assert result.status == 0, result.err
    assert not targets.read(tmp_path / "out", Models()).experts


def test_zeros_that_make_no_identity_get_the_note(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """The note on DoRA also comes if the zeros do not make an identity."""
    words = ("run", "append: 1, zero: [o_proj]", tmp_path / "out", "--model", tiny)
    assert mk(*words, "--allow-non-identity", "--engine", "stream").status == 0
    assert "DoRA" in mk("train", tmp_path / "out", "--for", "peft").err


class TestSelection:
    """`--layers` and `--also` select what is trained."""

    def test_seams(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """A layout without new layers is refused, and the hint trains those at its seams."""
        out = tmp_path / "out"
        assert mk("run", "drop: [2, 5]", out, "--model", tiny).status == 0
        refused = mk("train", out, "--for", "axolotl")
        assert (refused.status, refused.out) == (1, "")
        assert "--layers seams" in refused.err
        found = mk("train", out, "--for", "axolotl", "--layers", "seams")
        assert yaml.safe_load(found.out)["unfrozen_parameters"] == ["model.layers.(1|2)."]

    @pytest.mark.parametrize("words", [("--layers", "3"), ("--also", "nothing")])
    def test_words_that_name_nothing(self, words: tuple[str, str], mk: Cli, deeper: Path) -> None:
        """Such words are wrong for every model."""
        result = mk("train", deeper, "--for", "axolotl", *words)
        assert (result.status, result.out) == (2, "")
        assert words[0].removeprefix("--") in result.err

    @pytest.mark.parametrize(
        "case",
        [
            ("llama", False, ["lm_head"], ["lm_head."]),
            ("llama", False, ["lm_head", "embed_tokens"], ["lm_head.", "model.embed_tokens."]),
            ("llama", True, ["lm_head"], ["model.embed_tokens."]),
            ("gpt2", False, ["wte"], ["transformer.wte."]),
            ("gpt2", True, ["embed_tokens", "lm_head"], ["transformer.wte."]),
            ("gemma3", True, ["lm_head"], ["model.language_model.embed_tokens."]),
        ],
    )
    def test_head_and_embeddings(
        self, case: tuple[str, bool, list[str], list[str]], mk: Cli, tmp_path: Path
    ) -> None:
        """The names are those of Llama or of the class; a shared tensor has its first name."""
        name, tied, also, expected = case
        zoo.quiet()
        base, out = zoo.save(name, tmp_path / "base"), tmp_path / "out"
        assert mk("run", "--every", "4", out, "--model", base, "--engine", "stream").status == 0
        set_keys(out / "config.json", tie_word_embeddings=tied)
        words = [word for each in also for word in ("--also", each)]
        result = mk("train", out, "--for", "axolotl", *words)
        assert yaml.safe_load(result.out)["unfrozen_parameters"][1:] == expected
        assert ("share one tensor" in result.err) == tied

    def test_an_old_transformers(
        self, mk: Cli, deeper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In the environment of an old trainer, the error names what is needed."""
        state_release(tmp_path, "transformers", "4.57.6")
        monkeypatch.syspath_prepend(tmp_path)
        result = mk("train", deeper, "--for", "axolotl")
        assert (result.status, result.out) == (1, "")
        expected = _requirements.error_of(_requirements.unmet())
        assert "4.57.6" in str(expected)
        assert result.err.splitlines() == [f"error: {expected}", f"hint: {expected.hint}"]


REAL = {
    "qwen3_moe": "stacked experts, and dense layers that PEFT takes for experts",
    "gpt2": "transposed matrices",
    "mamba": "output projections that PEFT refuses",
    "gemma3": "an additional image tower",
    "hrm_text": "two stacks",
    "nemotron_h": "names in memory that are not the checkpoint's",
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_libraries_train_the_new_layers(name: str, mk: Cli, tmp_path: Path) -> None:
    """The code for transformers and PEFT trains the new layers only, and each gets gradients."""
    zoo.quiet()
    base, out = zoo.save(name, tmp_path / "base"), tmp_path / "out"
    assert mk("run", "--every", "4", out, "--model", base, "--engine", "stream").status == 0
    assert not zoo.untrainable(out)


@pytest.mark.parametrize(
    ("name", "norm"),
    [("gemma2", "post_attention_layernorm"), ("kolibri1", "post_self_attn_layernorm")],
    ids=["gemma2", "names in memory differ from the checkpoint"],
)
def test_zeroed_norms_get_gradients(name: str, norm: str, mk: Cli, tmp_path: Path) -> None:
    """Norms that `zero: norms` zeroes are trained in full beside the LoRA."""
    zoo.quiet()
    base = zoo.save(name, tmp_path / "base")
    words = ("run", "interleave: every 4, zero: norms", tmp_path / "out", "--model", base)
    assert mk(*words).status == 0
    assert not zoo.untrainable(tmp_path / "out")
    result = mk("train", tmp_path / "out", "--for", "peft")
    assert norm in result.out
    assert norm in result.err
    assert "DoRA" not in result.err
