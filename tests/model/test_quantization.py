"""Quantized checkpoints, and others that store tensors in another form than the model's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import stored
import torch
import zoo
from harness import Cli, load_tensors
from transformers import AutoModelForCausalLM

from mergekit_interleave.checkpoint.quantization import quantization_of, reindexed
from mergekit_interleave.checkpoint.safetensors_header import Shard, Stamp, Tensor
from mergekit_interleave.errors import RefusedError

PLAN = "interleave: every 2"


def logits(path: Path, **how: Any) -> torch.Tensor:
    """Return the logits of a checkpoint for some tokens."""
    zoo.quiet()
    model = AutoModelForCausalLM.from_pretrained(path, **how).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(3, 60)[None]).logits
    return found


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
        assert torch.equal(logits(base, dtype=torch.float32), logits(out, dtype=torch.float32))

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
        how = {"dtype": torch.bfloat16}
        assert torch.equal(logits(base, **how), logits(out, **how))

    def test_weights_in_four_bits(self, mk: Cli, tmp_path: Path) -> None:
        """By the format's formula the zeroed weights are zero, and the others are unchanged."""
        base, out = stored.gptq(tmp_path / "base"), tmp_path / "out"
        result = mk("run", PLAN, out, "--model", base)
        assert result.status == 0, result.err
        before, after = load_tensors(base), load_tensors(out)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            assert not stored.gptq_weight(after, f"model.layers.2.{name}").any()
            old = stored.gptq_weight(before, f"model.layers.5.{name}")
            assert old.any()
            assert torch.equal(stored.gptq_weight(after, f"model.layers.7.{name}"), old)

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
        assert torch.equal(logits(base), logits(out))

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


NF4 = ".quant_state.bitsandbytes__nf4"


def tensor(dtype: str) -> Tensor:
    """Return a tensor of which only the dtype matters."""
    return Tensor(dtype, (4,), 0, 4, Shard(Path("x"), {}, Stamp(0, 0, 4, 0)))


@pytest.mark.parametrize(
    ("method", "name", "dtype", "beside", "byte"),
    [
        ("awq", "o_proj.qweight", "I32", [], None),
        ("awq", "o_proj.scales", "F16", [], 0),
        ("bitnet", "o_proj.weight", "U8", ["o_proj.weight_scale"], 0x55),
        ("bitsandbytes", "o_proj.weight", "BF16", [], 0),
        ("bitsandbytes", "o_proj.weight", "I8", ["o_proj.SCB"], 0),
        ("bitsandbytes", "o_proj.weight", "U8", [f"o_proj.weight{NF4}"], 0x77),
        ("bitsandbytes", "o_proj.weight.absmax", "F32", [], None),
        ("bitsandbytes", f"o_proj.weight{NF4}", "U8", [], None),
        ("compressed-tensors", "o_proj.weight_packed", "I32", [], 0),
        ("compressed-tensors", "o_proj.weight_scale", "BF16", [], 0),
        ("compressed-tensors", "o_proj.weight_shape", "I64", [], None),
        ("compressed-tensors", "o_proj.weight_global_scale", "F32", [], None),
        ("compressed-tensors", "o_proj.input_scale", "F32", [], None),
        ("fp8", "o_proj.weight_scale_inv", "F32", [], None),
        ("gptq", "o_proj.bias", "F16", [], 0),
        ("gptq", "o_proj.g_idx", "I32", [], None),
        ("mxfp4", "experts.down_proj_bias", "BF16", [], 0),
    ],
)  # fmt: skip
def test_which_byte_means_zero(
    method: str, name: str, dtype: str, beside: list[str], byte: int | None
) -> None:
    """Tensors that make the projection zero are filled; other tensors stay unchanged."""
    found = quantization_of({"quantization_config": {"quant_method": method}})
    assert found.zero_byte(name, tensor(dtype), beside) == byte


def test_integers_without_a_method_are_refused() -> None:
    """Integers without a quantization method are refused: zero bytes may mean any number."""
    with pytest.raises(RefusedError, match=r"\bo_proj\.weight\b.*\bU8\b"):
        quantization_of({}).zero_byte("o_proj.weight", tensor("U8"), [])


SOURCES = [0, 1, 1, 2, 3, 3]
STACKS = ("model.layers", "transformer.h")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["lm_head", "layers.1.mlp"], ["lm_head", "layers.1.mlp", "layers.2.mlp"]),
        (["layers.2"], ["layers.3"]),
        (["visual.blocks.2", "mtp.layers.0.mlp"], ["visual.blocks.2", "mtp.layers.0.mlp"]),
        (["model.layers.0.mlp.experts.3.up"], ["model.layers.0.mlp.experts.3.up"]),
        (["model.layers.4.eh_proj"], ["model.layers.6.eh_proj"]),
        ({"transformer.h.3.attn": 4}, {"transformer.h.4.attn": 4, "transformer.h.5.attn": 4}),
        ({"group_0": {"targets": ["Linear"]}}, {"group_0": {"targets": ["Linear"]}}),
        (["re:.*mlp.gate$", "layers.*.self_attn"], ["re:.*mlp.gate$", "layers.*.self_attn"]),
    ],
)  # fmt: skip
def test_names_of_modules_follow_their_layers(before: Any, after: Any) -> None:
    """Copies get the entries of their source, names behind the layers get the next index."""
    assert reindexed(before, SOURCES, 4, STACKS) == after


def test_patterns_that_name_certain_layers_are_refused() -> None:
    """A pattern that names layer numbers is refused, because it may match new layers."""
    with pytest.raises(RefusedError, match=r"'re:\.\*layers\.\[0-3\]\.mlp'"):
        reindexed(["re:.*layers.[0-3].mlp"], SOURCES, 4, STACKS)
