"""New layers that are the means of the layers before and behind them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from gguf_files import make_gguf
from harness import Cli, assert_same_tensors, load_tensors, make_llama
from safetensors.torch import save_file

import mergekit_interleave as api
from mergekit_interleave.errors import DirectiveError, RefusedError

LINE = "interleave: every 3, from: neighbours"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_both_engines(dtype: str, tmp_path: Path) -> None:
    """Both engines write the means, zeroed as usual, in the dtype of the base."""
    base = make_llama(tmp_path / "base", dtype=getattr(torch, dtype))
    for engine in ("mergekit", "stream"):
        api.run(LINE, tmp_path / engine, model=base, engine=engine)
        assert api.verify(tmp_path / engine, against=base).is_exact
    assert_same_tensors(tmp_path / "mergekit", tmp_path / "stream")
    before, after = load_tensors(base), load_tensors(tmp_path / "mergekit")
    name = "model.layers.{}.mlp.up_proj.weight".format
    mean = (before[name(2)].double() + before[name(3)].double()) / 2
    assert torch.equal(after[name(3)], mean.to(before[name(2)].dtype))
    assert not after["model.layers.3.mlp.down_proj.weight"].any()


def test_mergekit_yaml(tmp_path: Path) -> None:
    """The program mergekit-yaml writes the same from the YAML of `gen`, and `verify` accepts it."""
    base = make_llama(tmp_path / "base", dtype=torch.bfloat16)
    api.run(LINE, tmp_path / "run", model=base)
    (tmp_path / "cfg.yml").write_text(api.gen(LINE, model=base))
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), "cfg.yml", "yaml"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert_same_tensors(tmp_path / "run", tmp_path / "yaml")
    assert api.verify(tmp_path / "yaml", against=base).is_exact


def test_one_model_twice_in_a_slice() -> None:
    """The installed mergekit refuses it, so the second source must name its class."""
    from mergekit import merge_methods
    from mergekit.common import ModelReference

    model = ModelReference.parse("org/model")
    other = model.model_copy(update={"override_architecture": "LlamaForCausalLM"})
    linear = merge_methods.get("linear")
    linear.validate_inputs([model, other], None, group_name="slices[0]")
    with pytest.raises(ValueError, match="Duplicate"):
        linear.validate_inputs([model, model], None, group_name="slices[0]")


def test_negative_zeros_of_copies_stay(tmp_path: Path) -> None:
    """A linear merge of mergekit changes -0.0 to 0.0; here it only writes the means."""
    base = make_llama(tmp_path / "base")
    tensors = load_tensors(base)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = -0.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    api.run(LINE, tmp_path / "out", model=base, engine="mergekit")
    assert api.verify(tmp_path / "out", against=base).is_exact
    assert load_tensors(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"][0, 0].signbit()


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma3"])
@pytest.mark.parametrize("zero", ["", ", zero: none"])
def test_in_memory_too(name: str, zero: str, tmp_path: Path) -> None:
    """What `load` computes is what `run` writes, also for fused experts and composites."""
    zoo.quiet()
    base, line = zoo.save(name, tmp_path / "base"), f"interleave: every 2, from: neighbours{zero}"
    api.run(line, tmp_path / "out", model=base)
    grown = api.load(line, model=base, dtype="float32")
    models = map(zoo.aligned, (grown, zoo.load(tmp_path / "out")))
    assert zoo._say_the_same(*models)  # noqa: SLF001 - the comparison of `make zoo`


def test_an_identity_between_its_neighbours(tiny: Path, tmp_path: Path) -> None:
    """A zeroed mean passes its input on; a new layer without a layer behind it is a copy."""
    report = api.run("interleave: every 4, from: neighbours", tmp_path / "out", model=tiny)
    assert any(warning.startswith("from: ") for warning in report.warnings)
    assert api.verify(tmp_path / "out", against=tiny, forward=True).is_exact
    layers = json.loads((tmp_path / "out" / "interleave.json").read_text())["layers"]
    assert [layer.get("mean_with") for layer in layers] == [*[None] * 4, 4, *[None] * 5]
    assert "averaged neighbours" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "line",
    [LINE, "interleave: 2 layers, from: neighbors, zero: none",
     "interleave: after [1, 4], scale: {q_proj: 0.5}, from: neighbours"],
)  # fmt: skip
def test_explained(line: str, tiny: Path, tmp_path: Path) -> None:
    """`explain` finds the line of a model, of its recipe and of the YAML of `gen`."""
    api.run(line, tmp_path / "out", model=tiny)
    (tmp_path / "cfg.yml").write_text(api.gen(line, model=tiny))
    expected = (tmp_path / "out" / "interleave.json").read_text()
    for source in (tmp_path / "out", tmp_path / "cfg.yml"):
        found = api.explain(source).replace(f"model: {tiny.name}\n", f"model: {tiny}\n")
        assert "from: neighbours" in found
        api.run(found, tmp_path / "again", force=True)
        again = json.loads((tmp_path / "again" / "interleave.json").read_text())
        assert again["fingerprint"] == json.loads(expected)["fingerprint"]


def test_grown_again_and_verified_against_the_first_base(tiny: Path, tmp_path: Path) -> None:
    """A model with means can be grown again; its originals are those of its first base."""
    api.run(LINE, tmp_path / "one", model=tiny)
    api.run("append: 1", tmp_path / "two", model=tmp_path / "one")
    assert api.verify(tmp_path / "two", against=tmp_path / "one").is_exact
    assert api.verify(tmp_path / "two", against=tiny, trained=True).is_exact


def test_what_a_changed_mean_is(tiny: Path, tmp_path: Path) -> None:
    """`verify` names the two layers of a mean that is not one, with and without the base."""
    api.run(f"{LINE}, zero: none", tmp_path / "out", model=tiny)
    tensors = load_tensors(tmp_path / "out")
    tensors["model.layers.3.mlp.up_proj.weight"] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    for against in (tiny, None):
        report = api.verify(tmp_path / "out", against=against)
        assert not report.is_exact
        assert {found.tensor for found in report.differences} == {
            "model.layers.3.mlp.up_proj.weight"
        }
        assert "averaged with" in report.differences[0].what


class TestRefused:
    """What has no mean is refused before anything is written."""

    @pytest.mark.parametrize("line", ["append: 1", "repeat: [2, 4]", "stack: [[0, 4], [2, 8]]"])
    def test_other_growth_lines(self, line: str, tiny: Path) -> None:
        """Only the new layers of `interleave` have neighbours."""
        with pytest.raises(DirectiveError, match=r"^from: "):
            api.plan(f"{line}, from: neighbours", model=tiny)

    def test_layers_of_different_kinds(self, tmp_path: Path) -> None:
        """A dense layer and one with experts have no mean; two of one kind have."""
        zoo.quiet()
        base = zoo.save("qwen3_moe", tmp_path / "base")
        with pytest.raises(RefusedError, match=r"^from: "):
            api.plan("interleave: every 2, from: neighbours", model=base)

    def test_quantized_types(self, tmp_path: Path) -> None:
        """A quantized tensor has no exact mean; plain floats of a GGUF file have one."""
        for kind in ("Q8_0", "F16"):
            base, out = (
                make_gguf(tmp_path / f"{kind}.gguf", kind=kind),
                tmp_path / f"{kind}-out.gguf",
            )
            if kind == "F16":
                api.run("interleave: after [0], from: neighbours", out, model=base)
                assert api.verify(out, against=base).is_exact
                continue
            with pytest.raises(RefusedError, match=r"^from: "):
                api.run("interleave: after [0], from: neighbours", out, model=base)
            assert not out.exists()

    def test_gen_without_a_class_name(self, mk: Cli) -> None:
        """`gen` without a config says that mergekit needs the class name."""
        assert mk("gen", LINE, "--model", "org/name", "--layers", "8").status == 0
        result = mk("gen", LINE, "--model", "org/name@v1", "--layers", "8")
        assert (result.status, result.out) == (2, "")
        assert result.err.splitlines()[-1].startswith("hint: ")
