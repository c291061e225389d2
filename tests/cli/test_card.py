"""The model card and the layer map, as `run`, `card` and `verify` write them."""

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
from harness import Cli, make_llama
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file, save_file

from mergekit_interleave.commands import card as card_command
from mergekit_interleave.output import card_files, model_card

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
    """A Hub cache of small models with the names in the examples."""
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


NO_LINK = "note: no base_model: its Hub id is unknown; `run --base-model org/name` states it\n"


@pytest.mark.parametrize("example", HUB_IDS)
def test_the_cards_of_all_examples(example: str, cache: Path, shell: Shell, tmp_path: Path) -> None:
    """They pass the lint, name no path, and are the same for any hash seed."""
    engine = "mergekit" if example == "deep-miqu-103b" else "stream"
    command = f"mk-interleave run {EXAMPLES / example}.yml out --engine {engine}"
    result = shell(command, HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    written = (tmp_path / "out" / "README.md").read_bytes()
    for seed in ("1", "2"):
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
    own = yaml.safe_load((EXAMPLES / f"{example}.yml").read_text())
    assert directive.keys() == own.keys()


@pytest.fixture
def deeper(mk: Cli, tiny: Path, tmp_path: Path) -> Path:
    """A tiny model with two new layers."""
    out = tmp_path / "deeper"
    words = ("run", "--every", "4", out, "--model", tiny, "--engine", "stream")
    assert mk(*words).status == 0
    return out


def files(path: Path) -> dict[str, bytes]:
    """The files of a directory."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


class TestCard:
    """The command `card DIR`."""

    def test_it_writes_what_run_wrote(self, mk: Cli, deeper: Path) -> None:
        """Card and picture are the same bytes, and the suggested name is the same."""
        before = files(deeper)
        (deeper / "layers.svg").unlink()
        result = mk("card", deeper)
        assert (result.status, result.err) == (0, NO_LINK)
        assert result.out.splitlines()[:2] == ["README.md: written", "layers.svg: written"]
        assert "suggested name: tiny_" in result.out
        assert files(deeper) == before

    def test_a_missing_card(self, mk: Cli, deeper: Path) -> None:
        """It is written again."""
        before = files(deeper)
        (deeper / "README.md").unlink()
        assert mk("card", deeper).status == 0
        assert files(deeper) == before

    def test_an_edited_card(self, mk: Cli, deeper: Path) -> None:
        """It is kept, with the picture; --force replaces it."""
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

    def test_an_edited_picture(self, mk: Cli, deeper: Path) -> None:
        """It is kept without --force, by `card` and by `verify`."""
        (deeper / "layers.svg").write_text("<svg/>")
        before = files(deeper)
        result = mk("card", deeper)
        assert (result.status, str(deeper / "layers.svg") in result.err) == (1, True)
        assert files(deeper) == before
        assert mk("card", deeper, "--force").status == 0
        assert (deeper / "layers.svg").read_text() != "<svg/>"

    def test_verify_keeps_an_edited_card(self, mk: Cli, deeper: Path, tiny: Path) -> None:
        """It warns, and only interleave.json records the result."""
        page = deeper / "README.md"
        page.write_text(page.read_text() + "\nMine.\n")
        edited = page.read_bytes()
        train(deeper)
        result = mk("verify", deeper, "--against", tiny, "--trained")
        assert result.status == 0
        assert result.err.startswith(f"warning: {page}: ")
        assert page.read_bytes() == edited
        assert "trained" in json.loads((deeper / "interleave.json").read_text())["verified"]
        assert "before training" in (deeper / "layers.svg").read_text()
        both = mk("verify", deeper, "--against", tiny, "--trained", "--forward")
        assert both.err.count("warning: ") == 1

    def test_a_model_of_release_0_1(self, mk: Cli, deeper: Path, tiny: Path) -> None:
        """Its card ends with a digest of itself; its interleave.json records none."""
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
        """The function returns what it wrote, as JSON values too."""
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
        """The title is the directory's name."""
        deeper.rename(tmp_path / "Better-10L")
        assert mk("card", tmp_path / "Better-10L").status == 0
        text = (tmp_path / "Better-10L" / "README.md").read_text()
        assert "# Better-10L\n" in text
        assert 'from_pretrained("Better-10L"' in text

    def test_after_training(self, mk: Cli, deeper: Path, tmp_path: Path) -> None:
        """The card calls it neither untrained nor equal to its base, and drops its verification."""
        trained = tmp_path / "trained"
        shutil.copytree(deeper, trained)
        train(trained)
        assert mk("card", trained).status == 0
        text = (trained / "README.md").read_text()
        assert "**Status: trained, not verified.**" in text
        assert "| verified | nothing yet |" in text
        assert "bit for bit" not in text

    def test_a_trainers_directory(self, mk: Cli, deeper: Path, tiny: Path, tmp_path: Path) -> None:
        """It has only weights and config until interleave.json is copied there."""
        trained = tmp_path / "trained"
        train(deeper, trained)
        refused = mk("card", trained)
        assert refused.status == 1
        assert "copy interleave.json" in refused.err
        shutil.copy(deeper / "interleave.json", trained)
        assert mk("card", trained).status == 0
        assert "**Status: trained, not verified.**" in (trained / "README.md").read_text()
        assert mk("verify", trained, "--against", tiny, "--trained").status == 0
        text = (trained / "README.md").read_text()
        assert "**Status: trained.**" in text
        assert "block expansion, then trained." in text
        assert "before training" in (trained / "layers.svg").read_text()
        assert mk("card", trained).status == 0
        assert (trained / "README.md").read_text() == text
        assert not list(card_lint.problems(text, trained))

    def test_trained_in_place(self, mk: Cli, deeper: Path, tiny: Path) -> None:
        """`verify --trained` updates the unedited card and picture."""
        train(deeper)
        assert mk("verify", deeper, "--against", tiny, "--trained").status == 0
        assert "**Status: trained.**" in (deeper / "README.md").read_text()
        assert "before training" in (deeper / "layers.svg").read_text()

    def test_a_failed_verification(self, mk: Cli, deeper: Path, tiny: Path) -> None:
        """The card no longer calls the model equal to its base."""
        tensors = load_file(deeper / "model.safetensors")
        tensors["model.embed_tokens.weight"] += 1
        save_file(tensors, deeper / "model.safetensors", metadata={"format": "pt"})
        assert mk("verify", deeper, "--against", tiny).status == 1
        text = (deeper / "README.md").read_text()
        assert "**Status: verification failed.**" in text
        assert "| verified | **failed** with 1 difference |" in text

    def test_a_verification_after_training(self, mk: Cli, deeper: Path, tiny: Path) -> None:
        """The card shows its result and the new status."""
        train(deeper)
        assert mk("verify", deeper, "--against", tiny, "--trained").status == 0
        text = (deeper / "README.md").read_text()
        assert "**Status: trained.**" in text
        assert "the base's own, layer for layer" in text
        content = json.loads((deeper / "interleave.json").read_text())
        assert all(card_files.is_generated(deeper / name, content) for name in card_files.FILES)
        assert mk("card", deeper).status == 0
        assert (deeper / "README.md").read_text() == text

    def test_a_file_in_place_of_a_directory(self, mk: Cli, deeper: Path) -> None:
        """The error says so."""
        result = mk("card", deeper / "config.json")
        assert (result.status, "config.json: is a file" in result.err) == (1, True)

    def test_a_broken_manifest(self, mk: Cli, deeper: Path) -> None:
        """It is one error, without the hint to copy the file."""
        (deeper / "interleave.json").write_text("{}")
        result = mk("card", deeper)
        assert (result.status, "not an interleave.json" in result.err) == (1, True)
        assert "copy" not in result.err

    def test_a_model_unlike_its_record(self, mk: Cli, deeper: Path) -> None:
        """It gets no card."""
        config = json.loads((deeper / "config.json").read_text())
        (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
        before = files(deeper)
        result = mk("card", deeper)
        assert result.status == 1
        assert files(deeper) == before

    def test_what_mergekit_wrote(self, mk: Cli, tiny: Path, shell: Shell, tmp_path: Path) -> None:
        """With its sources, the card is complete; mergekit's own is replaced only by --force."""
        (tmp_path / "cfg.yml").write_text(mk("gen", "--every", "4", "--model", tiny).out)
        assert shell("mergekit-yaml cfg.yml merged").returncode == 0
        assert mk("card", tmp_path / "merged").status == 1
        result = mk("card", tmp_path / "merged", "--force")
        assert (result.status, result.err) == (0, NO_LINK)
        text = (tmp_path / "merged" / "README.md").read_text()
        assert not list(card_lint.problems(text, tmp_path / "merged"))
        assert str(tmp_path) not in text
        assert "**Status: untrained, equal to its base.**" in text
        assert "license: mit" in text
        assert re.search(r"^Made from `tiny` .*: 8 → 10 layers in 3 slices", text, re.MULTILINE)

    def test_what_mergekit_wrote_elsewhere(
        self, mk: Cli, tiny: Path, shell: Shell, tmp_path: Path
    ) -> None:
        """Without its sources, the card has what the directory records."""
        base = tmp_path / "gone"
        shutil.copytree(tiny, base)
        (tmp_path / "cfg.yml").write_text(mk("gen", "--every", "4", "--model", base).out)
        assert shell("mergekit-yaml cfg.yml merged").returncode == 0
        shutil.rmtree(base)
        result = mk("card", tmp_path / "merged", "--force")
        assert (result.status, result.err) == (0, NO_LINK)
        text = (tmp_path / "merged" / "README.md").read_text()
        assert not list(card_lint.problems(text, tmp_path / "merged"))
        assert "Made from `gone` (? → 10 layers" in text
        assert "**Status: untrained.**" in text
        assert str(tmp_path) not in text

    @pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"x" * 2**20])
    def test_a_card_that_is_not_text(self, mk: Cli, deeper: Path, content: bytes) -> None:
        """It counts as edited; --force replaces it."""
        (deeper / "README.md").write_bytes(content)
        assert str(deeper / "README.md") in mk("card", deeper).err
        assert mk("card", deeper, "--force").status == 0

    def test_a_card_that_is_not_a_file(self, mk: Cli, deeper: Path) -> None:
        """Nothing is replaced."""
        (deeper / "README.md").unlink()
        os.mkfifo(deeper / "README.md")
        picture = (deeper / "layers.svg").read_bytes()
        assert str(deeper / "README.md") in mk("card", deeper, "--force").err
        assert (deeper / "layers.svg").read_bytes() == picture

    def test_links_are_not_written_through(self, mk: Cli, deeper: Path, tmp_path: Path) -> None:
        """They may lead into the Hub's cache."""
        linked = tmp_path / "linked"
        linked.mkdir()
        for file in deeper.iterdir():
            (linked / file.name).symlink_to(file)
        result = mk("card", linked, "--force")
        assert (result.status, "is a link" in result.err) == (1, True)

    @pytest.mark.parametrize("key", ["models", "directive", "inherited", "tools", "verified"])
    @pytest.mark.parametrize("value", [5, [], [5], {"a": []}, None, "x"])
    def test_nonsense_in_the_manifest(self, mk: Cli, deeper: Path, key: str, value: object) -> None:
        """It gives one error or a valid card, and never a traceback."""
        content = json.loads((deeper / "interleave.json").read_text())
        (deeper / "interleave.json").write_text(json.dumps({**content, key: value}))
        result = mk("card", deeper)
        assert "unexpected" not in result.err
        if result.status:
            assert result.err.startswith("error: ")
        else:
            text = (deeper / "README.md").read_text()
            assert ModelCard(text).data.to_dict()["base_model_relation"] == "merge"
            assert "| layers | 8 → 10, 2 of them new |" in text

    def test_wrong_sizes_in_the_manifest(self, mk: Cli, deeper: Path) -> None:
        """The card takes them from the weights, and `verify` reports them."""
        content = json.loads((deeper / "interleave.json").read_text())
        lie = {"parameters": 9**9, "bytes": 7, "new_parameters": 1}
        (deeper / "interleave.json").write_text(json.dumps(content | lie))
        assert "parameters should not be 387420489" in mk("verify", deeper).out
        assert mk("card", deeper).status == 0
        assert "| weights | 326 kB of F32 |" in (deeper / "README.md").read_text()

    @pytest.mark.parametrize("words", [["nowhere"], ["."]])
    def test_not_a_model(self, mk: Cli, tmp_path: Path, words: list[str]) -> None:
        """A directory without a record, or a missing one, is an error."""
        assert mk("card", *words, cwd=tmp_path).status == 1


def train(directory: Path, out: Path | None = None) -> None:
    """Train the new layers for some steps, and save the model in place or elsewhere."""
    import torch
    from transformers import AutoModelForCausalLM

    from mergekit_interleave import freeze_original_layers

    model = AutoModelForCausalLM.from_pretrained(directory)
    freeze_original_layers(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens = torch.arange(16).reshape(1, 16)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(out or directory)


class TestRun:
    """The card that `run` writes."""

    def test_a_card_that_cannot_be_written(
        self, mk: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is a warning, and the model is kept."""

        def fail(*_: object) -> str:
            raise ValueError("the moon is full")

        monkeypatch.setattr(model_card, "render", fail)
        out = tmp_path / "out"
        result = mk("run", "append: 1", out, "--model", tiny, "--engine", "stream")
        assert result.status == 0
        assert result.err == "warning: the model card could not be written: the moon is full\n"
        assert "suggested name" not in result.out
        monkeypatch.undo()
        assert mk("verify", out, "--against", tiny).status == 0
        assert mk("card", out).status == 0

    def test_the_network_is_not_used(self, tiny: Path, tmp_path: Path) -> None:
        """It is not used even if allowed."""
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
        """The card says that the license is unknown."""
        (own_tiny / "README.md").unlink()
        out = tmp_path / "out"
        assert mk("run", "append: 1", out, "--model", own_tiny, "--engine", "stream").status == 0
        text = (out / "README.md").read_text()
        assert "license:" not in text.partition("\n---")[0]
        assert "| license | unknown: " in text

    def test_a_base_whose_card_is_malformed(self, mk: Cli, own_tiny: Path, tmp_path: Path) -> None:
        """A warning says that its license is not taken."""
        (own_tiny / "README.md").write_text("---\nlicense: [mit\n---\n# Tiny\n")
        out = tmp_path / "out"
        said = mk("run", "append: 1", out, "--model", own_tiny, "--engine", "stream")
        assert said.status == 0
        assert "warning: " in said.err
        assert str(own_tiny / "README.md") in said.err
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
        """The Hub would accept the card that is made from it."""
        (own_tiny / "README.md").write_text(f"---\n{front}\n---\n# Tiny\n")
        out = tmp_path / "out"
        result = mk("run", "append: 1", out, "--model", own_tiny, "--engine", "stream")
        assert (result.status, result.err) == (0, "")
        assert not list(card_lint.problems((out / "README.md").read_text(), out))

    def test_a_base_that_was_expanded_before(self, mk: Cli, deeper: Path, tmp_path: Path) -> None:
        """Its picture is not copied, and its license is taken."""
        out = tmp_path / "again"
        assert mk("run", "append: 1", out, "--model", deeper, "--engine", "stream").status == 0
        assert (out / "layers.svg").read_bytes() != (deeper / "layers.svg").read_bytes()
        assert mk("verify", out, "--against", deeper).status == 0
        assert "license: mit" in (out / "README.md").read_text()

    def test_packed_weights_are_not_counted(self, mk: Cli, tmp_path: Path) -> None:
        """An integer may hold several parameters, so that no count is stated."""
        base, out = stored.gpt_oss(tmp_path / "base"), tmp_path / "out"
        result = mk("run", "append: 1", out, "--model", base)
        assert result.status == 0
        assert "suggested name: base_7Layers-Appended" in result.out
        assert "parameters" not in json.loads((out / "interleave.json").read_text())
        assert "| parameters |" not in (out / "README.md").read_text()
