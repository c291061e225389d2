"""One type for each rule of the data file, through the real pipeline; `make zoo` runs them all."""

from __future__ import annotations

import json
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
    ("qwen2", "a list that is in the file, and a count of layers at the start"),
    ("gpt2", "another key for the depth, other names to zero, biases"),
    ("bloom", "names that are no part of others"),
    ("gemma2", "windows whose parity would shift"),
    ("gemma3_text", "windows whose period would shift"),
    ("qwen3_moe", "dense layers placed by a step"),
    ("deepseek_v2", "dense layers first"),
    ("llama4_text", "experts placed by indices, a list of zeros and ones"),
    ("recurrent_gemma", "a pattern that is repeated"),
    ("minicpm3", "a scale over the root of the depth"),
    ("gpt_oss", "fused experts, tensors that mergekit does not know"),
    ("mbart", "a decoder alone, whose cache is sized by the encoder's depth"),
    ("nemotron_h", "a depth that only a list states"),
    ("hrm_text", "two stacks that grow together, a multiple of the depth"),
    ("hy_v4", "layers that use what earlier ones computed"),
    ("inkling2_text", "boundaries at multiples, tensors beside the layers"),
    ("rwkv", "halvings at multiples, a norm that only the first layer has"),
    ("ernie4_5_moe", "experts from one layer to another"),
    ("doge", "gains of the residual that are filled with ones"),
    ("minimax", "norms that are filled with ones, buffers that hold the index"),
    ("deepseek_v4", "matrices that mix streams, filled with an identity"),
    ("longcat_flash", "a part of a tensor that is filled"),
    ("gemma4_text", "blocks for each layer in one tensor, layers that share keys and values"),
    ("qwen4_exp_text", "tables that no copy has"),
    ("gpt_neo", "a list that is also spelled as runs"),
    ("gemma3", "a language model in another, which mergekit knows by modules"),
    ("gemma4", "one that mergekit does not know"),
    ("qwen3_5", "one that is also a model of words alone"),
    ("llama4", "one whose layers differ"),
]


@pytest.mark.parametrize(("name", "rule"), EXACT, ids=[name for name, _ in EXACT])
def test_expansions_are_exact(name: str, rule: str, tmp_path: Path) -> None:
    """Logits and greedy text are the base's, on every 2nd layer; so are those with an image."""
    zoo.quiet()
    base = zoo.save(name, tmp_path / "base")
    outcome = zoo.expand(base, zoo.EVERY, tmp_path / "out")
    assert outcome.result == "exact", (rule, outcome)


@pytest.mark.parametrize("name", ["gpt2", "qwen2_moe"])
def test_no_tensor_is_zeroed_in_vain(name: str, tmp_path: Path) -> None:
    """Each is needed for the identity, and gets a gradient to be trained by."""
    zoo.quiet()
    base = zoo.save(name, tmp_path / "base")
    assert zoo.expand(base, zoo.EVERY, tmp_path / "out").result == "exact"
    assert not zoo.in_vain(base, tmp_path / "out")


@pytest.mark.parametrize("name", ["qwen2_moe", "bamba", "gemma4_unified_text", "granite_swa"])
def test_uneven_expansions_are_exact(name: str, tmp_path: Path) -> None:
    """One middle layer, and every layer or two of them three times."""
    zoo.quiet()
    base = zoo.save(name, tmp_path / "base")
    for plan in ("one copy", "thrice"):
        outcome = zoo.expand(base, zoo.PLANS[plan], tmp_path / plan)
        possible = ("exact", "refused") if name.startswith("gemma4") else ("exact",)
        assert outcome.result in possible, (plan, outcome)


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "olmo_hybrid"])
def test_closed_gains_are_exact(name: str, mk: Cli, tmp_path: Path) -> None:
    """The norms after the projections let nothing pass; the projections are as they were."""
    zoo.quiet()
    base, out = zoo.save(name, tmp_path / "base"), tmp_path / "out"
    outcome = zoo.expand(base, "interleave: every 3, zero: gains", out)
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
    said = mk("gen", "interleave: every 3, zero: gains", "--model", base)
    if name == "gemma2":
        assert (said.status, "mergekit config" in said.err) == (1, True)
        assert "`mk-interleave run`" in said.err
        recipe = (out / "mergekit_config.yml").read_text()
        assert recipe.startswith("# not supported by mergekit: in the new layers, post_attention")
    if name == "olmo2":
        assert said.status == 0, said.err


def test_a_type_without_such_norms_has_no_gains_to_close(mk: Cli, tiny: Path) -> None:
    """A Llama's post_attention_layernorm is none of them."""
    result = mk("gen", "interleave: every 4, zero: gains", "--model", tiny)
    assert result.status == 1
    assert "model type llama has no norms between its projections" in result.err
    assert "hint: `zero: auto`" in result.err


def test_auto_says_what_zeroed_projections_do_under_norms(mk: Cli, tmp_path: Path) -> None:
    """In one line, and only for `auto`."""
    zoo.quiet()
    base = zoo.save("olmo2", tmp_path / "base")
    said = mk("gen", "interleave: every 4", "--model", base).err
    assert said.count("`zero: gains` closes the norms instead") == 1
    said = mk("gen", "interleave: every 4, zero: gains", "--model", base).err
    assert "closes the norms instead" not in said


def test_the_libraries_keep_their_words_to_themselves(tmp_path: Path) -> None:
    """They say a lot of a model that mergekit has no definition of."""
    zoo.quiet()
    zoo.save("gpt_oss", tmp_path / "base")
    command = [sys.executable, "-m", "mergekit_interleave", "run", "append: 1", "out"]
    result = subprocess.run(
        [*command, "--model", "base"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert all(line.startswith(("note: ", "hint: ")) for line in result.stderr.splitlines()), (
        result.stderr
    )


def test_a_suggestion_zeroes_what_was_to_be_zeroed(mk: Cli, tmp_path: Path) -> None:
    """It is another growth line, and nothing else."""
    zoo.quiet()
    base = zoo.save("gpt_neox_japanese", tmp_path / "base")
    for zero in ("none", "[dense., dense_4h_to_h, dense_bias]"):
        result = mk("run", f"append: 1, zero: {zero}", tmp_path / "out", "--model", base)
        assert result.status == 1
        assert result.err.splitlines()[-1].endswith(f", zero: {zero}")


REFUSED = [
    ("bert", zoo.EVERY, "end in a norm of the sum", ""),
    ("diffllama", zoo.EVERY, "compute with their own index", ""),
    ("gpt2:inverse", zoo.EVERY, "compute with their own index", ""),
    ("gemma3n_text", zoo.EVERY, "mix several streams", ""),
    ("jamba", zoo.EVERY, "expert_layer_period, expert_layer_offset", "stack: "),
    ("ernie4_5_moe:interval2", zoo.EVERY, "moe_layer_interval", "stack: "),
    ("rwkv", "interleave: every 3", "rescale_every", "interleave: every 2"),
    ("gpt_neox_japanese", "append: 1", "the last layer of a model of type", "every"),
    ("modernbert-decoder", "interleave: every 1", "the first layer of a model of", "every 2"),
    ("qwen3_vl", "interleave: every 2", "vision_config.deepstack_visual_indexes", "every 3"),
]


@pytest.mark.parametrize(
    ("name", "plan", "reason", "works"), REFUSED, ids=[name for name, *_ in REFUSED]
)
def test_what_cannot_be_exact_is_refused(
    name: str, plan: str, reason: str, works: str, tmp_path: Path
) -> None:
    """With a reason that is true of it, nothing at OUT, and a directive that does work."""
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
    """Where mergekit writes at all."""
    zoo.quiet()
    base, out = zoo.save(name, tmp_path / "base"), tmp_path / "out"
    assert mk("run", zoo.EVERY, out, "--model", base, "--engine", "mergekit").status == 0
    assert zoo.engines_agree(base, out, tmp_path / "again")


def test_fused_experts_are_zeroed_under_either_name(tmp_path: Path) -> None:
    """Transformers reads both; a name that none of the writers has would leave them standing."""
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
    """As GPT-2's own checkpoint has them: `h.0`, not `transformer.h.0`."""
    zoo.quiet()
    base = zoo.save("gpt2", tmp_path / "base")
    bare = {n.removeprefix("transformer."): t for n, t in load_tensors(base).items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    assert zoo.expand(base, zoo.EVERY, tmp_path / "out").result == "exact"
    assert "h.11.attn.c_proj.weight" in load_tensors(tmp_path / "out")


class TestGen:
    """What plain mergekit-yaml would make of the recipe is said, or the recipe is refused."""

    def test_a_broken_config_is_a_warning(self, mk: Cli, tmp_path: Path) -> None:
        """It names the command that mends it."""
        base = zoo.save("qwen3", tmp_path / "base")
        result = mk("gen", zoo.EVERY, "--model", base)
        assert result.status == 0
        assert "`mk-interleave fix-config OUT --recipe FILE`" in result.err

    def test_wrong_tensors_are_an_error(self, mk: Cli, tmp_path: Path) -> None:
        """It names the command that writes them."""
        base = zoo.save("exaone_moe", tmp_path / "base")
        result = mk("gen", zoo.EVERY, "--model", base)
        assert (result.status, result.out) == (1, "")
        assert "mergekit-yaml alone writes wrong tensors for model type exaone_moe" in result.err
        assert "hint: `mk-interleave run`" in result.err

    def test_quantized_tensors(self, mk: Cli, tmp_path: Path) -> None:
        """Of which mergekit knows nothing: it would leave out their scales."""
        result = mk("gen", zoo.EVERY, "--model", stored.fp8(tmp_path / "base"))
        assert result.status == 1
        assert "for model type qwen3, quantized" in result.err

    def test_slices_that_are_spelled_out(self, mk: Cli, tmp_path: Path) -> None:
        """Are held to the same."""
        base = zoo.save("qwen3_moe", tmp_path / "base")
        (tmp_path / "cfg.yml").write_text(
            f"slices:\n- sources: [{{model: {base}, layer_range: [0, 6]}}]\n"
            f"- sources: [{{model: {base}, layer_range: [2, 8]}}]\nmerge_method: passthrough\n"
        )
        assert mk("gen", tmp_path / "cfg.yml").status == 1

    def test_what_no_config_can_say(self, mk: Cli, tmp_path: Path) -> None:
        """Mergekit would write it all the same."""
        base = zoo.save("qwen3_vl", tmp_path / "base")
        result = mk("gen", "interleave: every 1", "--model", base)
        assert result.status == 1
        assert "deepstack_visual_indexes has 3 entries" in result.err

    def test_a_list_in_a_config_that_is_copied(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """Mergekit stops at its length."""
        config = json.loads((tiny / "config.json").read_text())
        config["layer_types"] = ["full_attention"] * 8
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert "fix-config" in mk("gen", zoo.EVERY, "--model", tmp_path).err

    def test_other_modules_must_be_whole(self, mk: Cli, tmp_path: Path) -> None:
        """They are passed on whole, so that nothing else may be said."""
        zoo.quiet()
        base = zoo.save("gemma3", tmp_path / "base")
        recipe = mk("gen", zoo.EVERY, "--model", base).out
        shorter = recipe.replace("layer_range: [0, 2]\nmerge", "layer_range: [0, 1]\nmerge")
        scaled = recipe.replace("[0, 2]\nmerge", "[0, 2]\n        parameters: {scale: 0.5}\nmerge")
        for text, reason in ((shorter, "is not all of it"), (scaled, "vision_tower is changed")):
            (tmp_path / "cfg.yml").write_text(text)
            for words in (["gen", tmp_path / "cfg.yml"], ["run", tmp_path / "cfg.yml", "out"]):
                result = mk(*words)
                assert result.status == 1
                assert reason in result.err

    def test_biases_that_mergekit_loses(self, mk: Cli, tmp_path: Path, tiny: Path) -> None:
        """Its definition of a Llama has none."""
        config = json.loads((tiny / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
        assert mk("gen", zoo.EVERY, "--model", tmp_path).status == 1

    def test_a_directory_that_mergekit_takes_for_a_hub_id(
        self, mk: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It asks the Hub whether there is such a model; when it does not, the warning can go."""
        from huggingface_hub.errors import OfflineModeIsEnabled
        from mergekit.card import is_hf

        with monkeypatch.context() as patch, pytest.raises(OfflineModeIsEnabled):
            patch.chdir(tiny.parent)
            is_hf(tiny.name)
        said = mk("gen", zoo.EVERY, "--model", tiny.name, cwd=tiny.parent).err
        assert f"mergekit asks the Hub about {tiny.name}" in said
        assert not mk("gen", zoo.EVERY, "--model", f"./{tiny.name}", cwd=tiny.parent).err

    def test_modules(self, mk: Cli, tmp_path: Path) -> None:
        """Mergekit takes a model of images and words in modules, each of them named."""
        zoo.quiet()
        base = zoo.save("gemma3", tmp_path / "base")
        result = mk("gen", zoo.EVERY, "--model", base)
        assert result.status == 0, result.err
        (tmp_path / "cfg.yml").write_text(result.out)
        assert "vision_tower:" in result.out
        assert mk("gen", tmp_path / "cfg.yml").out == result.out
        outcome = zoo.expand(base, str(tmp_path / "cfg.yml"), tmp_path / "out")
        assert outcome == zoo.WriteResult("exact", "mergekit")


def test_every_reason_is_used_and_known() -> None:
    """The data file and its reasons agree, and it is written as `make zoo` writes it."""
    facts = families._facts()  # noqa: SLF001 - the data is the subject
    used = set()
    for name in families.known_types():
        family = families.family_of(name)
        assert family is not None
        used |= {family.refused, *family.unless.values(), *(why for _, why in family.when.values())}
    assert used - {None} == set(facts["reasons"])
    file = Path(families.__file__).parent / "data" / "architectures.json"
    assert file.read_text(encoding="utf-8") == zoo.lines(facts)
