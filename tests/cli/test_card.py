"""Test the model card and the layer map, as `run`, `card` and `verify` write them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import card_lint
import pytest
import stored
import yaml
from harness import Cli, edit_json, flip_bit, make_llama, make_lora, train_new_layers
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file, save_file

from mergekit_interleave.commands import card as card_command
from mergekit_interleave.output import card_data, card_files, model_card

EXAMPLES = Path(__file__).parents[2] / "examples"
HUB_IDS = {
    "openchat-block-expansion": {"openchat/openchat-3.5-0106": 32},
    "catppt-interwoven": {"rishiraj/CatPPT-base": 32},
    "miqu-120b": {"152334H/miqu-1-70b-sf": 80},
    "deep-miqu-103b": {"jukofyork/Dawn-Miqu-70B": 80, "jukofyork/Dark-Miqu-70B": 80},
}
NAMES = {
    "openchat-block-expansion": "openchat-3.5-0106_{}_40Layers-Interleaved",
    "catppt-interwoven": "CatPPT-base_{}_48Layers-Interwoven",
    "miqu-120b": "miqu-1-70b-sf_{}_140Layers-Stacked",
    "deep-miqu-103b": "Dawn-Miqu-70B-Dark-Miqu-70B_{}_120Layers-Frankenmerge",
}
Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a Hub cache of small models with the names in the examples."""
    import torch

    root = tmp_path_factory.mktemp("hub")
    for models in HUB_IDS.values():
        for name, depth in models.items():
            repository = root / f"models--{name.replace('/', '--')}"
            commit = f"{len(name):040x}"
            settings: dict[str, Any] = {"dtype": torch.float16}
            if depth == 32:
                settings = {"mistral": True, "dtype": torch.bfloat16}
            make_llama(repository / "snapshots" / commit, layers=depth, **settings)
            (repository / "refs").mkdir()
            (repository / "refs" / "main").write_text(commit)
    return root


def assert_only_base_model_note(err: str) -> None:
    """Assert that standard error is one note, which names the flag that states the base's id."""
    (note,) = err.splitlines()
    assert note.startswith("note: ")
    assert "--base-model" in note


def source_line(text: str) -> str:
    """Return the line of a card that says what the model was made from."""
    return next(line for line in text.splitlines() if line.startswith("Made from "))


@pytest.mark.parametrize(
    ("zero", "has_zeros", "proved", "measured"),
    [
        ("[o_proj, down_proj]", False, card_data.EQUAL, card_data.EQUAL),
        ("[o_proj, up_proj]", False, card_data.EQUAL, card_data.EQUAL),
        ("[v_proj, gate_proj]", False, card_data.EQUAL, card_data.EQUAL),
        ("[o_proj]", False, card_data.UNKNOWN, card_data.CHANGED),
        ("[o_proj]", True, card_data.UNKNOWN, card_data.SAME),
        ("none", False, card_data.UNKNOWN, card_data.CHANGED),
    ],
)
def test_what_is_proved_and_what_is_measured(  # noqa: PLR0913, PLR0917 - one for each column
    zero: str, has_zeros: bool, proved: str, measured: str, mk: Cli, own_tiny: Path, tmp_path: Path
) -> None:
    """The status is equal if that is proved, different if measured, and otherwise not known."""
    if has_zeros:  # the MLPs of the copied layers write nothing, which no name shows
        tensors = load_file(own_tiny / "model.safetensors")
        for index in (3, 7):
            tensors[f"model.layers.{index}.mlp.down_proj.weight"].zero_()
        save_file(tensors, own_tiny / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    words = ("--engine", "stream", "--allow-non-identity", "--model", own_tiny)
    assert mk("run", f"interleave: every 4, zero: {zero}", out, *words).status == 0
    assert f"**Status: {proved}.**" in (out / "README.md").read_text()
    assert mk("verify", out, "--against", own_tiny, "--forward").status == 0
    assert f"**Status: {measured}.**" in (out / "README.md").read_text()


@pytest.mark.parametrize("example", HUB_IDS)
def test_the_cards_of_all_examples(example: str, cache: Path, shell: Shell, tmp_path: Path) -> None:
    """Each card passes the lint and names no path; one is made again with other hash seeds."""
    engine = "mergekit" if example == "deep-miqu-103b" else "stream"
    command = f"mk-interleave run {EXAMPLES / example}.yml out --engine {engine}"
    result = shell(command, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    written = (tmp_path / "out" / "README.md").read_bytes()
    for seed in ("1", "2") if example == "miqu-120b" else ():
        (tmp_path / "out" / "README.md").unlink()
        again = shell("mk-interleave card out", PYTHONHASHSEED=seed)
        assert (again.returncode, again.stderr) == (0, "")
        assert (tmp_path / "out" / "README.md").read_bytes() == written
    text = (tmp_path / "out" / "README.md").read_text()
    assert not list(card_lint.problems(text, tmp_path / "out"))
    assert str(tmp_path) not in text
    assert str(cache) not in text
    assert "Untitled" not in text
    plan = shell(f"mk-interleave plan {EXAMPLES / example}.yml --json", HF_HUB_CACHE=str(cache))
    assert f": {json.loads(plan.stdout)['what']}." in text
    data = ModelCard(text).data.to_dict()
    assert data == metadata_load(tmp_path / "out" / "README.md")
    assert data["base_model"] == list(HUB_IDS[example])
    assert data["base_model_relation"] == "merge"
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert (data["license"], data["language"]) == ("mit", ["en"])
    name = re.search(r"suggested name: (.*)", result.stdout)
    assert name is not None
    size = name[1].split("_")[-2]
    assert name[1] == NAMES[example].format(size)
    assert f"`{name[1]}`" in text
    assert ET.parse(tmp_path / "out" / "layers.svg").getroot().tag.endswith("svg")  # noqa: S314
    # The directive comes first, then the recipe.
    directive, recipe = (
        yaml.safe_load(t) for t in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    )
    assert recipe == yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text())
    explained = shell("mk-interleave explain out", HF_HUB_CACHE=str(cache))
    assert directive == yaml.safe_load(explained.stdout)


@pytest.fixture
def deeper(mk: Cli, tiny: Path, tmp_path: Path) -> Path:
    """Create a tiny model with two new layers."""
    out = tmp_path / "deeper"
    words = ("run", "--every", "4", out, "--model", tiny, "--engine", "stream")
    assert mk(*words).status == 0
    return out


def files(path: Path) -> dict[str, bytes]:
    """Read the files of a directory."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


class TestCard:
    """Test the command `card DIR`."""

    def test_it_writes_what_run_wrote(self, mk: Cli, deeper: Path) -> None:
        """`card` writes the same card, picture and suggested name as `run`."""
        before = files(deeper)
        (deeper / "layers.svg").unlink()
        result = mk("card", deeper)
        assert result.status == 0
        assert_only_base_model_note(result.err)
        assert result.out.splitlines()[:2] == ["README.md: written", "layers.svg: written"]
        assert "suggested name: tiny_" in result.out
        assert files(deeper) == before

    def test_a_missing_card(self, mk: Cli, deeper: Path) -> None:
        """`card` writes a missing card again."""
        before = files(deeper)
        (deeper / "README.md").unlink()
        assert mk("card", deeper).status == 0
        assert files(deeper) == before

    def test_an_edited_card(self, mk: Cli, deeper: Path) -> None:
        """`card` keeps an edited card and the picture; --force replaces the card."""
        page = deeper / "README.md"
        written = page.read_text()
        page.write_text(written.replace("# deeper", "# My model"))
        before = files(deeper)
        result = mk("card", deeper)
        assert (result.status, result.out) == (1, "")
        error, hint = result.err.splitlines()
        assert error.startswith(f"error: {page}: ")
        assert hint.startswith("hint: --force ")
        assert files(deeper) == before
        assert mk("card", deeper, "--force").status == 0
        assert page.read_text() == written

    def test_the_hint_names_force_only_if_it_helps(self, mk: Cli, deeper: Path) -> None:
        """If the model does not match its layout, an edited card is not the first error."""
        (deeper / "README.md").write_text("mine")
        weights = deeper / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        result = mk("card", deeper)
        assert result.status == 1
        assert "--force" not in result.err
        assert (deeper / "README.md").read_text() == "mine"

    def test_an_edited_picture(self, mk: Cli, deeper: Path) -> None:
        """`card` keeps an edited picture; --force replaces it."""
        (deeper / "layers.svg").write_text("<svg/>")
        before = files(deeper)
        result = mk("card", deeper)
        assert (result.status, str(deeper / "layers.svg") in result.err) == (1, True)
        assert files(deeper) == before
        assert mk("card", deeper, "--force").status == 0
        assert (deeper / "layers.svg").read_text() != "<svg/>"

    def test_verify_keeps_an_edited_card(self, mk: Cli, deeper: Path, tiny: Path) -> None:
        """`verify` keeps an edited card, warns, and records its result in interleave.json."""
        page = deeper / "README.md"
        page.write_text(page.read_text() + "\nMy own text.\n")
        edited = page.read_bytes()
        train_new_layers(deeper)
        result = mk("verify", deeper, "--against", tiny, "--trained")
        assert result.status == 0
        assert result.err.startswith(f"warning: {page}: ")
        assert page.read_bytes() == edited
        assert "trained" in json.loads((deeper / "interleave.json").read_text())["verified"]
        assert "before training" in (deeper / "layers.svg").read_text()
        both = mk("verify", deeper, "--against", tiny, "--trained", "--forward")
        assert both.err.count("warning: ") == 1

    def test_a_model_of_release_0_1(self, mk: Cli, deeper: Path, tiny: Path) -> None:
        """The digest at the end of a 0.1 card decides whether the card was edited."""
        content = json.loads((deeper / "interleave.json").read_text())
        del content["generated"]
        page, picture = deeper / "README.md", (deeper / "layers.svg").read_bytes()
        old = "# deeper\n"
        seal = hashlib.sha256(old.encode()).hexdigest()[:16]

        def restore(text: str) -> None:
            (deeper / "interleave.json").write_text(json.dumps(content))
            (deeper / "layers.svg").write_bytes(picture)
            page.write_text(f"{text}<!-- as mk-interleave wrote it: {seal} -->\n")

        for command in (("card",), ("verify", "--against", tiny)):
            restore(old)
            assert mk(command[0], deeper, *command[1:]).status == 0
            assert "## Verification" in page.read_text()
            assert mk("card", deeper).status == 0
            restore("# Mine\n")
            edited = page.read_bytes()
            assert mk(command[0], deeper, *command[1:]).status == (command[0] == "card")
            assert page.read_bytes() == edited

    def test_as_json(self, deeper: Path) -> None:
        """The function `card` returns what it wrote, and its result converts to JSON."""
        report = card_command.card(deeper)
        assert report.files == ("README.md", "layers.svg")
        assert json.loads(json.dumps(report.as_dict())) == {
            "files": ["README.md", "layers.svg"],
            "name": report.name,
            "base_models": [],
            "warnings": [],
            "notes": list(report.notes),
        }

    def test_under_another_name(self, mk: Cli, deeper: Path, tmp_path: Path) -> None:
        """The title of the card is the directory's name."""
        deeper.rename(tmp_path / "Better-10L")
        assert mk("card", tmp_path / "Better-10L").status == 0
        text = (tmp_path / "Better-10L" / "README.md").read_text()
        assert "# Better-10L\n" in text
        assert 'from_pretrained("Better-10L"' in text

    def test_after_training(self, mk: Cli, deeper: Path, tmp_path: Path) -> None:
        """A trained model's card no longer claims equality with the base or a verification."""
        trained = tmp_path / "trained"
        shutil.copytree(deeper, trained)
        train_new_layers(trained)
        assert mk("card", trained).status == 0
        text = (trained / "README.md").read_text()
        assert "**Status: trained, not verified.**" in text
        assert "| verified | nothing yet |" in text
        assert "bit for bit" not in text

    def test_a_trainers_directory(self, mk: Cli, deeper: Path, tiny: Path, tmp_path: Path) -> None:
        """`card --recipe` reads the layers from the expansion, and writes interleave.json."""
        trained = tmp_path / "trained"
        train_new_layers(deeper, trained)
        refused = mk("card", trained)
        assert refused.status == 1
        assert f"error: {trained}: " in refused.err
        assert "hint: " in refused.err
        assert "--recipe FILE" in refused.err
        written = mk("card", trained, "--recipe", deeper)
        assert written.status == 0
        for name in ("interleave.json", "mergekit_config.yml"):
            assert f"{name}: written" in written.out
        again = mk("run", "append: 1", trained, "--model", deeper, "--force")
        assert (again.status, (trained / "model.safetensors").exists()) == (1, True)
        assert "**Status: trained, not verified.**" in (trained / "README.md").read_text()
        assert mk("verify", trained, "--against", tiny, "--trained").status == 0
        text = (trained / "README.md").read_text()
        assert "**Status: trained.**" in text
        assert "block expansion" in source_line(text)
        assert "trained" in source_line(text)
        assert "before training" in (trained / "layers.svg").read_text()
        assert mk("card", trained).status == 0
        assert (trained / "README.md").read_text() == text
        assert not list(card_lint.problems(text, trained))

    def test_trained_in_place(self, mk: Cli, deeper: Path, tiny: Path) -> None:
        """`verify --trained` updates the unedited card and picture."""
        train_new_layers(deeper)
        assert mk("verify", deeper, "--against", tiny, "--trained").status == 0
        assert "**Status: trained.**" in (deeper / "README.md").read_text()
        assert "before training" in (deeper / "layers.svg").read_text()

    def test_a_failed_verification(self, mk: Cli, deeper: Path, tiny: Path) -> None:
        """The card of a model that failed `verify` no longer calls it equal to its base."""
        tensors = load_file(deeper / "model.safetensors")
        tensors["model.embed_tokens.weight"] += 1
        save_file(tensors, deeper / "model.safetensors", metadata={"format": "pt"})
        assert mk("verify", deeper, "--against", tiny).status == 1
        text = (deeper / "README.md").read_text()
        assert "**Status: verification failed.**" in text
        assert "| verified | **failed** with 1 " in text

    def test_a_verification_after_training(self, mk: Cli, deeper: Path, tiny: Path) -> None:
        """`verify --trained` puts its result and the new status on the card."""
        train_new_layers(deeper)
        assert mk("verify", deeper, "--against", tiny, "--trained").status == 0
        text = (deeper / "README.md").read_text()
        assert "**Status: trained.**" in text
        assert "\n- Weights: " in text.partition("## Verification")[2]
        content = json.loads((deeper / "interleave.json").read_text())
        assert content["verified"]["trained"]["exact"] is True
        assert all(card_files.is_generated(deeper / name, content) for name in card_files.FILES)
        assert mk("card", deeper).status == 0
        assert (deeper / "README.md").read_text() == text

    def test_a_file_in_place_of_a_directory(self, mk: Cli, deeper: Path) -> None:
        """`card` refuses a file, and the error names it."""
        result = mk("card", deeper / "config.json")
        assert result.status == 1
        assert result.err.startswith(f"error: {deeper / 'config.json'}: is a file\n")

    def test_a_broken_manifest(self, mk: Cli, deeper: Path) -> None:
        """`card` reports an invalid interleave.json without the hint to copy the file."""
        (deeper / "interleave.json").write_text("{}")
        result = mk("card", deeper)
        assert result.status == 1
        assert result.err.startswith(f"error: {deeper / 'interleave.json'}: ")
        assert "hint: " not in result.err

    def test_a_model_unlike_its_record(self, mk: Cli, deeper: Path) -> None:
        """`card` refuses a model whose depth differs from interleave.json."""
        config = json.loads((deeper / "config.json").read_text())
        (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
        before = files(deeper)
        result = mk("card", deeper)
        assert result.status == 1
        assert result.err.startswith(f"error: {deeper}: ")
        assert "config.json" in result.err
        assert "9 layers" in result.err
        assert "10" in result.err
        assert files(deeper) == before

    def test_what_mergekit_wrote(self, mk: Cli, tiny: Path, shell: Shell, tmp_path: Path) -> None:
        """`card --force` replaces mergekit's card, and the new card passes the lint."""
        (tmp_path / "cfg.yml").write_text(mk("gen", "--every", "4", "--model", tiny).out)
        assert shell("mergekit-yaml cfg.yml merged").returncode == 0
        assert mk("card", tmp_path / "merged").status == 1
        result = mk("card", tmp_path / "merged", "--force")
        assert result.status == 0
        assert_only_base_model_note(result.err)
        text = (tmp_path / "merged" / "README.md").read_text()
        assert not list(card_lint.problems(text, tmp_path / "merged"))
        assert str(tmp_path) not in text
        assert "**Status: untrained, equal" in text
        assert "license: mit" in text
        assert source_line(text).startswith("Made from `tiny` ")
        assert "one after every 4th of 8: block expansion" in source_line(text)
        assert mk("card", tmp_path / "merged").status == 0  # it has an interleave.json now
        assert str(tmp_path) not in (tmp_path / "merged/mergekit_config.yml").read_text()
        assert mk("verify", tmp_path / "merged").status == 0
        assert (tmp_path / "merged" / "README.md").read_text() == text

    def test_what_mergekit_wrote_elsewhere(
        self, mk: Cli, tiny: Path, shell: Shell, tmp_path: Path
    ) -> None:
        """Without its sources, a mergekit model's card shows what its directory records."""
        base = tmp_path / "gone"
        shutil.copytree(tiny, base)
        (tmp_path / "cfg.yml").write_text(mk("gen", "--every", "4", "--model", base).out)
        assert shell("mergekit-yaml cfg.yml merged").returncode == 0
        shutil.rmtree(base)
        result = mk("card", tmp_path / "merged", "--force")
        assert result.status == 0
        assert_only_base_model_note(result.err)
        text = (tmp_path / "merged" / "README.md").read_text()
        assert not list(card_lint.problems(text, tmp_path / "merged"))
        assert source_line(text).startswith("Made from `gone` (? → 10 layers")
        assert "**Status: not verified.**" in text  # nobody compared it with its base
        assert str(tmp_path) not in text

    def test_a_model_unlike_its_sources(self, mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
        """Without interleave.json, a model is compared with its sources before it is described."""
        out, words = tmp_path / "out", ("interleave: every 4", "--model", own_tiny)
        assert mk("run", *words[:1], out, *words[1:], "--engine", "stream").status == 0
        for name in ("interleave.json", "README.md", "layers.svg"):
            (out / name).unlink()
        (out / "mergekit_config.yml").write_text(mk("gen", *words).out)
        flip_bit(own_tiny, "model.layers.2.mlp.up_proj.weight")
        refused = mk("card", out)
        assert (refused.status, (out / "README.md").exists()) == (1, False)
        assert "model.layers.2.mlp.up_proj.weight" in refused.err
        assert f"`mk-interleave verify {out} --against {own_tiny}`" in refused.err
        flip_bit(own_tiny, "model.layers.2.mlp.up_proj.weight")
        written = mk("card", out)
        assert written.status == 0
        assert "interleave.json: written" in written.out
        assert "all tensors equal to their sources" in (out / "README.md").read_text()
        assert mk("verify", out, "--against", own_tiny).status == 0

    @pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"x" * 2**20])
    def test_a_card_that_is_not_text(self, mk: Cli, deeper: Path, content: bytes) -> None:
        """`card` treats a card that is not text as edited; --force replaces it."""
        (deeper / "README.md").write_bytes(content)
        refused = mk("card", deeper)
        assert refused.status == 1
        assert refused.err.startswith(f"error: {deeper / 'README.md'}: ")
        assert "--force" in refused.err
        assert mk("card", deeper, "--force").status == 0

    def test_a_card_that_is_not_a_file(self, mk: Cli, deeper: Path) -> None:
        """`card --force` replaces nothing if README.md is not a regular file."""
        (deeper / "README.md").unlink()
        os.mkfifo(deeper / "README.md")
        picture = (deeper / "layers.svg").read_bytes()
        refused = mk("card", deeper, "--force")
        assert refused.status == 1
        assert refused.err.startswith(f"error: {deeper / 'README.md'}: ")
        assert (deeper / "layers.svg").read_bytes() == picture

    def test_links_are_not_written_through(self, mk: Cli, deeper: Path, tmp_path: Path) -> None:
        """`card --force` refuses to write through a link, which may lead into the Hub's cache."""
        linked = tmp_path / "linked"
        linked.mkdir()
        for file in deeper.iterdir():
            (linked / file.name).symlink_to(file)
        result = mk("card", linked, "--force")
        assert result.status == 1
        assert result.err.startswith(f"error: {linked / 'README.md'}: is a link")
        assert (linked / "README.md").is_symlink()

    @pytest.mark.parametrize("key", ["models", "directive", "inherited", "tools", "verified"])
    @pytest.mark.parametrize("value", [5, [], [5], {"a": []}, None, "x"])
    def test_nonsense_in_the_manifest(self, mk: Cli, deeper: Path, key: str, value: object) -> None:
        """A malformed value in interleave.json gives one error or a valid card."""
        content = json.loads((deeper / "interleave.json").read_text())
        (deeper / "interleave.json").write_text(json.dumps({**content, key: value}))
        result = mk("card", deeper)
        if result.status:
            (error, *_) = result.err.splitlines()
            assert error.startswith("error: ")
            # An unknown key of the stored directive is reported by its name.
            assert f"{deeper / 'interleave.json'}: " in error or "key 'a'" in error
        else:
            text = (deeper / "README.md").read_text()
            assert ModelCard(text).data.to_dict()["base_model_relation"] == "merge"
            assert "| layers | 8 → 10, 2 " in text

    def test_wrong_sizes_in_the_manifest(self, mk: Cli, deeper: Path) -> None:
        """The card takes the sizes from the weights, and `verify` reports wrong ones."""
        content = json.loads((deeper / "interleave.json").read_text())
        wrong = {"parameters": 9**9, "bytes": 7, "new_parameters": 1}
        (deeper / "interleave.json").write_text(json.dumps(content | wrong))
        result = mk("verify", deeper)
        assert result.status == 1
        reported = [line for line in result.out.splitlines() if "interleave.json: " in line]
        assert len(reported) == len(wrong)
        for key, value in wrong.items():
            assert any(f" {key} " in line and str(value) in line for line in reported), key
        assert mk("card", deeper).status == 0
        assert "| weights | 326 kB of F32 |" in (deeper / "README.md").read_text()

    @pytest.mark.parametrize("words", [["nowhere"], ["."]])
    def test_not_a_model(self, mk: Cli, tmp_path: Path, words: list[str]) -> None:
        """`card` refuses a directory that is missing or has no record."""
        result = mk("card", *words, cwd=tmp_path)
        assert result.status == 1
        assert result.err.startswith(f"error: {words[0]}: ")


class TestOtherWeights:
    """A record of verification is carried only to the weights that were verified."""

    TENSORS = ("model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight")

    @pytest.fixture
    def changed(self, request: pytest.FixtureRequest, deeper: Path, tmp_path: Path) -> Path:
        """Return a copy of a model in which one original tensor differs, as after training it."""
        out = tmp_path / "changed"
        shutil.copytree(deeper, out)
        tensors = load_file(out / "model.safetensors")
        tensors[request.param] += 1
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return out

    @pytest.mark.parametrize("changed", TENSORS, indirect=True)
    @pytest.mark.parametrize("record", ["recipe", "own", "copied"])
    def test_changed_originals(  # noqa: PLR0913, PLR0917 - the fixtures
        self, record: str, changed: Path, mk: Cli, deeper: Path, tiny: Path, tmp_path: Path
    ) -> None:
        """A changed original layer, head or embedding ends the record and the claim of equality."""
        if record == "recipe":
            for name in ("interleave.json", "README.md", "layers.svg"):
                (changed / name).unlink()
        if record == "copied":
            shutil.copy(deeper / "interleave.json", changed)
        words = ("--recipe", deeper) if record == "recipe" else ()
        result = mk("card", changed, *words)
        assert result.status == 0
        status = card_data.ALTERED if record == "recipe" else card_data.UNCOMPARED
        assert "verification" in result.err
        text = (changed / "README.md").read_text()
        assert f"**Status: {status}.**" in text
        assert "| verified | nothing yet |" in text
        assert "byte for byte" not in text
        assert "untrained" not in text
        assert not list(card_lint.problems(text, changed))
        assert mk("card", changed).status == 0  # the second time, too
        assert (changed / "README.md").read_text() == text
        again = tmp_path / "again"
        assert mk("run", "append: 1", again, "--model", changed, "--engine", "stream").status == 0
        first = (again / "README.md").read_text().partition("## Lineage")[2].splitlines()[2]
        assert first.endswith(f", then {status}." if record == "recipe" else "block expansion.")
        assert mk("verify", changed, "--against", tiny).status == 1
        assert f"**Status: {card_data.WRONG}.**" in (changed / "README.md").read_text()

    def test_trained_seams(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """A stack whose seams were trained is not verified until `verify --trained` checks it."""
        stack, trained = tmp_path / "stack", tmp_path / "trained"
        words = ("run", "drop: [3, 4]", stack, "--model", tiny, "--engine", "stream")
        assert mk(*words).status == 0
        train_new_layers(stack, trained, layers="seams")
        assert mk("card", trained, "--recipe", stack).status == 0
        text = (trained / "README.md").read_text()
        assert f"**Status: {card_data.ALTERED}.**" in text
        assert ModelCard(text).data.base_model_relation == "finetune"
        verify = ("verify", trained, "--against", tiny, "--trained", "--layers", "seams")
        assert mk(*verify).status == 0
        assert f"**Status: {card_data.TRAINED}.**" in (trained / "README.md").read_text()

    def test_the_same_bytes(self, mk: Cli, deeper: Path, tiny: Path, tmp_path: Path) -> None:
        """Equal bytes keep the record: those of the recipe's model, and those of the sources."""
        copy = tmp_path / "copy"
        shutil.copytree(deeper, copy)
        (copy / "interleave.json").unlink()
        os.utime(copy / "model.safetensors", (1, 1))
        assert mk("card", copy, "--recipe", deeper, "--force").status == 0
        assert f"**Status: {card_data.EQUAL}.**" in (copy / "README.md").read_text()
        os.utime(copy / "model.safetensors", (2, 2))
        assert mk("card", copy).status == 0  # its digest does not depend on times
        assert f"**Status: {card_data.EQUAL}.**" in (copy / "README.md").read_text()
        flip_bit(copy, "model.norm.weight")
        assert mk("card", copy).status == 0
        assert f"**Status: {card_data.UNCOMPARED}.**" in (copy / "README.md").read_text()
        flip_bit(copy, "model.norm.weight")
        assert mk("card", copy, cwd=tiny.parent).status == 0  # finds the base by its name
        assert f"**Status: {card_data.EQUAL}.**" in (copy / "README.md").read_text()

    def test_trained_again(self, mk: Cli, deeper: Path, tiny: Path, tmp_path: Path) -> None:
        """The verification of a trained model is not that of a model trained from it."""
        first, second = tmp_path / "first", tmp_path / "second"
        train_new_layers(deeper, first)
        assert mk("card", first, "--recipe", deeper).status == 0
        assert mk("verify", first, "--against", tiny, "--trained").status == 0
        train_new_layers(first, second)
        assert mk("card", second, "--recipe", first).status == 0
        assert f"**Status: {card_data.UNVERIFIED}.**" in (second / "README.md").read_text()


class TestForcedStacks:
    """A stack of models whose settings differ says so."""

    @pytest.fixture
    def forced(self, tmp_path: Path) -> tuple[Path, str]:
        """Create two models that differ in two settings; return their folder and a recipe."""
        make_llama(tmp_path / "a", rms_norm_eps=1e-6)
        b = make_llama(tmp_path / "b", rms_norm_eps=1e-3)
        edit_json(b / "config.json", lambda c: c["rope_parameters"].update(rope_theta=5e5))
        return tmp_path, "layout: [a 0:5, b 4:8]"

    def test_the_trace(self, forced: tuple[Path, str], mk: Cli) -> None:
        """The output, interleave.json and the card name every setting with both values."""
        place, directive = forced
        words = ("--mergekit", "allow_crimes=true")
        result = mk("run", directive, "out", *words, cwd=place)
        assert result.status == 0, result.err
        content = json.loads((place / "out/interleave.json").read_text())
        text = (place / "out/README.md").read_text()
        (status,) = (line for line in text.splitlines() if line.startswith("**Status"))
        for said in (result.err, " ".join(content["forced"]), status):
            assert "rms_norm_eps is 0.001 in b and 1e-06 in a" in said
            assert "rope_theta is 500000.0 in b and 10000.0 in a" in said
        assert "forced" in status
        assert str(place) not in text
        assert mk("card", "out", cwd=place).status == 0
        assert (place / "out/README.md").read_text() == text

    def test_a_stack_that_fits(self, mk: Cli, tmp_path: Path) -> None:
        """A stack that needs no force is not called forced."""
        for name in "ab":
            make_llama(tmp_path / name)
        directive = "layout: [a 0:5, b 4:8]"
        result = mk("run", directive, "out", "--mergekit", "allow_crimes=true", cwd=tmp_path)
        assert (result.status, "forced" in result.err) == (0, False)
        assert "forced" not in json.loads((tmp_path / "out/interleave.json").read_text())


class TestStacksOfSeveralModels:
    """The card of a stack names its sources where the reader needs them."""

    @pytest.fixture
    def place(self, mk: Cli, tmp_path: Path) -> Path:
        """Create two models, a stack of them, and the stack with trained seams."""
        for name in ("a", "b"):
            make_llama(tmp_path / name)
        directive = "layout: [a 0:5, b 4:8]"
        assert mk("run", directive, "out", cwd=tmp_path).status == 0
        train_new_layers(tmp_path / "out", tmp_path / "trained", layers="seams")
        return tmp_path

    def test_the_commands_after_training(self, place: Path, mk: Cli) -> None:
        """The commands that the card prints succeed, in their order."""
        text = (place / "out/README.md").read_text().partition("After training, ")[2]
        commands = re.findall(r"`mk-interleave (.*?)`", text.partition("\n")[0])
        assert [command.split()[0] for command in commands] == ["card", "verify"]
        assert "--against a --against b " in commands[1]
        for command in commands:
            words = command.replace("TRAINED", "trained").replace("DIR", "out").split()
            result = mk(*words, cwd=place)
            assert result.status == 0, result.err
        assert f"**Status: {card_data.TRAINED}.**" in (place / "trained/README.md").read_text()

    def test_the_base_of_a_forward_pass(self, place: Path, mk: Cli) -> None:
        """The output and the card name the source whose outputs were compared."""
        words = ("--against", "a", "--against", "b", "--forward")
        result = mk("verify", "out", *words, cwd=place)
        assert result.status == 0
        assert "differ from those of a, " in result.out
        text = (place / "out/README.md").read_text()
        assert "differ from those of a by at most " in text
        assert "compared with those of `a`" in text


class TestLora:
    """A LoRA is merged into the base that outputs are compared with."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_forward_pass(self, dtype: str, mk: Cli, tmp_path: Path) -> None:
        """An identity of the merged model has its outputs, and not those of the base alone."""
        import torch

        base = make_llama(tmp_path / "base", dtype=getattr(torch, dtype))
        lora = make_lora(base, tmp_path / "lora")
        out, both = tmp_path / "out", f"{base}+{lora}"
        assert mk("run", "interleave: every 4", out, "--model", both).status == 0
        result = mk("verify", out, "--against", both, "--forward")
        assert result.status == 0, result.err
        assert "logits on 64 random tokens" in result.out
        found = json.loads((out / "interleave.json").read_text())["verified"]["forward"]
        assert found["largest_difference"] <= 1e-5 * found["largest_logit"]
        assert f"**Status: {card_data.SAME}.**" in (out / "README.md").read_text()
        assert (mk("verify", out, "--against", both, "--trained").status) == 1


class TestPublishing:
    """--repo and --base-model name the model and its base on the Hub."""

    FLAGS = ("--repo", "me/mine", "--base-model", "org/tiny")

    def test_the_repository(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """The repository is the title, the id to load, and the target of the upload."""
        out = tmp_path / "out dir"
        words = ("run", "append: 1", out, "--model", tiny, "--engine", "stream")
        assert mk(*words, *self.FLAGS).status == 0
        text = (out / "README.md").read_text()
        assert ModelCard(text).data.base_model == ["org/tiny"]
        assert "\n# mine\n" in text
        assert text.count('from_pretrained("me/mine", ') == 2
        assert "\nhf upload me/mine 'out dir' .\n" in text
        assert "convert_hf_to_gguf.py 'out dir' --outfile mine.gguf\n" in text
        assert not list(card_lint.problems(text, out))
        for words in (("card", out), ("verify", out, "--against", tiny)):
            assert mk(*words).status == 0
            assert "hf upload me/mine " in (out / "README.md").read_text()

    def test_without_a_repository(self, deeper: Path) -> None:
        """Without a repository, the suggested name is the one to upload to."""
        text = (deeper / "README.md").read_text()
        assert "\nhf upload YOUR-NAME/tiny_81.6K_10Layers-Interleaved deeper .\n" in text

    def test_afterwards(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """`card` with the flags writes what `run` with the flags would have written."""
        words = ("--model", tiny, "--engine", "stream")
        first, second = tmp_path / "1" / "out", tmp_path / "2" / "out"
        assert mk("run", "interleave: every 4", first, *words, *self.FLAGS).status == 0
        assert mk("run", "interleave: every 4", second, *words).status == 0
        result = mk("card", second, *self.FLAGS)
        assert (result.status, result.err) == (0, "")
        one, other = files(first), files(second)
        manifests = [json.loads(each.pop("interleave.json")) for each in (one, other)]
        assert one == other
        for manifest in manifests:
            manifest.pop("weight_sample")
        assert manifests[0] == manifests[1]
        assert mk("verify", second, "--against", tiny).status == 0

    def test_a_trained_model(self, mk: Cli, deeper: Path, tiny: Path, tmp_path: Path) -> None:
        """A trained model has its own repository and its base, and is a finetune."""
        trained = tmp_path / "trained"
        assert mk("card", deeper, "--repo", "me/untrained").status == 0
        train_new_layers(deeper, trained)
        assert mk("card", trained, "--recipe", deeper).status == 0
        assert "me/untrained" not in (trained / "README.md").read_text()
        assert mk("card", trained, *self.FLAGS).status == 0
        assert mk("verify", trained, "--against", tiny, "--trained").status == 0
        text = (trained / "README.md").read_text()
        data = ModelCard(text).data.to_dict()
        assert (data["base_model"], data["base_model_relation"]) == (["org/tiny"], "finetune")
        assert "**Status: trained.**" in text
        assert text.count('from_pretrained("me/mine", ') == 2
        assert "\nhf upload me/mine trained .\n" in text
        assert not list(card_lint.problems(text, trained))

    @pytest.mark.parametrize("flag", ["--repo", "--base-model"])
    @pytest.mark.parametrize("name", ["mine", "a/b/c", "./x", "a b/c", ""])
    def test_not_a_hub_id(self, flag: str, name: str, mk: Cli, deeper: Path, tiny: Path) -> None:
        """A name that is no Hub id is refused before anything is written."""
        before = files(deeper)
        for words in (("card", deeper), ("run", "append: 1", deeper / "x", "--model", tiny)):
            result = mk(*words, flag, name)
            assert (result.status, result.out) == (2, "")
            error, hint = result.err.splitlines()
            assert error.startswith(f"error: {flag[2:].replace('-', '_')}: {name!r} ")
            assert flag in hint
        assert files(deeper) == before

    def test_the_commands_exist(self) -> None:
        """The upload command is one of huggingface_hub's, with these arguments."""
        program = str(Path(sys.executable).parent / "hf")
        for words, part in (
            (("upload",), "REPO_ID [LOCAL_PATH] [PATH_IN_REPO]"),
            (("auth",), "login"),
        ):
            done = subprocess.run(
                [program, *words, "--help"],
                env={**os.environ, "COLUMNS": "200"},  # the usage is wrapped
                capture_output=True,
                text=True,
                check=True,
            )
            assert part in done.stdout

    def test_the_uploaded_card(self, mk: Cli, deeper: Path) -> None:
        """huggingface_hub's ModelCard reads the metadata and the text, and saves them unchanged."""
        assert mk("card", deeper, *self.FLAGS).status == 0
        card = ModelCard.load(deeper / "README.md")
        assert card.data.to_dict() == metadata_load(deeper / "README.md")
        assert card.data.base_model == ["org/tiny"]
        copy = deeper.parent / "copy.md"
        card.save(copy)
        assert ModelCard(copy.read_text()).text == card.text


class TestOneDescription:
    """A model has one description, whether a directive, slices or a pipe made it.

    Only the versions of the tools differ: what mergekit-yaml wrote does not state them.
    """

    @pytest.mark.parametrize(
        "directives",
        [
            ("interleave: every 4", "interleave: 2 layers"),
            ("stack: [[0, 6], [2, 8]], dtype: bfloat16", "layout: [0:6, 2:8], dtype: bfloat16"),
        ],
    )
    def test_the_same_card(
        self, directives: tuple[str, str], mk: Cli, tiny: Path, shell: Shell, tmp_path: Path
    ) -> None:
        """The cards, pictures, recipes and records are the same."""
        recipe = tmp_path / "slices.yml"
        recipe.write_text(mk("gen", directives[0], "--model", tiny).out)
        ways = [tmp_path / name / "out" for name in ("directive", "another", "slices", "pipe")]
        flags = TestPublishing.FLAGS
        for directive, out in zip(directives, ways[:2], strict=True):
            assert mk("run", directive, out, "--model", tiny, *flags).status == 0
        assert mk("run", recipe, ways[2], *flags).status == 0
        ways[3].parent.mkdir()
        merged = shell(f"mergekit-yaml /dev/stdin pipe/out --quiet < {recipe}")
        assert merged.returncode == 0, merged.stderr
        assert mk("fix-config", ways[3]).status == 0
        assert mk("card", ways[3], "--force", *flags).status == 0
        found = [self.described(out) for out in ways]
        for other in found[1:]:
            assert other == found[0]

    def described(self, out: Path) -> dict[str, Any]:
        """Return what the files of a model say about it, without the versions of the tools."""
        record = json.loads((out / "interleave.json").read_text())
        for key in ("tools", "generated", "files", "weight_sample"):
            record.pop(key, None)
        return {
            "README.md": re.sub(r"Made with [^`]*\. ", "", (out / "README.md").read_text()),
            **{n: (out / n).read_text() for n in ("layers.svg", "mergekit_config.yml")},
            "interleave.json": record,
        }


class TestRun:
    """Test the card that `run` writes."""

    def test_a_card_that_cannot_be_written(
        self, mk: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the card cannot be written, `run` warns and keeps the model."""

        def fail(*_: object) -> str:
            raise ValueError("no card today")

        monkeypatch.setattr(model_card, "render", fail)
        out = tmp_path / "out"
        result = mk("run", "append: 1", out, "--model", tiny, "--engine", "stream")
        assert result.status == 0
        (warning,) = result.err.splitlines()
        assert warning.startswith("warning: ")
        assert warning.endswith(": no card today")
        assert "suggested name" not in result.out
        monkeypatch.undo()
        assert mk("verify", out, "--against", tiny).status == 0
        assert mk("card", out).status == 0

    def test_the_network_is_not_used(self, tiny: Path, tmp_path: Path) -> None:
        """`run` and `card` do not use the network even if it is allowed."""
        program = (
            "import socket, sys\n"
            "def refuse(*_): raise AssertionError('network')\n"
            "socket.socket.connect = socket.getaddrinfo = refuse\n"
            "from mergekit_interleave.cli import main as cli\n"
            "cli.main(sys.argv[1:])\n"
        )
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        for words in (
            ["run", "append: 1", "out", "--model", str(tiny), "--base-model", "org/tiny"],
            ["card", "out"],
        ):
            done = subprocess.run(
                [sys.executable, "-c", program, *words],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert "warning" not in done.stderr

    def test_a_base_without_a_card(self, mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
        """If the base has no card, the license is stated as unknown."""
        (own_tiny / "README.md").unlink()
        out = tmp_path / "out"
        assert mk("run", "append: 1", out, "--model", own_tiny, "--engine", "stream").status == 0
        text = (out / "README.md").read_text()
        assert "license:" not in text.partition("\n---")[0]
        assert "| license | unknown: " in text

    def test_a_base_whose_card_is_malformed(self, mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
        """If the base's card is malformed, `run` warns and states the license as unknown."""
        (own_tiny / "README.md").write_text("---\nlicense: [mit\n---\n# Tiny\n")
        out = tmp_path / "out"
        result = mk("run", "append: 1", out, "--model", own_tiny, "--engine", "stream")
        assert result.status == 0
        assert result.err.startswith(f"warning: {own_tiny / 'README.md'}: ")
        assert "| license | unknown: " in (out / "README.md").read_text()

    @pytest.mark.parametrize(
        "front",
        [
            "license: my-own\nlicense_link: LICENSE",
            "license: other\nlicense_link: /home/someone/LICENSE",
            "license: [mit, 5]\nlanguage: {a: b}\npipeline_tag: [a, b]",
            "license: other\nlicense_name: a b c\nlicense_link: javascript:alert(1)",
            "base_model: ./local\nbase_model_relation: none\ntags: none\nlibrary_name: 5",
        ],
    )
    def test_a_base_whose_card_is_invalid(
        self, front: str, mk: Cli, own_tiny: Path, tmp_path: Path
    ) -> None:
        """Invalid metadata in the base's card does not make the new card invalid."""
        (own_tiny / "README.md").write_text(f"---\n{front}\n---\n# Tiny\n")
        out = tmp_path / "out"
        result = mk("run", "append: 1", out, "--model", own_tiny, "--engine", "stream")
        assert (result.status, result.err) == (0, "")
        assert not list(card_lint.problems((out / "README.md").read_text(), out))

    def test_a_base_that_was_expanded_before(self, mk: Cli, deeper: Path, tmp_path: Path) -> None:
        """`run` does not copy the base's layer map, but takes its license."""
        out = tmp_path / "again"
        assert mk("run", "append: 1", out, "--model", deeper, "--engine", "stream").status == 0
        assert (out / "layers.svg").read_bytes() != (deeper / "layers.svg").read_bytes()
        assert mk("verify", out, "--against", deeper).status == 0
        assert "license: mit" in (out / "README.md").read_text()

    def test_packed_weights_are_not_counted(self, mk: Cli, tmp_path: Path) -> None:
        """`run` states no parameter count if a stored integer may pack several parameters."""
        base, out = stored.gpt_oss(tmp_path / "base"), tmp_path / "out"
        result = mk("run", "append: 1", out, "--model", base)
        assert result.status == 0
        assert "suggested name: base_7Layers-Appended" in result.out
        assert "parameters" not in json.loads((out / "interleave.json").read_text())
        assert "| parameters |" not in (out / "README.md").read_text()
