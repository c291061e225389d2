"""Damped repetition: each of K occurrences of a layer adds 1/K of its update."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from gguf_files import make_gguf
from harness import Cli, assert_same_tensors, load_tensors, logits, make_llama
from safetensors.torch import save_file

import mergekit_interleave as api
from mergekit_interleave.architectures import family as families
from mergekit_interleave.errors import RefusedError

SOON = frozenset(
    ["beam", "bloom", "gemma2", "gpt2", "llama", "nemotron_h", "olmo_hybrid", "opt", "phi3",
     "qwen3_moe", "reformer", "zamba"]
)  # fmt: skip
"""The types that are compared soon: one per kind of residual addition."""

MORE_THAN_ADDED = [
    name for name in families.known_types()
    if (family := families.family_of(name)) and not family.adds_updates
]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SOON else [pytest.mark.slow])
        for name in zoo.names()
        if name.partition(":")[0] not in MORE_THAN_ADDED
    ],
)
def test_updates_are_divided(name: str, tmp_path: Path) -> None:
    """A damped model computes what a plain one does if each addition to its stream is halved."""
    zoo.quiet()
    try:
        base = zoo.save(name, tmp_path / "base")
    except Exception as error:  # noqa: BLE001 - whatever transformers raises
        pytest.skip(f"transformers cannot build it: {error}"[:100])
    outcome = zoo.damped(base, tmp_path)
    assert outcome.result == "exact" or (name not in SOON and outcome.result == "refused"), outcome


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if name in {"axk1", "doge", "gemma4_text"} else pytest.mark.slow
        )
        for name in MORE_THAN_ADDED
    ],
)
def test_layers_that_do_more_than_add_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A type is refused exactly if dividing its writers does not halve what it adds."""
    zoo.quiet()
    base = zoo.save(name, tmp_path / "base")
    assert zoo.damped(base, tmp_path).result == "refused"
    original = families.family_of_config

    def allowing(config: Any) -> Any:
        found = original(config)
        return found and dataclasses.replace(found, adds_updates=True)

    monkeypatch.setattr(families, "family_of_config", allowing)
    assert zoo.damped(base, tmp_path).result in {"wrong", "refused"}


def engine_of(out: Path) -> str:
    """Return the engine that wrote a model."""
    return str(json.loads((out / "interleave.json").read_text())["engine"])


class TestEngines:
    """Both engines write the same weights."""

    @pytest.mark.parametrize("times", [2, 4])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_powers_of_two(self, times: int, dtype: str, tmp_path: Path) -> None:
        """The stream engine divides by 2 and 4 as mergekit does, also in small float16 numbers."""
        base = make_llama(tmp_path / "base", dtype=getattr(torch, dtype))
        tensors = load_tensors(base)
        tensors["model.layers.2.mlp.down_proj.weight"] *= 1e-6  # below float16's normal numbers
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        line = f"repeat: {{layers: [2, 4], times: {times}, damped: true}}"
        for engine in ("mergekit", "stream"):
            api.run(line, tmp_path / engine, model=base, engine=engine)
            assert engine_of(tmp_path / engine) == engine
        assert_same_tensors(tmp_path / "mergekit", tmp_path / "stream")

    def test_nothing_is_rounded_in_bfloat16(self, tmp_path: Path) -> None:
        """For K = 2 and 4, the weights times K are those of the base, bit for bit."""
        base = make_llama(tmp_path / "base", dtype=torch.bfloat16)
        before = load_tensors(base)
        for times in (2, 4):
            out = tmp_path / str(times)
            api.run(f"repeat: {{layers: [2, 3], times: {times}, damped: true}}", out, model=base)
            after = load_tensors(out)
            for copy in range(times):
                for name in ("self_attn.o_proj", "mlp.down_proj"):
                    found = after[f"model.layers.{2 + copy}.{name}.weight"]
                    assert torch.equal(found * times, before[f"model.layers.2.{name}.weight"])
                same = f"model.layers.{2 + copy}.mlp.up_proj.weight"
                assert torch.equal(after[same], before["model.layers.2.mlp.up_proj.weight"])

    def test_other_factors_need_mergekit(self, tiny: Path, tmp_path: Path) -> None:
        """A factor that rounds is refused by the stream engine, and written by mergekit."""
        line = "repeat: {layers: [2, 4], times: 3, damped: true}"
        with pytest.raises(RefusedError, match=r"multiplied by 0\.333"):
            api.run(line, tmp_path / "out", model=tiny, engine="stream")
        api.run(line, tmp_path / "out", model=tiny)
        assert engine_of(tmp_path / "out") == "mergekit"
        assert api.verify(tmp_path / "out", against=tiny).is_exact

    def test_gains_of_one_plus_weight(self, mk: Cli, tmp_path: Path) -> None:
        """Gemma's gains are divided, not its weights; only `run` can write them, in any engine."""
        zoo.quiet()
        base, out = zoo.save("gemma2", tmp_path / "base"), tmp_path / "out"
        line = "repeat: {layers: [3, 4], times: 3, damped: true}"
        result = mk("gen", line, "--model", base)
        assert (result.status, result.out) == (1, "")
        api.run(line, out, model=base)
        assert engine_of(out) == "stream"
        assert api.verify(out, against=base).is_exact
        name = "model.layers.3.post_feedforward_layernorm.weight"
        gain, found = 1 + load_tensors(base)[name], 1 + load_tensors(out)[name]
        assert torch.allclose(found, gain / 3, rtol=0, atol=1e-6)
        entry = json.loads((out / "interleave.json").read_text())["layers"][3]
        assert {gain["fixed"] for gain in entry["gain"]} == {-1}


def test_a_loop_is_not_a_plain_repeat(tiny: Path, tmp_path: Path) -> None:
    """A damped model computes something else than its base and than the plain repeat."""
    outputs = [logits(tiny)]
    for name, line in (("plain", "repeat: [2, 4]"), ("damped", "repeat: [2, 4]")):
        api.run(line, tmp_path / name, model=tiny, damped=name == "damped")
        outputs.append(logits(tmp_path / name))
    assert not any(torch.equal(outputs[i], outputs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_card_says_that_the_base_is_changed(tiny: Path, tmp_path: Path) -> None:
    """The status and the sentence of the card say what is divided, and in which layers."""
    api.run("repeat: [2, 4]", tmp_path / "out", model=tiny, damped=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "**Status: untrained, changes its base.** Weights of original layers are scaled, too: 2, 4."
        in card
    )
    assert "1/2 of the update" in card


def test_a_block_of_layers_is_approximated(tiny: Path) -> None:
    """Only the plan of a damped block says that it approximates."""
    for line, warns in (("2:4@block", True), ("2:4", False)):
        plan = api.plan(repeat=line, damped=True, model=tiny)
        assert any("approximates" in warning for warning in plan.warnings) == warns
    assert not any("approximates" in w for w in api.plan(repeat="2:4@block", model=tiny).warnings)


class TestGguf:
    """GGUF files are damped as far as their types have plain floats."""

    @pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
    def test_plain_floats(self, kind: str, tmp_path: Path) -> None:
        """The residual writers of both occurrences are halved."""
        base = make_gguf(tmp_path / "base.gguf", kind=kind)
        api.run("repeat: {layers: [1, 2], damped: true}", tmp_path / "out.gguf", model=base)
        assert api.verify(tmp_path / "out.gguf", against=base).is_exact
        written = api.explain(tmp_path / "out.gguf")
        assert "damped: true" in written
        card = (tmp_path / "out.md").read_text()
        assert "**Status: untrained, changes its base.** " in card
        assert "Weights of original layers are scaled, too: 1." in card

    def test_the_plan_warns_as_for_a_directory(self, tmp_path: Path) -> None:
        """The warnings of the plan of a GGUF file are those of its directive, too."""
        base = make_gguf(tmp_path / "base.gguf", kind="F32")
        plan = api.plan(repeat="0:2@block", damped=True, model=base)
        assert any("approximates" in warning for warning in plan.warnings)

    def test_quantized_types(self, tmp_path: Path) -> None:
        """A quantized tensor cannot be halved exactly, so nothing is written."""
        base = make_gguf(tmp_path / "base.gguf", kind="Q8_0", hidden=256)
        with pytest.raises(RefusedError, match="Q8_0"):
            api.run("repeat: {layers: [1, 2], damped: true}", tmp_path / "out.gguf", model=base)
        assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]
