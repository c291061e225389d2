"""Quantized checkpoints, and others that store tensors in another form than the model's."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stored
import torch
import zoo
from harness import Cli, load_tensors, logits

from mergekit_interleave.checkpoint.quantization import quantization_of
from mergekit_interleave.errors import RefusedError

PLAN = "interleave: every 2"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    zoo.quiet()


def check_weights(
    weight: Callable[[dict[str, torch.Tensor], str], torch.Tensor],
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
) -> None:
    """Check the written weights of a new layer and of a moved one, as a format computes them."""
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert not weight(after, f"model.layers.2.{name}").any()
        old = weight(before, f"model.layers.5.{name}")
        assert old.any()
        assert torch.equal(weight(after, f"model.layers.7.{name}"), old)


class TestStoredForms:
    """`run` expands checkpoints of each stored form exactly."""

    def test_experts_in_four_bits(self, mk: Cli, tmp_path: Path) -> None:
        """The blocks of the new layers are zero, and the logits equal those of the base."""
        base, out = stored.gpt_oss(tmp_path / "base"), tmp_path / "out"
        result = mk("run", PLAN, out, "--model", base)
        assert result.status == 0, result.err
        assert re.search(r"^note: .*\bdown_proj_blocks\b", result.err, re.MULTILINE), result.err
        tensors = load_tensors(out)
        assert not tensors["model.layers.2.mlp.experts.down_proj_blocks"].any()
        scales = "model.layers.{}.mlp.experts.down_proj_scales".format
        assert torch.equal(tensors[scales(2)], tensors[scales(1)])
        assert torch.equal(logits(base), logits(out))

    def test_weights_in_eight_bits(self, mk: Cli, tmp_path: Path) -> None:
        """FP8 scales are kept, and an unconverted projection is listed by its new index."""
        base, out = stored.fp8(tmp_path / "base"), tmp_path / "out"
        result = mk("run", PLAN, out, "--model", base)
        assert result.status == 0, result.err
        tensors = load_tensors(out)
        assert not tensors["model.layers.2.self_attn.o_proj.weight"].float().any()
        assert tensors["model.layers.2.self_attn.o_proj.weight_scale_inv"].all()
        config = json.loads((out / "config.json").read_text())
        left = config["quantization_config"]["modules_to_not_convert"]
        assert left == ["lm_head", "model.layers.4.mlp.down_proj", "model.layers.5.mlp.down_proj"]
        bf16 = torch.bfloat16
        assert torch.equal(logits(base, dtype=bf16), logits(out, dtype=bf16))

    def test_weights_in_four_bits(self, mk: Cli, tmp_path: Path) -> None:
        """By the format's formula the zeroed weights are zero, and the others are unchanged."""
        base, out = stored.gptq(tmp_path / "base"), tmp_path / "out"
        result = mk("run", PLAN, out, "--model", base)
        assert result.status == 0, result.err
        before, after = load_tensors(base), load_tensors(out)
        check_weights(stored.gptq_weight, before, after)

    @pytest.mark.parametrize("form", [stored.fp8, stored.gptq, stored.mlx, stored.gpt_oss])
    def test_the_card_trains_a_lora(
        self, form: Callable[[Path], Path], mk: Cli, tmp_path: Path
    ) -> None:
        """The card of quantized weights has no code that trains them, but leads to a LoRA."""
        result = mk("run", "append: 1", tmp_path / "out", "--model", form(tmp_path / "base"))
        assert result.status == 0, result.err
        card = (tmp_path / "out/README.md").read_text()
        assert not re.search("freeze_original_layers|requires_grad|float32", card)
        command = next(line for line in card.splitlines() if line.startswith("mk-interleave train"))
        assert shlex.split(command)[1:] == ["train", "out", "--for", "peft"]

    @pytest.mark.parametrize(
        ("form", "is_packed"), [(stored.fp8, False), (stored.gptq, True), (stored.mlx, True)]
    )
    def test_plan_counts_what_run_counts(
        self, form: Callable[[Path], Path], *, is_packed: bool, mk: Cli, tmp_path: Path
    ) -> None:
        """Packed weights are not counted, and quantized ones are not called trainable."""
        base = form(tmp_path / "base")
        planned = mk("plan", "append: 1", "--model", base)
        assert "trainable" not in planned.out
        assert ("parameters" not in planned.out) == is_packed
        found = json.loads(mk("plan", "append: 1", "--model", base, "--json").out)["parameters"]
        written = json.loads(
            mk("run", "append: 1", tmp_path / "out", "--model", base, "--json").out
        )
        assert (found and found["after"]) == written["parameters"]
        assert (found and found["trainable"]) == (None if is_packed else 0)

    @pytest.mark.parametrize("plan", [PLAN, "append: 2"])
    def test_a_head_behind_the_last_layer(self, plan: str, mk: Cli, tmp_path: Path) -> None:
        """A prediction head behind the layers gets the next index, unchanged, and is not copied."""
        base, out = stored.glm4_moe(tmp_path / "base"), tmp_path / "out"
        result = mk("run", plan, out, "--model", base)
        assert result.status == 0, result.err
        before, after = load_tensors(base), load_tensors(out)
        depth = json.loads((out / "config.json").read_text())["num_hidden_layers"]
        head = {n: t for n, t in before.items() if n.startswith("model.layers.6.")}
        for name, tensor in head.items():
            moved = name.replace("layers.6.", f"layers.{depth}.")
            assert torch.equal(after[moved], tensor), name
        assert not any(name.startswith(f"model.layers.{depth + 1}.") for name in after)
        expected = logits(base, unused="model.layers.6.")
        assert torch.equal(expected, logits(out, unused=f"model.layers.{depth}."))

    @pytest.mark.parametrize("sidecar", [True, False])
    def test_scales_beside_the_weight(self, sidecar: bool, mk: Cli, tmp_path: Path) -> None:
        """The weight of a new layer is zero and its scales stay, whether or not a file says so."""
        base, out = stored.modelopt(tmp_path / "base", sidecar=sidecar), tmp_path / "out"
        result = mk("run", PLAN, out, "--model", base)
        assert result.status == 0, result.err
        before, after = load_tensors(base), load_tensors(out)
        for part in ("weight_scale", "input_scale"):
            old = before[f"model.layers.1.mlp.down_proj.{part}"]
            assert torch.equal(after[f"model.layers.2.mlp.down_proj.{part}"], old)
        assert not after["model.layers.2.mlp.down_proj.weight"].float().any()
        if sidecar:
            stated = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
            names = ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
            assert stated["exclude_modules"] == ["lm_head", *names]

    def test_settings_of_single_modules(self, mk: Cli, tmp_path: Path) -> None:
        """Both copies of MLX's settings follow their layers, and the zeroed weights are zero."""
        base, out = stored.mlx(tmp_path / "base"), tmp_path / "out"
        result = mk("run", PLAN, out, "--model", base)
        assert result.status == 0, result.err
        config = json.loads((out / "config.json").read_text())
        assert config["quantization"] == config["quantization_config"]
        named = {key for key in config["quantization"] if key.startswith("model")}
        assert named == {f"model.layers.{index}.mlp.down_proj" for index in (4, 5)}
        before, after = load_tensors(base), load_tensors(out)
        check_weights(stored.mlx_weight, before, after)
        plain = "model.layers.{}.mlp.down_proj.weight".format  # this one is not quantized
        assert after[plain(4)].any()
        assert not after[plain(5)].any()

    @pytest.mark.parametrize(
        ("file", "content", "key"),
        [
            ("kv_cache.json", {"scales": [0.5] * 6}, "scales"),
            ("steering.json", {"only": {"vector": "model.layers.1"}}, "only.vector"),
            ("maps/heads.json", [[0, 1]] * 6, "the list"),
        ],
    )
    def test_files_that_are_not_understood(
        self, file: str, content: Any, key: str, mk: Cli, tmp_path: Path
    ) -> None:
        """A file with settings of single layers is refused by its name and key."""
        base = stored.fp8(tmp_path / "base")
        (base / file).parent.mkdir(exist_ok=True)
        (base / file).write_text(json.dumps(content))
        result = mk("run", PLAN, tmp_path / "out", "--model", base)
        assert result.status == 1
        assert file in result.err
        assert key in result.err
        assert not (tmp_path / "out").exists()

    def test_an_unknown_method(self, mk: Cli, tmp_path: Path) -> None:
        """An unknown quantization method is refused by name before a byte is written."""
        base = stored.gptq(tmp_path / "base")
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"]["quant_method"] = "magic"
        (base / "config.json").write_text(json.dumps(config))
        result = mk("run", PLAN, tmp_path / "out", "--model", base)
        assert result.status == 1
        assert re.search(r"^error: .*'magic'", result.err), result.err
        assert not (tmp_path / "out").exists()


NF4 = "quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("method", "part", "module", "byte"),
    [
        ("awq", "qweight", {"qweight": "I32", "scales": "F16"}, None),
        ("awq", "scales", {"qweight": "I32", "scales": "F16"}, 0),
        ("bitnet", "weight", {"weight": "U8", "weight_scale": "BF16"}, 0x55),
        ("bitsandbytes", "weight", {"weight": "BF16"}, 0),
        ("bitsandbytes", "weight", {"weight": "I8", "SCB": "F32"}, 0),
        ("bitsandbytes", "weight", {"weight": "U8", f"weight.{NF4}": "U8"}, 0x77),
        ("bitsandbytes", "weight.absmax", {"weight": "U8", "weight.absmax": "F32"}, None),
        ("bitsandbytes", f"weight.{NF4}", {"weight": "U8", f"weight.{NF4}": "U8"}, None),
        ("compressed-tensors", "weight_packed", (INT4 := {
            "weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64"}), 0),
        ("compressed-tensors", "weight_scale", INT4, 0),
        ("compressed-tensors", "weight_shape", INT4, None),
        ("compressed-tensors", "weight_scale", {"weight": "I8", "weight_scale": "BF16"}, 0),
        ("compressed-tensors", "weight", {"weight": "F8_E4M3", "weight_scale": "BF16"}, 0),
        ("compressed-tensors", "weight_scale", {"weight": "F8_E4M3", "weight_scale": "F32"}, None),
        ("compressed-tensors", "weight_packed", (FP4 := {
            "weight_packed": "U8", "weight_scale": "F8_E4M3", "weight_global_scale": "F32",
            "input_global_scale": "F32"}), 0),
        ("compressed-tensors", "weight_scale", FP4, None),
        ("compressed-tensors", "weight_global_scale", FP4, None),
        ("compressed-tensors", "input_global_scale", FP4, None),
        ("fp8", "weight_scale_inv", {"weight": "F8_E4M3", "weight_scale_inv": "F32"}, None),
        ("fp8", "weight", {"weight": "F8_E4M3", "weight_scale_inv": "F32"}, 0),
        ("gptq", "bias", {"qweight": "I32", "bias": "F16"}, 0),
        ("gptq", "g_idx", {"qweight": "I32", "g_idx": "I32"}, None),
        ("mlx", "weight", {"weight": "BF16"}, 0),
        ("mlx", "weight", (MLX := {"weight": "U32", "scales": "BF16", "biases": "BF16"}), None),
        ("mlx", "scales", MLX, 0),
        ("mlx", "biases", MLX, 0),
        ("mlx-mxfp4", "weight", {"weight": "U32", "scales": "U8"}, 0),
        ("mlx-mxfp4", "scales", {"weight": "U32", "scales": "U8"}, None),
        ("modelopt", "weight", (MODELOPT := {
            "weight": "F8_E4M3", "weight_scale": "F32", "input_scale": "F32"}), 0),
        ("modelopt", "weight_scale", MODELOPT, None),
        ("modelopt", "input_scale", MODELOPT, None),
        ("modelopt", "weight", (NVFP4 := {
            "weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32",
            "input_scale": "F32"}), 0),
        ("modelopt", "weight_scale", NVFP4, None),
        ("modelopt", "weight_scale_2", NVFP4, None),
        (None, "weight", MODELOPT, 0),
        (None, "weight_scale", MODELOPT, None),
        (None, "weight", {"weight": "F8_E4M3"}, 0),
    ],
)  # fmt: skip
def test_which_byte_means_zero(
    method: str | None, part: str, module: dict[str, str], byte: int | None
) -> None:
    """Tensors that make the projection zero are filled; scales and others stay unchanged."""
    config = {} if method is None else {"quantization_config": {"quant_method": method}}
    dtypes = {f"o_proj.{name}": dtype for name, dtype in module.items()}
    assert quantization_of([config], {}, dtypes).zero_byte(f"o_proj.{part}") == byte


@pytest.mark.parametrize(
    ("module", "config", "method"),
    [
        ({"weight": "U8"}, {}, "unknown"),
        ({"weight": "U8", "weight_scale": "F32"}, {}, "unknown"),
        ({"weight": "F8_E4M3", "weight_scale": "F32", "weight_zero_point": "I8"}, {}, "unknown"),
        ({"weight": "I8", "scales": "F16"}, {"quantization_config": {"quant_method": "magic"}},
         "'magic'"),
        ({"weight": "I8"}, {"quantization_config": {"bits": 4}}, "without quant_method"),
    ],
)  # fmt: skip
def test_unknown_forms_are_refused(
    module: dict[str, str], config: dict[str, Any], method: str
) -> None:
    """Zeroing is refused by the method's name if it is unknown how the tensors store a zero."""
    dtypes = {f"o_proj.{name}": dtype for name, dtype in module.items()}
    with pytest.raises(RefusedError, match=rf"\bo_proj\.weight\b.*{method}"):
        quantization_of([config], {}, dtypes).zero_byte("o_proj.weight")


def test_a_scale_alone_is_no_quantization() -> None:
    """A router or a gate with a scale in plain floats is not quantized."""
    names = ("router.scale", "router.proj.weight", "gate.global_scale", "gate.weight", "clip.scale")
    found = quantization_of([{}], {}, dict.fromkeys(names, "BF16"))
    assert not found.is_quantized
    assert found.zero_byte("gate.global_scale") == found.zero_byte("gate.weight") == 0


@pytest.mark.parametrize(
    ("config", "sidecars", "method"),
    [
        ({}, {}, None),
        ({"quantization_config": {"quant_method": "fp8"}}, {}, "fp8"),
        ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, {}, "mlx"),
        ({"quantization": {"bits": 4, "mode": "mxfp4"}}, {}, "mlx-mxfp4"),
        ({}, {"hf_quant_config.json": {"producer": {"name": "modelopt"}}}, "modelopt"),
        ({}, {"quantize_config.json": {"bits": 4}}, "gptq"),
        ({}, {"quantize_config.json": {"bits": 4, "quant_method": "awq"}}, "awq"),
        ({}, {"quant_config.json": {"w_bit": 4}}, "awq"),
    ],
)
def test_where_the_method_is_stated(
    config: dict[str, Any], sidecars: dict[str, Any], method: str | None
) -> None:
    """The method is found in config.json or in a quantizer's own file."""
    assert quantization_of([config], sidecars).method == method
