"""Test a model that was grown, trained and grown again: it knows its first base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import card_lint
import pytest
from harness import Cli, edit_json, flip_bit, make_llama, make_lora, train_new_layers
from huggingface_hub import ModelCard

from mergekit_interleave import freeze_original_layers
from mergekit_interleave.errors import DirectiveError

RELEASE = Path(__file__).parents[1] / "fixtures" / "data" / "release-0.1.0"


@pytest.fixture(scope="module")
def chain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create `once` (grown from `tiny`), `trained` (its new layers trained) and `twice` from that.

    `twice` has the layers 0-3, 4 (new before), 5 (new), 6-9, 10 (new before) and 11 (new).
    """
    import mergekit_interleave as api

    folder = tmp_path_factory.mktemp("chain")
    api.run("interleave: every 4", folder / "once", model=tiny, engine="stream")
    train_new_layers(folder / "once", folder / "trained")
    api.card(folder / "trained", recipe=folder / "once")
    api.verify(folder / "trained", against=tiny, trained=True).check()
    api.run("interleave: every 5", folder / "twice", model=folder / "trained", engine="stream")
    return folder


@pytest.fixture
def own(chain: Path, tmp_path: Path) -> Path:
    """Return a copy of the chain that the test may change."""
    return Path(shutil.copytree(chain, tmp_path / "chain"))


def lines(out: str, *parts: str) -> bool:
    """Whether one line of a text contains all parts."""
    return any(all(part in line for part in parts) for line in out.splitlines())


class TestRecord:
    """interleave.json lists the earlier growths."""

    def test_the_growths(self, chain: Path) -> None:
        """Each growth is listed once, the oldest first, and the source names its growth."""
        content = json.loads((chain / "twice/interleave.json").read_text())
        (growth,) = content["growths"]
        once = json.loads((chain / "once/interleave.json").read_text())
        assert [entry["model"] for entry in growth["models"]] == ["tiny"]
        assert (growth["fingerprint"], growth["trained"]) == (once["fingerprint"], True)
        assert [layer["layer"] for layer in growth["layers"]] == [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]
        assert content["models"][0]["growth"] == 0
        assert "growths" not in once

    def test_a_third_growth(self, own: Path, mk: Cli, tiny: Path) -> None:
        """A model that was grown three times lists two growths, and all its bases are known."""
        result = mk("run", "append: 1", own / "thrice", "--model", own / "twice")
        assert result.status == 0
        content = json.loads((own / "thrice/interleave.json").read_text())
        assert [len(growth["layers"]) for growth in content["growths"]] == [10, 12]
        assert content["growths"][1]["models"][0]["growth"] == 0
        assert content["models"][0]["growth"] == 1
        for base, new in ((tiny, 5), (own / "trained", 3)):
            verified = mk("verify", own / "thrice", "--against", base, "--trained")
            assert verified.status == 0, verified.out
            assert f" {new} of them new" in verified.out
        assert mk("verify", own / "thrice", "--against", own / "twice").status == 0

    def test_a_stack_of_grown_models(self, own: Path, mk: Cli, tiny: Path) -> None:
        """A model that is stacked of a grown one and of its base has each growth once."""
        recipe = own / "stack.yml"
        recipe.write_text(
            "merge_method: passthrough\nslices:\n"
            f"- sources: [{{model: {own / 'twice'}, layer_range: [0, 12]}}]\n"
            f"- sources: [{{model: {own / 'trained'}, layer_range: [8, 10]}}]\n"
            f"- sources: [{{model: {tiny}, layer_range: [7, 8]}}]\n"
        )
        assert mk("run", recipe, own / "stack").status == 0
        content = json.loads((own / "stack/interleave.json").read_text())
        assert [entry.get("growth") for entry in content["models"]] == [1, 0, None]
        assert len(content["growths"]) == 2
        verified = mk("verify", own / "stack", "--against", tiny, "--trained")
        assert verified.status == 0, verified.out
        assert " 7 of them new" in verified.out

    def test_a_base_that_release_0_1_wrote(self, mk: Cli, tmp_path: Path) -> None:
        """The interleave.json of release 0.1.0 is read, and becomes a growth."""
        out = tmp_path / "again"
        assert mk("run", "append: 1", out, "--model", RELEASE, "--engine", "stream").status == 0
        (growth,) = json.loads((out / "interleave.json").read_text())["growths"]
        assert growth["models"][0]["model"] == "tiny-llama"
        words = ("train", out, "--for", "axolotl", "--since", "tiny-llama")
        assert "(2|5|6)" in mk(*words).out

    @pytest.mark.parametrize(
        ("edit", "key"),
        [
            (lambda content: content["layers"][2].update(layer=3), "fingerprint"),
            (lambda content: content["layers"].pop(), "fingerprint"),
            (lambda content: content.update(version=7), "version"),
            (lambda content: content["models"][0].update(layers=5), "layers[6].layer"),
        ],
    )
    @pytest.mark.parametrize("command", ["run", "plan"])
    def test_a_base_whose_record_was_edited(
        self, edit: Callable[[Any], object], key: str, command: str, own: Path, mk: Cli
    ) -> None:
        """A base that its interleave.json does not describe is refused, with file and key."""
        file = own / "once/interleave.json"
        edit_json(file, edit)
        words = ("append: 1", *([own / "again"] if command == "run" else []))
        result = mk(command, *words, "--model", own / "once")
        assert result.status == 1
        error, hint = result.err.splitlines()
        assert error.startswith(f"error: {file}: ")
        assert key in error
        assert hint.startswith("hint: ")
        assert not (own / "again").exists()
        file.unlink()
        assert mk(command, *words, "--model", own / "once").status == 0

    def test_a_base_of_another_depth_than_its_record(self, own: Path, mk: Cli) -> None:
        """A base with another depth than its interleave.json is refused."""
        shutil.copy(own / "once/interleave.json", own / "twice")
        result = mk("run", "append: 1", own / "again", "--model", own / "twice")
        assert (result.status, (own / "again").exists()) == (1, False)
        assert lines(result.err, f"error: {own / 'twice/interleave.json'}: layers ", "10", "12")

    @pytest.mark.parametrize(
        ("edit", "key"),
        [
            (lambda c: c["growths"][0]["layers"][2].update(layer=3), "growths[0].fingerprint"),
            (lambda c: c["growths"][0]["layers"].pop(), "growths[0].fingerprint"),
            (lambda c: c["growths"].clear(), "models[0].growth"),
            (lambda c: c["models"][0].update(growth=-1), "models[0].growth"),
            (lambda c: c["models"][0].update(layers=11), "models[0].layers"),
            (
                lambda c: c["growths"][0]["models"][0].update(growth=0),
                "growths[0].models[0].growth",
            ),
            (lambda c: c.update(growths=[5]), "interleave.json"),
            (lambda c: c.update(growths=c["growths"] * 101), "growths: "),
            (lambda c: c["growths"][0].pop("models"), "models"),
        ],
    )
    @pytest.mark.parametrize("command", ["verify", "train", "card"])
    def test_an_edited_lineage(
        self, edit: Callable[[Any], object], key: str, command: str, own: Path, mk: Cli
    ) -> None:
        """Every command that reads an inconsistent lineage refuses it by its key."""
        file = own / "twice/interleave.json"
        edit_json(file, edit)
        result = mk(command, own / "twice", *(("--for", "trl") if command == "train" else ()))
        assert result.status == 1
        assert lines(result.err, f"error: {file}: ", key)


class TestVerify:
    """`verify --trained --against FIRST_BASE` compares each layer that the first base has."""

    def test_a_trained_intermediate(self, own: Path, mk: Cli, tiny: Path) -> None:
        """All tensors of the first base are compared, and four layers are new since."""
        result = mk("verify", own / "twice", "--against", tiny, "--trained", "--json")
        assert result.status == 0
        report = json.loads(result.out)
        assert (report["against"], report["differences"]) == (["tiny"], [])
        assert (report["tensors"], *report["not_compared"].values()) == (111, 36)

    def test_trained_again(self, own: Path, mk: Cli, tiny: Path) -> None:
        """After all new layers were trained, the layers of the first base are still compared."""
        names = train_new_layers(own / "twice", own / "last", since=str(tiny))
        assert {name.split(".")[2] for name in names} == {"4", "5", "10", "11"}
        words = ("verify", own / "last", "--trained", "--recipe", own / "twice")
        assert mk(*words, "--against", tiny).status == 0
        against_the_source = mk(*words, "--against", own / "trained")
        assert against_the_source.status == 1
        assert "layer 4: " in against_the_source.out
        assert "layer 5: " not in against_the_source.out

    @pytest.mark.parametrize("layer", range(12))
    def test_each_layer_of_the_first_base(self, layer: int, own: Path, mk: Cli, tiny: Path) -> None:
        """One flipped bit in any layer that the first base has is found."""
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        flip_bit(own / "twice", name)
        result = mk("verify", own / "twice", "--against", tiny, "--trained")
        is_new = layer in (4, 5, 10, 11)
        assert result.status == (0 if is_new else 1)
        assert lines(result.out, f"layer {layer}: {name} differs") != is_new

    @pytest.mark.parametrize(
        "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    )
    def test_each_tensor_outside_the_layers(
        self, name: str, own: Path, mk: Cli, tiny: Path
    ) -> None:
        """One flipped bit outside the layers is found."""
        flip_bit(own / "twice", name)
        result = mk("verify", own / "twice", "--against", tiny, "--trained")
        assert (result.status, lines(result.out, f"{name} differs")) == (1, True)

    def test_an_intermediate_that_was_edited(self, own: Path, mk: Cli, tiny: Path) -> None:
        """A tensor and a config that were changed between two growths are found."""
        flip_bit(own / "trained", "model.layers.7.mlp.up_proj.weight")
        edit_json(own / "trained/config.json", lambda config: config.update(rms_norm_eps=0.1))
        result = mk("run", "append: 1", own / "again", "--model", own / "trained")
        assert result.status == 0
        assert mk("verify", own / "again", "--against", own / "trained").status == 0
        result = mk("verify", own / "again", "--against", tiny, "--trained")
        assert result.status == 1
        assert lines(result.out, "layer 7: model.layers.7.mlp.up_proj.weight differs")
        assert lines(result.out, "config.json: rms_norm_eps is 0.1")

    def test_a_base_that_is_not_in_the_lineage(self, chain: Path, mk: Cli, tmp_path: Path) -> None:
        """A base of another depth than any of the lineage is refused; the hint lists them."""
        other = make_llama(tmp_path / "other", layers=4)
        for words in ((), ("--trained",)):
            result = mk("verify", chain / "twice", "--against", other, *words)
            assert (result.status, result.out) == (1, "")
            error, hint = result.err.splitlines()
            assert error.startswith(f"error: {other}: ")
            assert "4 layers" in error
            assert all(name in hint for name in ("--against trained", "--against tiny"))

    def test_a_base_that_cannot_be_read(self, own: Path, mk: Cli) -> None:
        """The hint of an error in a base of the lineage stays as it is."""
        pointer = "version https://git-lfs.github.com/spec/v1\n"
        (own / "trained/model.safetensors").write_text(pointer)
        result = mk("verify", own / "twice", "--against", own / "trained")
        assert (result.status, "git lfs pull" in result.err) == (1, True)

    def test_another_base_of_the_same_depth(self, own: Path, mk: Cli, tmp_path: Path) -> None:
        """Another model as deep as the first base differs."""
        other = make_llama(tmp_path / "other")
        result = mk("verify", own / "twice", "--against", other, "--trained")
        assert (result.status, lines(result.out, "layer 0: ", "differs")) == (1, True)

    def test_a_lineage_of_equal_depths(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """Two models of a lineage with the same depth are told apart by their names."""
        middle, out = tmp_path / "middle", tmp_path / "out"
        turned = "layout: [1:8, 0:1]"
        assert mk("run", turned, middle, "--model", tiny, "--engine", "stream").status == 0
        assert mk("run", "append: 1", out, "--model", middle, "--engine", "stream").status == 0
        for base in (tiny, middle):
            assert mk("verify", out, "--against", base, "--trained").status == 0
        assert mk("verify", out, "--against", middle).status == 0
        renamed = middle.rename(tmp_path / "renamed")
        assert mk("verify", out, "--against", renamed).status == 0  # the nearest is meant

    @pytest.mark.parametrize("first", ["", "dtype: bfloat16"])
    @pytest.mark.parametrize("second", ["", "dtype: bfloat16", "dtype: float32"])
    def test_conversions(
        self, first: str, second: str, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """Conversions of both growths are applied in order."""
        model: object = tiny
        for name, keys in (("one", first), ("two", second)):
            directive = f"append: 1, {keys}" if keys else "append: 1"
            assert mk("run", directive, tmp_path / name, "--model", model).status == 0
            model = tmp_path / name
        result = mk("verify", tmp_path / "two", "--against", tiny, "--trained")
        assert result.status == 0, result.out

    @pytest.mark.parametrize("name", ["minicpm3", "gemma4_text", "nemotron_h", "glm4v"])
    def test_settings_that_depend_on_the_depth(self, name: str, mk: Cli, tmp_path: Path) -> None:
        """The config of a model that was grown twice is what its layout in the first base says.

        Each growth rounds MiniCPM's scale, shares keys and values, or copies lists of layer types.
        """
        import zoo

        zoo.quiet()
        base, one, two = (tmp_path / part for part in ("base", "one", "two"))
        zoo.save(name, base)
        assert mk("run", "interleave: every 2", one, "--model", base).status == 0
        assert mk("run", "append: 1", two, "--model", one).status == 0
        result = mk("verify", two, "--against", base, "--trained")
        assert result.status == 0, result.out
        edit_json(two / "config.json", lambda config: config.update(tie_word_embeddings=None))
        assert mk("verify", two, "--against", base, "--trained").status == 1

    def test_a_growth_that_changed_the_tokenizer(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """A lineage in which a growth changed more than layers is refused by its key."""
        one, two = tmp_path / "one", tmp_path / "two"
        result = mk("run", f"append: 1, tokenizer_source: {tiny}", one, "--model", tiny)
        assert result.status == 0, result.err
        assert mk("run", "append: 1", two, "--model", one).status == 0
        result = mk("verify", two, "--against", tiny, "--trained")
        assert result.status == 1
        assert lines(result.err, "error: growths[0].directive.tokenizer_source")

    def test_a_scale_outside_the_layers(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """A growth that scaled a tensor outside the layers is refused by its key."""
        one, two, recipe = tmp_path / "one", tmp_path / "two", tmp_path / "recipe.yml"
        scale = "parameters: {scale: [{filter: embed, value: 2.0}, {value: 1.0}]}"
        recipe.write_text(
            "merge_method: passthrough\nslices:\n"
            f"- sources: [{{model: {tiny}, layer_range: [0, 4], {scale}}}]\n"
            f"- sources: [{{model: {tiny}, layer_range: [2, 8]}}]\n"
        )
        assert mk("run", recipe, one).status == 0
        assert mk("verify", one, "--against", tiny).status == 0
        assert mk("run", "append: 1", two, "--model", one).status == 0
        result = mk("verify", two, "--against", tiny, "--trained")
        assert result.status == 1
        assert lines(result.err, "error: growths[0].layers: ", "model.embed_tokens.weight")

    def test_a_lora_between(self, own: Path, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """A LoRA that was merged between two growths is a change in the lineage, not its end."""
        lora, out = make_lora(own / "once", tmp_path / "lora"), own / "with-lora"
        assert mk("run", "append: 1", out, "--model", f"{own / 'once'}+{lora}").status == 0
        (growth,) = json.loads((out / "interleave.json").read_text())["growths"]
        assert growth["models"][0]["model"] == "tiny"
        assert "(4|9|10)" in mk("train", out, "--for", "axolotl", "--since", "tiny").out
        assert "layers.10." in mk("train", out, "--for", "axolotl", "--since", "once").out
        text = (out / "README.md").read_text()
        first = text.partition("## Lineage")[2].splitlines()[2]
        assert first.endswith(", then a LoRA merged.")
        assert not list(card_lint.problems(text, out))
        before = (out / "interleave.json").read_bytes()
        for against, named in ((tiny, "models[0]: "), (f"{own / 'once'}+{lora}", "no tensor")):
            result = mk("verify", out, "--against", against, "--trained")
            assert (result.status, result.out) == (1, "")
            assert lines(result.err, "error: ", named, "LoRA")
        assert (out / "interleave.json").read_bytes() == before
        assert mk("run", "append: 1", own / "last", "--model", out).status == 0
        result = mk("verify", own / "last", "--against", tiny, "--trained")
        assert (result.status, lines(result.err, "error: growths[1].models[0]: ")) == (1, True)

    def test_what_is_recorded(self, own: Path, mk: Cli, tiny: Path) -> None:
        """A comparison with the first base is added to the others if nothing was trained since."""
        content = json.loads((own / "twice/interleave.json").read_text())
        assert content["verified"].keys() == {"weights"}
        assert mk("verify", own / "twice", "--against", tiny, "--trained").status == 0
        content = json.loads((own / "twice/interleave.json").read_text())
        assert content["verified"].keys() == {"weights", "lineage"}
        text = (own / "twice/README.md").read_text()
        assert "**Status: untrained" in text
        assert lines(
            text,
            "| verified | all tensors equal to those of trained, ",
            "; 75 of 111 tensors equal to those of tiny, ",
        )
        assert lines(text, "- Weights: 75 of 111 tensors", "`tiny`")
        train_new_layers(own / "twice", own / "twice", since="tiny")
        assert mk("verify", own / "twice", "--against", tiny, "--trained").status == 0
        content = json.loads((own / "twice/interleave.json").read_text())
        assert [*content["verified"]] == ["trained"]
        text = (own / "twice/README.md").read_text()
        assert lines(text, "**Status: trained.**", "tiny")


class TestTrain:
    """`train --since BASE` trains all layers that BASE does not have."""

    @pytest.mark.parametrize("name", ["tiny", "org/tiny", "tiny@main", "{}"])
    def test_since_the_first_base(self, name: str, chain: Path, mk: Cli, tiny: Path) -> None:
        """The layers of both growths are new since the first base, however it is named."""
        words = ("train", chain / "twice", "--for", "axolotl")
        assert "(4|5|10|11)" in mk(*words, "--since", name.format(tiny)).out
        assert "(5|11)" in mk(*words, "--since", "trained").out
        assert "(5|11)" in mk(*words).out

    def test_a_base_that_is_not_in_the_lineage(self, chain: Path, mk: Cli) -> None:
        """A name that is not in the lineage is refused; the hint names those that are."""
        result = mk("train", chain / "twice", "--for", "trl", "--since", "org/other")
        assert (result.status, result.out) == (2, "")
        error, hint = result.err.splitlines()
        assert error.startswith("error: --since: 'org/other' ")
        assert hint.endswith(": --since tiny or --since trained")

    def test_without_a_record(self, own: Path, mk: Cli) -> None:
        """Without an interleave.json, the lineage is unknown; the hint names one."""
        (own / "twice/interleave.json").unlink()
        result = mk("train", own / "twice", "--for", "trl", "--since", "tiny")
        assert (result.status, result.out) == (2, "")
        assert "interleave.json" in result.err

    def test_the_code_for_transformers(self, chain: Path, mk: Cli) -> None:
        """The code trains the layers of both growths, and the note does so too."""
        result = mk("train", chain / "twice", "--for", "transformers", "--since", "tiny")
        assert "for index in [4, 5, 10, 11]:" in result.out
        assert 'freeze_original_layers(model, since="tiny")' in result.err

    def test_freezing_in_python(self, chain: Path) -> None:
        """`freeze_original_layers` trains what `since` says."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(chain / "twice")
        trained = freeze_original_layers(model, since="tiny")
        assert {name.split(".")[2] for name in trained} == {"4", "5", "10", "11"}
        with pytest.raises(DirectiveError, match="--since"):
            freeze_original_layers(model, since="other")


class TestCard:
    """The card names the first base and shows the chain."""

    def test_the_chain(self, own: Path, mk: Cli) -> None:
        """`base_model` lists the first base, and the text tells each growth in order."""
        words = ("card", own / "twice", "--base-model", "org/tiny")
        assert mk(*words).status == 0
        text = (own / "twice/README.md").read_text()
        assert ModelCard(text).data.base_model == ["org/tiny"]
        first, second = text.partition("\n## Lineage\n\n")[2].splitlines()[:2]
        for part in ("1. [org/tiny](", "(8 layers) → `trained` (10 layers)", "zeroed", "trained."):
            assert part in first
        assert second.startswith("2. `trained` (10 layers) → this model (12 layers): ")
        assert "| new since org/tiny | 4, 5, 10, 11 |" in text
        assert "`--since org/tiny`" in text
        assert not list(card_lint.problems(text, own / "twice"))
        assert mk("train", own / "twice", "--for", "trl", "--since", "org/tiny").status == 0

    def test_published_intermediates(self, own: Path, mk: Cli, tiny: Path) -> None:
        """`base_model` lists the first base, then the models between that have a Hub id."""
        flags = ("--base-model", "org/tiny", "--repo", "me/ten")
        assert mk("card", own / "trained", *flags).status == 0
        out = own / "again"
        assert mk("run", "append: 1", out, "--model", own / "trained", "--repo", "me/x").status == 0
        text = (out / "README.md").read_text()
        assert ModelCard(text).data.base_model == ["org/tiny", "me/ten"]
        assert "\n# x\n" in text
        assert "\nmodel: me/ten\n" in text
        recipe = (out / "mergekit_config.yml").read_text()
        assert ("model: me/ten\n" in recipe, "trained" in recipe) == (True, False)
        assert mk("verify", out, "--against", own / "trained").status == 0
        assert mk("verify", out, "--against", tiny, "--trained").status == 0

    def test_one_id_for_two_models(self, own: Path, mk: Cli) -> None:
        """One id cannot name two models of a lineage, in `run` or in `card`."""
        base, out = ("--base-model", "org/tiny"), own / "again"
        words = ("run", "append: 1", out, "--model", own / "trained", "--engine", "stream")
        warned = mk(*words, *base)
        assert (warned.status, lines(warned.err, "warning: ", "--base-model", "tiny")) == (0, True)
        refused = mk("card", out, *base)
        assert (refused.status, lines(refused.err, "error: base_model: org/tiny ")) == (2, True)
        assert mk("card", own / "trained", *base, "--repo", "me/ten").status == 0
        for name in ("org/tiny", "org/other"):
            refused = mk(*words, "--force", "--base-model", name)
            assert (refused.status, lines(refused.err, "error: base_model: ")) == (2, True)
        assert mk(*words, "--force").status == 0
        assert mk("card", out, "--base-model", "me/ten").status == 2

    def test_several_first_bases(self, own: Path, mk: Cli, tmp_path: Path) -> None:
        """--base-model cannot name one of several first bases."""
        other, recipe = make_llama(tmp_path / "other"), own / "two.yml"
        recipe.write_text(
            "merge_method: passthrough\nslices:\n"
            f"- sources: [{{model: {own / 'once'}, layer_range: [0, 6]}}]\n"
            f"- sources: [{{model: {other}, layer_range: [4, 8]}}]\n"
        )
        assert mk("run", recipe, own / "two").status == 0
        result = mk("card", own / "two", "--base-model", "org/tiny")
        assert (result.status, result.out) == (2, "")
        assert lines(result.err, "error: base_model: ", "other", "tiny")
        assert lines((own / "two/README.md").read_text(), "| new since tiny and other | 4 |")
