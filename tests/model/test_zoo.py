"""The whole pipeline works for one model type per rule of the data; `make zoo` runs all types."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import stored
import torch
import zoo
from harness import Cli, load_tensors
from safetensors.torch import save_file

from mergekit_interleave.architectures import family as families

EXACT = [
    ("qwen2", "a per-layer list in config.json, and a leading count"),
    ("gpt2", "another depth key, other residual writers, biases"),
    ("bloom", "writers whose names must not match parts of other names"),
    ("gemma2", "sliding windows that alternate"),
    ("gemma3_text", "sliding windows with a period"),
    ("qwen3_moe", "dense layers placed by decoder_sparse_step"),
    ("deepseek_v2", "leading dense layers"),
    ("llama4_text", "experts placed by indices, a list of zeros and ones"),
    ("recurrent_gemma", "a cyclic per-layer list"),
    ("minicpm3", "residuals scaled by the depth"),
    ("gpt_oss", "fused experts, tensors that mergekit does not know"),
    ("mbart", "a decoder without its encoder, whose cache is sized by the encoder's depth"),
    ("nemotron_h", "a depth that only a list states"),
    ("hrm_text", "two stacks that grow together, a multiple of the depth"),
    ("hy_v4", "layers that reuse the indexer result of earlier ones"),
    ("inkling2_text", "blocks at multiples, tensors outside the layers indexed by layer"),
    ("rwkv", "halvings at multiples, a norm that only the first layer has"),
    ("ernie4_5_moe", "experts from one layer to another"),
    ("doge", "residual multipliers filled with ones"),
    ("minimax", "norms filled with ones, buffers that hold the layer index"),
    ("deepseek_v4", "matrices that mix streams, filled with an identity"),
    ("longcat_flash", "a tensor of which only a part is filled"),
    ("gemma4_text", "tensors with one block per layer, layers that share keys and values"),
    ("qwen4_exp_text", "tables that copies do not get"),
    ("gpt_neo", "a list that is also written as runs"),
    ("gemma3", "a composite that mergekit knows by modules"),
    ("gemma4", "a composite that mergekit does not know"),
    ("qwen3_5", "a composite whose type is also a text model"),
    ("llama4", "a composite whose layers differ"),
]


@pytest.mark.parametrize(("name", "rule"), EXACT, ids=[name for name, _ in EXACT])
def test_expansions_are_exact(name: str, rule: str, tmp_path: Path) -> None:
    """If every second layer is copied, logits and greedy text equal the base's, also for images."""
    zoo.quiet()
    base = zoo.save(name, tmp_path / "base")
    outcome = zoo.expand(base, zoo.EVERY, tmp_path / "out")
    assert outcome.result == "exact", (rule, outcome)


SOON_IN_MEMORY = frozenset(
    ["bloom", "ernie4_5_moe", "gemma2", "gemma4_text", "llama4_text", "nemotron_h", "qwen2", "rwkv"]
)
"""The types whose layouts are compared soon; those of others take up to half a minute."""


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(*row, marks=[] if row[0] in SOON_IN_MEMORY else [pytest.mark.slow])
        for row in EXACT
    ],
    ids=[name for name, _ in EXACT],
)
def test_models_in_memory_are_the_written_ones(name: str, rule: str, tmp_path: Path) -> None:
    """Logits and text, with and without a cache, are equal to the bit for each possible layout."""
    zoo.quiet()
    base = zoo.save(name, tmp_path / "base")
    zoo.finetune(base, tmp_path / "finetune")
    outcome = zoo.in_memory(base, tmp_path)
    assert outcome.result == "exact", (rule, outcome)


@pytest.mark.parametrize("name", ["gpt2", "qwen2_moe"])
def test_no_tensor_is_zeroed_needlessly(name: str, tmp_path: Path) -> None:
    """Each zeroed tensor is needed for the identity and gets a gradient."""
    zoo.quiet()
    base = zoo.save(name, tmp_path / "base")
    assert zoo.expand(base, zoo.EVERY, tmp_path / "out").result == "exact"
    assert not zoo.in_vain(base, tmp_path / "out")


@pytest.mark.parametrize("name", ["qwen2_moe", "bamba", "gemma4_unified_text", "granite_swa"])
def test_uneven_expansions_are_exact(name: str, tmp_path: Path) -> None:
    """One copied layer, and two layers repeated three times, give exact models."""
    zoo.quiet()
    base = zoo.save(name, tmp_path / "base")
    for plan in ("one copy", "thrice"):
        outcome = zoo.expand(base, zoo.PLANS[plan], tmp_path / plan)
        possible = ("exact", "refused") if name.startswith("gemma4") else ("exact",)
        assert outcome.result in possible, (plan, outcome)


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "olmo_hybrid"])
def test_zeroed_norms_are_exact(name: str, mk: Cli, tmp_path: Path) -> None:
    """With `zero: norms` the norms output zero, and the projections keep their values."""
    zoo.quiet()
    base, out = zoo.save(name, tmp_path / "base"), tmp_path / "out"
    outcome = zoo.expand(base, "interleave: every 3, zero: norms", out)
    assert outcome.result == "exact", outcome
    before, after = load_tensors(base), load_tensors(out)
    norm = "model.layers.{}.post_feedforward_layernorm.weight".format
    projection = "model.layers.{}.self_attn.o_proj.weight".format
    value = -1.0 if name == "gemma2" else 0.0
    assert torch.equal(after[norm(3)], torch.full_like(after[norm(3)], value))
    assert torch.equal(after[projection(3)], before[projection(2)])
    layers = json.loads((out / "interleave.json").read_text())["layers"]
    closed = layers[3]["set" if name == "gemma2" else "zeroed"]
    assert "post_feedforward_layernorm.weight" in closed
    result = mk("gen", "interleave: every 3, zero: norms", "--model", base)
    if name == "gemma2":
        assert (result.status, result.out) == (1, "")
        assert "`mk-interleave run`" in result.err
        recipe = (out / "mergekit_config.yml").read_text()
        assert recipe.startswith("# ")
        assert "post_attention" in recipe.splitlines()[0]
    if name == "olmo2":
        assert result.status == 0, result.err


def test_a_type_without_output_norms_has_no_norms_to_zero(mk: Cli, tiny: Path) -> None:
    """`zero: norms` is refused for Llama, whose post_attention_layernorm is an input norm."""
    result = mk("gen", "interleave: every 4, zero: norms", "--model", tiny)
    assert result.status == 1
    assert "llama" in result.err
    assert "`zero: auto`" in result.err


def test_auto_warns_of_zeroed_projections_under_norms(mk: Cli, tmp_path: Path) -> None:
    """`zero: auto` gives one warning if output norms follow the projections."""
    zoo.quiet()
    base = zoo.save("olmo2", tmp_path / "base")
    stderr = mk("gen", "interleave: every 4", "--model", base).err
    assert stderr.count("`zero: norms`") == 1
    stderr = mk("gen", "interleave: every 4, zero: norms", "--model", base).err
    assert "`zero: norms`" not in stderr


def test_messages_of_libraries_are_not_printed(tmp_path: Path) -> None:
    """Warnings of libraries about an unknown model type are not printed."""
    zoo.quiet()
    zoo.save("gpt_oss", tmp_path / "base")
    command = [sys.executable, "-m", "mergekit_interleave", "run", "append: 1", "out"]
    result = subprocess.run(
        [*command, "--model", "base"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    ours = ("note: ", "hint: ", "warning: llama.cpp ")
    assert all(line.startswith(ours) for line in result.stderr.splitlines()), result.stderr


def test_a_suggestion_keeps_the_zero_key(mk: Cli, tmp_path: Path) -> None:
    """A suggested directive differs from the user's in the growth line only."""
    zoo.quiet()
    base = zoo.save("gpt_neox_japanese", tmp_path / "base")
    for zero in ("none", "[dense., dense_4h_to_h, dense_bias]"):
        result = mk("run", f"append: 1, zero: {zero}", tmp_path / "out", "--model", base)
        assert result.status == 1
        assert result.err.splitlines()[-1].endswith(f", zero: {zero}")


REFUSED = [
    ("bert", zoo.EVERY, "(post-norm)", ""),
    ("diffllama", zoo.EVERY, "index", ""),
    ("gpt2:inverse", zoo.EVERY, "index", ""),
    ("gemma3n_text", zoo.EVERY, "(AltUp)", ""),
    ("jamba", zoo.EVERY, "expert_layer_period, expert_layer_offset", "stack: "),
    ("ernie4_5_moe:interval2", zoo.EVERY, "moe_layer_interval", "stack: "),
    ("rwkv", "interleave: every 3", "rescale_every", "interleave: every 2"),
    ("gpt_neox_japanese", "append: 1", "gpt_neox_japanese", "every"),
    ("modernbert-decoder", "interleave: every 1", "modernbert-decoder", "every 2"),
    ("qwen3_vl", "interleave: every 2", "vision_config.deepstack_visual_indexes", "every 3"),
]


@pytest.mark.parametrize(
    ("name", "plan", "reason", "works"), REFUSED, ids=[name for name, *_ in REFUSED]
)
def test_what_cannot_be_exact_is_refused(
    name: str, plan: str, reason: str, works: str, tmp_path: Path
) -> None:
    """The error names the reason, OUT is absent, and the suggested directive works."""
    zoo.quiet()
    base = zoo.save(name, tmp_path / "base")
    outcome = zoo.expand(base, plan, tmp_path / "out")
    assert outcome.result == "refused", outcome
    assert reason in outcome.detail
    assert works in outcome.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    if works:
        assert zoo.expand(base, outcome.hint, tmp_path / "out").result == "exact"


@pytest.mark.parametrize("name", ["gpt2", "smollm3"])
def test_both_engines_write_the_same(name: str, mk: Cli, tmp_path: Path) -> None:
    """Mergekit and the stream engine write equal tensors."""
    zoo.quiet()
    base, out = zoo.save(name, tmp_path / "base"), tmp_path / "out"
    assert mk("run", zoo.EVERY, out, "--model", base, "--engine", "mergekit").status == 0
    assert zoo.engines_agree(base, out, tmp_path / "again")


def test_fused_experts_are_zeroed_under_either_name(tmp_path: Path) -> None:
    """Transformers reads fused experts by two names, so `residual_writers` must match both."""
    zoo.quiet()
    base = zoo.save("mixtral", tmp_path / "base")
    tensors = load_tensors(base)
    fused = {n: t for n, t in tensors.items() if ".experts." not in n}
    for i in range(8):
        stem = f"model.layers.{i}.block_sparse_moe.experts"
        one, two, three = (
            torch.stack([tensors[f"{stem}.{e}.w{w}.weight"] for e in range(4)]) for w in (1, 2, 3)
        )
        mlp = f"model.layers.{i}.mlp"
        fused[f"{mlp}.experts.gate_up_proj"] = torch.cat([one, three], dim=1)
        fused[f"{mlp}.experts.down_proj"] = two
        fused[f"{mlp}.gate.weight"] = fused.pop(f"model.layers.{i}.block_sparse_moe.gate.weight")
    save_file(fused, base / "model.safetensors", metadata={"format": "pt"})
    assert zoo.expand(base, zoo.EVERY, tmp_path / "out").result == "exact"


def test_names_without_the_head_are_read(tmp_path: Path) -> None:
    """Names without the `transformer.` prefix work, as in the published GPT-2 checkpoint."""
    zoo.quiet()
    base = zoo.save("gpt2", tmp_path / "base")
    bare = {n.removeprefix("transformer."): t for n, t in load_tensors(base).items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    assert zoo.expand(base, zoo.EVERY, tmp_path / "out").result == "exact"
    assert "h.11.attn.c_proj.weight" in load_tensors(tmp_path / "out")


class TestGen:
    """`gen` warns of results that plain mergekit-yaml gets wrong, or refuses the recipe."""

    def test_a_broken_config_is_a_warning(self, mk: Cli, tmp_path: Path) -> None:
        """If mergekit writes a wrong config.json, the warning names the command that repairs it."""
        base = zoo.save("qwen3", tmp_path / "base")
        result = mk("gen", zoo.EVERY, "--model", base)
        assert result.status == 0
        assert "`mk-interleave fix-config OUT --recipe FILE`" in result.err

    def test_wrong_tensors_are_an_error(self, mk: Cli, tmp_path: Path) -> None:
        """If mergekit writes wrong tensors, the hint names `mk-interleave run`."""
        base = zoo.save("exaone_moe", tmp_path / "base")
        result = mk("gen", zoo.EVERY, "--model", base)
        assert (result.status, result.out) == (1, "")
        assert "exaone_moe" in result.err
        assert re.search("^hint: .*`mk-interleave run`", result.err, re.MULTILINE)

    def test_quantized_tensors(self, mk: Cli, tmp_path: Path) -> None:
        """Quantized tensors are refused, because mergekit would drop their scales."""
        result = mk("gen", zoo.EVERY, "--model", stored.fp8(tmp_path / "base"))
        assert result.status == 1
        assert "qwen3" in result.err
        assert "quantized" in result.err

    def test_explicit_slices(self, mk: Cli, tmp_path: Path) -> None:
        """A mergekit config is checked like a growth line."""
        base = zoo.save("qwen3_moe", tmp_path / "base")
        (tmp_path / "cfg.yml").write_text(
            f"slices:\n- sources: [{{model: {base}, layer_range: [0, 6]}}]\n"
            f"- sources: [{{model: {base}, layer_range: [2, 8]}}]\nmerge_method: passthrough\n"
        )
        result = mk("gen", tmp_path / "cfg.yml")
        assert (result.status, "qwen3_moe" in result.err) == (1, True), result.err
        assert re.search("^hint: .*`mk-interleave run`", result.err, re.MULTILINE)

    def test_a_layout_that_config_json_cannot_represent(self, mk: Cli, tmp_path: Path) -> None:
        """A layout that config.json cannot represent is refused, though mergekit would write it."""
        base = zoo.save("qwen3_vl", tmp_path / "base")
        result = mk("gen", "interleave: every 1", "--model", base)
        assert result.status == 1
        assert "deepstack_visual_indexes" in result.err

    def test_a_list_in_a_config_that_is_copied(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """A list that does not have the new depth gives a warning, because mergekit fails on it."""
        config = json.loads((tiny / "config.json").read_text())
        config["layer_types"] = ["full_attention"] * 8
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert "fix-config" in mk("gen", zoo.EVERY, "--model", tmp_path).err

    def test_other_modules_must_be_whole(self, mk: Cli, tmp_path: Path) -> None:
        """Other modules are copied whole, so a config that changes them is refused."""
        zoo.quiet()
        base = zoo.save("gemma3", tmp_path / "base")
        recipe = mk("gen", zoo.EVERY, "--model", base).out
        shorter = recipe.replace("layer_range: [0, 2]\nmerge", "layer_range: [0, 1]\nmerge")
        scaled = recipe.replace("[0, 2]\nmerge", "[0, 2]\n        parameters: {scale: 0.5}\nmerge")
        for text in (shorter, scaled):
            (tmp_path / "cfg.yml").write_text(text)
            for words in (["gen", tmp_path / "cfg.yml"], ["run", tmp_path / "cfg.yml", "out"]):
                result = mk(*words)
                assert result.status == 1
                assert "vision_tower" in result.err

    def test_biases_that_mergekit_loses(self, mk: Cli, tmp_path: Path, tiny: Path) -> None:
        """A Llama with biases is refused, because mergekit's definition of Llama has none."""
        config = json.loads((tiny / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
        result = mk("gen", zoo.EVERY, "--model", tmp_path)
        assert result.status == 1
        assert re.search("^hint: .*`mk-interleave run`", result.err, re.MULTILINE)

    def test_a_directory_that_mergekit_takes_for_a_hub_id(
        self, mk: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`gen` warns of a path that mergekit looks up on the Hub, as long as mergekit does so."""
        from huggingface_hub.errors import OfflineModeIsEnabled
        from mergekit.card import is_hf

        with monkeypatch.context() as patch, pytest.raises(OfflineModeIsEnabled):
            patch.chdir(tiny.parent)
            is_hf(tiny.name)
        stderr = mk("gen", zoo.EVERY, "--model", tiny.name, cwd=tiny.parent).err
        assert re.search(rf"^warning: .*\./{tiny.name}\b", stderr), stderr
        assert not mk("gen", zoo.EVERY, "--model", f"./{tiny.name}", cwd=tiny.parent).err

    def test_modules(self, mk: Cli, tmp_path: Path) -> None:
        """A recipe for images and text has each module by its name, and is exact."""
        zoo.quiet()
        base = zoo.save("gemma3", tmp_path / "base")
        result = mk("gen", zoo.EVERY, "--model", base)
        assert result.status == 0, result.err
        (tmp_path / "cfg.yml").write_text(result.out)
        assert "vision_tower:" in result.out
        assert mk("gen", tmp_path / "cfg.yml").out == result.out
        outcome = zoo.expand(base, str(tmp_path / "cfg.yml"), tmp_path / "out")
        assert outcome == zoo.Outcome("exact", "mergekit")


ALIKE = {
    ("axk2", "layer_types"),
    ("deepseek_v32", "layer_types"),
    ("glm_moe_dsa", "layer_types"),
    ("hy_v4", "layer_types"),
    ("inkling2_text", "mlp_layer_types"),
}
"""Lists whose entries are all equal, because these model types have only one layer type."""


def test_toy_layers_differ_where_a_family_says_that_they_can() -> None:
    """Per-layer lists of the toys have different entries, so that a wrong order is detected."""
    zoo.quiet()
    alike = set()
    for name in {*families.known_types()} & {*zoo.names()}:
        family = families.family_of(name)
        assert family is not None
        if family.refused:
            continue
        config = zoo.toys.config(name)
        for key in family.facts.per_layer_lists:
            entries = getattr(config, key, None) or []
            alike |= {(name, key)} if len({str(entry) for entry in entries}) < 2 else set()
        for key in family.facts.leading_counts:
            assert 0 < getattr(config, key) < config.num_hidden_layers, (name, key)
    assert alike == ALIKE


def test_the_data_is_written_as_the_zoo_writes_it() -> None:
    """The data has one line per family, so that a diff shows one family per line."""
    text = families.DATA.read_text(encoding="utf-8")
    assert text == zoo.lines(json.loads(text))


@pytest.mark.parametrize("model_type", ["diffllama", "bert"])
def test_one_type_is_checked_and_nothing_written(
    model_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checked type prints the row of the page, and no file changes."""
    page = Path(__file__).parents[2] / "docs" / "architectures.md"
    before = page.read_bytes(), families.DATA.read_bytes()
    assert zoo.check_one(model_type) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith(f"| {model_type} | refused | ")
    assert row in page.read_text(encoding="utf-8").splitlines()
    assert (page.read_bytes(), families.DATA.read_bytes()) == before


def test_a_type_that_transformers_lacks_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown type is an error that suggests types with a similar name."""
    assert zoo.check_one("lama") == 1
    assert "llama" in capsys.readouterr().out
