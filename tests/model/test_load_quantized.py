"""`load` with a base that transformers loads quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stored
import torch
import zoo
from harness import Cli, make_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import mergekit_interleave as api
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.layout.fingerprint import fingerprint
from mergekit_interleave.virtual.model import memory_of

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "attention_bias": True,
}
"""Four bits are stored in blocks of 64 numbers."""

PLANS = (
    "interleave: every 2",
    "stack: [[0, 3], [2, 4], [2, 4], [2, 8]]",
    "drop: [2, 4]",
)
"""Identities, an uneven threefold repeat, and layers left out."""

METHODS = ("eight bits", "four bits", "torchao")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    zoo.quiet()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama of 8 layers in float32."""
    return make_llama(tmp_path_factory.mktemp("quantized") / "base", **SIZES)


def settings(method: str) -> Any:
    """Return the settings of a method; skip the test if its package is not installed."""
    if method == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        return TorchAoConfig(torchao.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if method == "eight bits":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)


def quantized(path: Path, method: str) -> Any:
    """Load a model quantized."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=settings(method)
    )


def reloaded(path: Path) -> Any:
    """Load a model as it is stored."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def written(plan: Any, source: Path, out: Path) -> Path:
    """Write the model of a plan, and return where."""
    api.run(plan, out, model=source)
    return out


def four_bit(model: Any) -> list[Any]:
    """Return the parameters that are quantized in four bits."""
    return [parameter for parameter in model.parameters() if hasattr(parameter, "quant_state")]


def check_equal(one: Any, other: Any) -> None:
    """Check that two models have the same logits and text, with and without a cache."""
    for of_one, of_other in zip(zoo.outputs(one), zoo.outputs(other), strict=True):
        assert torch.equal(of_one, of_other)


class TestQuantizedOnLoading:
    """A grown model computes what the written one computes, quantized in the same way."""

    @pytest.mark.parametrize("method", METHODS)
    def test_plans(self, method: str, llama: Path, tmp_path: Path) -> None:
        """Logits, and text with and without a cache, are equal to the bit."""
        base = quantized(llama, method)
        for number, plan in enumerate(PLANS):
            out = written(plan, llama, tmp_path / str(number))
            check_equal(api.load(plan, base=base), quantized(out, method))

    @pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_next"])
    @pytest.mark.parametrize("method", ["eight bits", "torchao"])
    def test_types(self, name: str, method: str, tmp_path: Path) -> None:
        """So are transposed weights, merged experts, and layers of two kinds."""
        source = zoo.save(name, tmp_path / "base")
        base = quantized(source, method)
        out = written("append: 2", source, tmp_path / "out")
        check_equal(api.load("append: 2", base=base), quantized(out, method))

    @pytest.mark.parametrize("method", METHODS)
    def test_two_models(self, method: str, llama: Path, tmp_path: Path) -> None:
        """A second model is loaded with the quantization of the first."""
        other = make_llama(tmp_path / "other", **SIZES)
        plan = {"models": {"a": str(llama), "b": str(other)}, "layout": ["a 0:5", "b 3:8"]}
        api.run(plan, tmp_path / "out")
        check_equal(
            api.load(plan, base=quantized(llama, method)), quantized(tmp_path / "out", method)
        )

    @pytest.mark.parametrize("method", METHODS)
    def test_settings(self, method: str, llama: Path) -> None:
        """The model states that it is quantized, and how."""
        base = quantized(llama, method)
        grown = api.load(PLANS[0], base=base)
        assert grown.is_quantized
        assert grown.quantization_method == base.quantization_method
        own, others = (model.config.quantization_config.to_dict() for model in (grown, base))
        changed = {key for key in own if own[key] != others[key]}
        assert changed <= {"llm_int8_skip_modules", "modules_to_not_convert"}

    @pytest.mark.parametrize("method", METHODS)
    def test_nothing_is_copied(self, method: str, llama: Path) -> None:
        """Repeated layers take no memory, and zeroed projections that of one number."""
        base = quantized(llama, method)
        known = memory_of(base)
        assert memory_of(api.load(PLANS[1], base=base)).keys() == known.keys()
        grown = memory_of(api.load(PLANS[0], base=base))
        assert sum(size for place, size in grown.items() if place not in known) <= 8

    @pytest.mark.parametrize("method", METHODS)
    def test_the_base_is_unharmed(self, method: str, llama: Path, tmp_path: Path) -> None:
        """After a save, loads and generation, the base is what it was."""
        base = quantized(llama, method)
        api.load(PLANS[0], base=base).save_pretrained(tmp_path / "out")
        before, trained = (
            zoo.outputs(base),
            {n: p.requires_grad for n, p in base.named_parameters()},
        )
        for plan in PLANS:
            grown = api.load(plan, base=base)
            zoo.outputs(grown)
            assert not any(parameter.requires_grad for parameter in grown.parameters())
        for one, other in zip(zoo.outputs(base), before, strict=True):
            assert torch.equal(one, other)
        assert {n: p.requires_grad for n, p in base.named_parameters()} == trained

    def test_a_lora(self, llama: Path) -> None:
        """PEFT adapts every occurrence of a layer, each with weights of its own."""
        peft = pytest.importorskip("peft")
        grown = api.load(PLANS[1], base=quantized(llama, "eight bits"))
        adapted = peft.get_peft_model(grown, peft.LoraConfig(target_modules=["q_proj"], r=2))
        assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 13


class TestSaving:
    """`save_pretrained` stores every layer as it is quantized."""

    @pytest.mark.parametrize("method", METHODS)
    def test_reloaded(self, method: str, llama: Path, tmp_path: Path) -> None:
        """The saved model computes the same; zeroed projections are stored as zeros."""
        base = quantized(llama, method)
        for number, plan in enumerate(PLANS):
            out = tmp_path / str(number)
            api.load(plan, base=base).save_pretrained(out)
            content = json.loads((out / "interleave.json").read_text())
            assert content["fingerprint"] == fingerprint(api.plan(plan, model=llama).layout)
        for number, plan in enumerate(PLANS):
            check_equal(reloaded(tmp_path / str(number)), api.load(plan, base=base))

    def test_verified(self, llama: Path, mk: Cli, tmp_path: Path) -> None:
        """The record is true of the quantized weights, which no comparison with the base can be."""
        for number, plan in enumerate(PLANS):
            out = tmp_path / str(number)
            api.load(plan, base=quantized(llama, "eight bits")).save_pretrained(out)
            result = mk("verify", out)
            assert result.status == 0, result.err + result.out
            result = mk("verify", out, "--against", llama)
            assert (result.status, "is quantized" in result.err) == (1, True)

    def test_after_a_pass(self, llama: Path, tmp_path: Path) -> None:
        """Where the first pass repacks four-bit weights, a later save is refused."""
        base = quantized(llama, "four bits")
        grown = api.load(PLANS[1], base=base)
        before = zoo.outputs(grown)
        packed = any(hasattr(p.quant_state, "packing_format_for_cpu") for p in four_bit(grown))
        if not packed:
            pytest.skip("this CPU uses the weights as they are stored")
        with pytest.raises(RefusedError, match="q_proj") as raised:
            grown.save_pretrained(tmp_path / "out")
        assert "before its first pass" in str(raised.value.hint)
        assert not (tmp_path / "out").exists()
        api.load(PLANS[1], base=quantized(llama, "four bits")).save_pretrained(tmp_path / "again")
        assert (tmp_path / "again/model.safetensors").is_file()
        for one, other in zip(zoo.outputs(grown), before, strict=True):
            assert torch.equal(one, other)

    def test_an_unknown_form(self, llama: Path, tmp_path: Path) -> None:
        """A method that packs its weights after loading cannot be stored from memory."""
        grown = api.load(PLANS[1], base=quantized(llama, "eight bits"))
        grown.hf_quantizer.quantization_config.quant_method = "gptq"
        with pytest.raises(RefusedError, match="gptq") as raised:
            grown.save_pretrained(tmp_path / "out")
        assert "use `run`" in str(raised.value.hint)
        assert not (tmp_path / "out").exists()
        assert written(PLANS[1], llama, tmp_path / "out").is_dir()


class TestStoredQuantized:
    """Checkpoints that are stored quantized."""

    @pytest.mark.parametrize("method", ["eight bits", "four bits"])
    def test_in_memory(self, method: str, llama: Path, tmp_path: Path) -> None:
        """A model that stays quantized in memory is the one that `run` writes."""
        source = tmp_path / "source"
        quantized(llama, method).save_pretrained(source)
        for plan, given in zip(
            PLANS, ({"base": reloaded(source)}, {"model": source, "dtype": "float32"}), strict=False
        ):
            out = written(plan, source, tmp_path / next(iter(given)))
            check_equal(api.load(plan, **given), reloaded(out))

    @pytest.mark.parametrize("form", ["fp8", "gpt_oss"])
    def test_dequantized(self, form: str, tmp_path: Path) -> None:
        """So is a model whose weights transformers converts to floats on loading."""
        source = getattr(stored, form)(tmp_path / "source")
        for number, plan in enumerate(("interleave: every 2", "stack: [[0, 4], [2, 6]]")):
            grown = api.load(plan, model=source)
            assert not getattr(grown.config, "quantization_config", None)
            other = AutoModelForCausalLM.from_pretrained(
                written(plan, source, tmp_path / str(number))
            )
            check_equal(grown, other)
            grown.save_pretrained(tmp_path / f"saved {number}")
            saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"saved {number}")
            check_equal(saved, other)


class TestRefused:
    """What quantized weights do not allow is one clear error."""

    @pytest.mark.parametrize(
        ("plan", "name"),
        [
            ("interleave: every 2, zero: none, scale: {o_proj: 0.5}", "layers.2.self_attn.o_proj"),
            ("interleave: every 2, dtype: float16", "layers.0."),
        ],
    )
    def test_computed_weights(self, plan: str, name: str, llama: Path, tmp_path: Path) -> None:
        """Scaled and converted tensors, by name; what `run` writes can be quantized."""
        with pytest.raises(RefusedError, match=name) as raised:
            api.load(plan, base=quantized(llama, "eight bits"))
        assert "use `run`" in str(raised.value.hint)
        plain = make_llama(tmp_path / "plain", **{**SIZES, "attention_bias": False})
        assert quantized(written(plan, plain, tmp_path / "out"), "eight bits").is_quantized

    def test_training(self, llama: Path) -> None:
        """New layers without weights that an optimizer can change."""
        with pytest.raises(RefusedError, match="quantized"):
            api.load(PLANS[0], base=quantized(llama, "eight bits"), trainable=True)

    def test_hooks(self, llama: Path) -> None:
        """A quantizer that acts on the whole model before its first pass."""
        base = quantized(llama, "eight bits")
        hook = base.register_forward_pre_hook(lambda *_: hook.remove())
        with pytest.raises(RefusedError, match="LlamaForCausalLM") as raised:
            api.load(PLANS[0], base=base)
        assert "called once" in str(raised.value.hint)
        base(torch.arange(3)[None])
        assert api.load(PLANS[0], base=base).is_quantized

    def test_two_methods(self, llama: Path, tmp_path: Path) -> None:
        """A quantized model and one that is not."""
        other = make_llama(tmp_path / "other", **SIZES)
        plan = {"models": {"a": str(llama), "b": str(other)}, "layout": ["a 0:5", "b 3:8"]}
        base = quantized(llama, "eight bits")
        base.hf_quantizer.pre_quantized = True  # so nothing says how to quantize the other
        with pytest.raises(RefusedError, match="no method") as raised:
            api.load(plan, base=base)
        assert "alike" in str(raised.value.hint)
        assert api.load(plan, base=AutoModelForCausalLM.from_pretrained(llama))
