"""What transformers does with the tensors of a result, asked before the result appears."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import zoo
from harness import Cli
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mergekit_interleave.checkpoint import class_loading, meta_model
from mergekit_interleave.checkpoint.class_loading import Form
from mergekit_interleave.checkpoint.safetensors_header import read_tensors
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.planning.structure_check import forms_of_tensors

PLAN = "interleave: every 4"
ENGINES = ("auto", "mergekit", "stream")


def rewritten(path: Path, rename: Callable[[str], str | None]) -> None:
    """Rename the tensors of a model, or remove those with the name None."""
    file = path / "model.safetensors"
    named = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file({n: t for n, t in named.items() if n is not None}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "lost", ["model.layers.5.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_a_base_with_a_hole_is_refused_by_name(
    lost: str, engine: str, mk: Cli, own_tiny: Path, tmp_path: Path
) -> None:
    """No engine grows a base without a tensor of its class, and the error names the tensor."""
    rewritten(own_tiny, lambda name: None if name == lost else name)
    result = mk("run", PLAN, tmp_path / "out", "--model", own_tiny, "--engine", engine)
    assert result.status == 1
    assert lost in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_foreign_prefix_is_refused_by_name(
    engine: str, mk: Cli, own_tiny: Path, tmp_path: Path
) -> None:
    """No engine grows a base whose class looks for other names; the error shows the prefix."""
    rewritten(own_tiny, lambda name: f"student.{name}")
    result = mk("run", PLAN, tmp_path / "out", "--model", own_tiny, "--engine", engine)
    assert result.status == 1
    assert "student." in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [(), ("--mergekit", "allow_crimes=true")])
def test_another_shape_is_refused_by_name(
    engine: str, options: tuple[str, ...], mk: Cli, own_tiny: Path, tmp_path: Path
) -> None:
    """A tensor whose shape the class has otherwise is refused, whatever mergekit is allowed."""
    config = json.loads((own_tiny / "config.json").read_text())
    (own_tiny / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    out = tmp_path / "out"
    result = mk("run", PLAN, out, "--model", own_tiny, "--engine", engine, *options)
    assert result.status == 1
    assert "mlp.down_proj.weight is stored as [32, 48]" in result.err
    assert "allow_crimes" not in result.err.partition("hint:")[2]
    assert not out.exists()


def test_an_adapter_beside_the_base_is_refused(mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
    """A base with an adapter is refused; without its config it grows, and the rest stays behind.

    `plan` refuses it too, also if it reads no weights.
    """
    (own_tiny / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (own_tiny / "adapter_model.safetensors").write_bytes(b"")
    weights = own_tiny / "model.safetensors"
    for words in (("run", PLAN, tmp_path / "out"), ("plan", PLAN), ("plan", PLAN)):
        result = mk(*words, "--model", own_tiny)
        assert result.status == 1
        assert "adapter_config.json" in result.err
        assert not (tmp_path / "out").exists()
        if words[0] == "plan" and weights.exists():
            weights.rename(own_tiny / "pytorch_model.bin")
    (own_tiny / "pytorch_model.bin").rename(weights)
    (own_tiny / "adapter_config.json").unlink()
    assert mk("run", PLAN, tmp_path / "out", "--model", own_tiny).status == 0
    assert not list((tmp_path / "out").glob("adapter*"))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt2", "gemma2"])
def test_each_stored_form_is_loaded(name: str, tmp_path: Path) -> None:
    """The class loads its own checkpoint whole, also with merged, renamed and tied tensors."""
    zoo.quiet()
    base = zoo.save(name, tmp_path)
    loading = class_loading.load(base, forms_of_tensors(read_tensors(base)))
    assert loading.missing == loading.unloaded == ()
    assert not loading.mismatched
    assert loading.loaded


@pytest.mark.skipif("qwen4_exp_text" not in CONFIG_MAPPING, reason="transformers is too old")
def test_transformers_converts_some_tensors_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only with the workaround, transformers converts one type without values."""
    zoo.quiet()
    base = zoo.save("qwen4_exp_text", tmp_path)
    forms = forms_of_tensors(read_tensors(base))
    assert class_loading.load(base, forms).missing == ()
    monkeypatch.setattr(class_loading, "_conversions_on_meta", nullcontext)
    with pytest.raises(RefusedError):
        class_loading.load(base, forms)


def test_quantized_tensors_are_compared_by_name(tmp_path: Path) -> None:
    """A quantized projection needs a stored part, whose shape is not compared."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "num_hidden_layers": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_attention_heads": 4,
                "vocab_size": 8,
                "quantization": {"bits": 4, "group_size": 32},
            }
        )
    )
    names = meta_model.shapes(tmp_path)
    forms = {name: Form("BF16", shape) for name, shape in names.items()}
    module = "model.layers.0.mlp.down_proj"
    del forms[f"{module}.weight"]
    assert class_loading.load(tmp_path, forms).missing == (f"{module}.weight",)
    forms[f"{module}.weight"] = Form("U32", (32, 6))
    forms[f"{module}.scales"] = forms[f"{module}.biases"] = Form("BF16", (32, 1))
    loading = class_loading.load(tmp_path, forms)
    assert loading.missing == ()
    assert not loading.mismatched


def test_converters_made_meanwhile_stay_usable() -> None:
    """A converter that transformers makes during a check, and keeps, has its own settings later."""
    from transformers.core_model_loading import Concatenate, WeightConverter

    with class_loading._conversions_on_meta():  # noqa: SLF001 - transformers calls it within
        made = WeightConverter("a.*.b", "a.b", [Concatenate(0)], force_cpu=True)
        assert not made.force_cpu
    assert made.force_cpu
