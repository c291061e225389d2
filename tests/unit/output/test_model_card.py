"""The text and the front matter of model cards."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import card_lint
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.architectures.family import family_of
from mergekit_interleave.architectures.task import Task
from mergekit_interleave.directive.growth import Every, Repeat
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.directive.scale import Scale, zeroed_scales
from mergekit_interleave.errors import OutputError
from mergekit_interleave.layout.layout import Edit, Layout, Slice, expand
from mergekit_interleave.output import card_data, card_files, model_card, verification_text

MODEL = ModelRef(ModelPath("org/base"))
BASE = card_data.CardSource("org/base", "org/base", None, "0" * 40, 8, 100, "mit")
WEIGHTS = {
    "exact": True,
    "differences": 0,
    "against": ["org/base"],
    "tensors": 12,
    "bytes": 240,
    "compared": 240,
    "tools": {"mergekit-interleave": "0.1.0"},
}


def facts(**changes: Any) -> card_data.CardData:
    """Return card data with some fields changed."""
    outcomes = changes.pop("verified", {"weights": WEIGHTS})
    settings: dict[str, Any] = {
        "directory": "deeper",
        "layout": expand(
            Every(4), MODEL, 8, lambda _: Edit(zeroed_scales(["o_proj", "down_proj"]))
        ),
        "growth": Every(4),
        "sources": [BASE],
        "identities": {4, 9},
        "status": card_data.EQUAL,
        "norms": False,
        "fingerprint": "0123",
        "task": Task("text-generation"),
        "inherited": {"license": "mit", "language": ["en"]},
        "directive": "interleave: every 4\n",
        "recipe": "slices: []\n",
        "layers_file": "interleave.json",
        "tools": {"mergekit-interleave": "0.1.0"},
        "parameters": (110, 10),
        "nbytes": 220,
        "dtypes": ["BF16"],
        "family": family_of("llama"),
        "verified": verification_text.short(outcomes),
        "checks": verification_text.sentences(outcomes),
        **changes,
    }
    return card_data.CardData(**settings)


def copies(**changes: Any) -> card_data.CardData:
    """Return card data of an up-scaled model."""
    layout = expand(Repeat((2, 4)), MODEL, 8)
    growth = Repeat((2, 4))
    settings = {"status": card_data.CHANGED, **changes}
    return facts(layout=layout, growth=growth, identities=(), **settings)


def intro(text: str) -> str:
    """Return the paragraph below the title."""
    return text.partition("\n# deeper\n\n")[2].partition("\n")[0]


def section(text: str, heading: str) -> str:
    """Return the text between a heading and the next one."""
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def row(text: str, key: str) -> str:
    """Return the value of a row in the table."""
    (value,) = re.findall(rf"^\| {key} \| (.*) \|$", text, re.MULTILINE)
    return str(value)


def test_the_front_matter_is_read_by_huggingface_hub() -> None:
    """License and language come from the base, and the task comes from config.json."""
    data = ModelCard(model_card.render(facts())).data.to_dict()
    assert data == {
        "base_model": ["org/base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mergekit", "merge", "mergekit-interleave", "block-expansion"],
        "license": "mit",
        "language": ["en"],
    }


def test_the_front_matter_of_the_base_takes_precedence() -> None:
    """The base's front matter replaces fields that config.json implies."""
    inherited = {"pipeline_tag": "feature-extraction", "library_name": "sentence-transformers"}
    data = ModelCard(model_card.render(facts(inherited=inherited))).data.to_dict()
    assert data["pipeline_tag"] == "feature-extraction"
    assert data["library_name"] == "sentence-transformers"


def test_without_a_hub_id_no_base_model_is_named() -> None:
    """The card does not invent a base model."""
    text = model_card.render(facts(sources=[replace(BASE, name="base", hub_id=None)]))
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "`base`" in intro(text)
    assert "8 → 10 layers" in intro(text)
    assert "`base`" in section(text, "Recipe")
    assert "huggingface.co" not in text


def test_each_base_model_is_named_once() -> None:
    """Each base model and each merged LoRA is named once, in the order of the layers."""
    layout = Layout((Slice(MODEL, 0, 2), Slice(ModelRef(ModelPath("org/b")), 0, 2)))
    sources = [BASE, card_data.CardSource("org/b+org/lora", "org/b", "org/lora"), BASE]
    found = facts(
        layout=layout, growth=None, sources=sources, identities=(), status=card_data.CHANGED
    )
    data = ModelCard(model_card.render(found)).data.to_dict()
    assert data["base_model"] == ["org/base", "org/b", "org/lora"]
    assert "frankenmerge" in data["tags"]


def test_the_body_describes_the_model() -> None:
    """The body has depth, growth, new layers, verification, recipe and fingerprint."""
    text = model_card.render(facts())
    assert "[org/base](https://huggingface.co/org/base)" in intro(text)
    for fact in ("8 → 10 layers", "100 → 110 parameters", "+10.0%", "block expansion"):
        assert fact in intro(text)
    assert f"**Status: {card_data.EQUAL}.**" in text
    assert "0-3 [4] 5-8 [9]" in section(text, "Layers")
    assert row(text, "new layers") == "4, 9"
    assert row(text, "verified") == facts().verified
    assert "byte for byte" in row(text, "verified")
    assert "`0123`" in row(text, "layout fingerprint")
    assert "```yaml\nslices: []\n```" in section(text, "Recipe")
    assert "![layer map](layers.svg)" in text
    assert "arxiv.org/abs/2401.02415" in text
    assert "arxiv.org/abs/2403.13257" in text


def test_the_depth_is_not_repeated() -> None:
    """The card has the depth once if the description of the slices contains it."""
    layout = Layout((Slice(MODEL, 0, 6), Slice(MODEL, 2, 8)))
    found = facts(layout=layout, growth=None, identities=(), status=card_data.CHANGED)
    words = intro(model_card.render(found))
    assert words.count("8 → 12 layers") == 1
    for fact in ("100 → 110 parameters", "+10.0%", "2 slices", "depth up-scaling"):
        assert fact in words


def test_copies_are_not_called_identities() -> None:
    """The card of an up-scaled model cites another paper and omits the LoRA warning."""
    text = model_card.render(copies())
    assert f"**Status: {card_data.CHANGED}.**" in text
    assert "depth-up-scaling" in ModelCard(text).data.tags
    assert "arxiv.org/abs/2312.15166" in text
    assert "2401.02415" not in text
    assert "DoRA" not in text


@pytest.mark.parametrize(
    "status", [card_data.TRAINED, card_data.UNVERIFIED, card_data.WRONG, card_data.UNKNOWN]
)
def test_only_an_equal_model_is_called_equal(status: str) -> None:
    """A trained, failed or unknown model is not called equal to its base."""
    text = model_card.render(facts(status=status))
    assert f"**Status: {status}.**" in text
    assert card_data.EQUAL.partition(", ")[2] not in text
    assert ("bit for bit" in text) == (status == card_data.TRAINED)
    assert ("DoRA" in text) == (status in (card_data.WRONG, card_data.UNKNOWN))


def test_a_trained_model_is_described_before_training() -> None:
    """The card of a trained model has the layers and the recipe before training."""
    text = model_card.render(facts(status=card_data.TRAINED))
    assert re.search("block expansion.*trained", intro(text))
    assert "before training" in section(text, "Recipe")
    assert "before training" in section(text, "Layers")
    assert section(text, "Train the new layers further")
    assert "before training" not in model_card.render(facts())
    assert "before training" in model_card.picture(facts(status=card_data.TRAINED))
    assert "training" not in model_card.picture(facts())


def test_half_precision_weights_are_trained_in_float32() -> None:
    """The training snippet uses float32, because 16 bits would round most updates away."""
    lines = model_card.render(facts(dtypes=["BF16"])).splitlines()
    assert [re.findall(r'dtype="(\w+)"', line)[0] for line in lines if "dtype=" in line] == [
        "auto",
        "float32",
    ]


def test_a_conversion_rounds() -> None:
    """A converted model equals its base only up to rounding."""
    text = model_card.render(
        facts(conversion="F32 → BF16", verified={"weights": WEIGHTS | {"computed": 3}})
    )
    (status,) = re.findall(rf"^\*\*Status: {card_data.EQUAL}.*", text, re.MULTILINE)
    assert "rounding" in status
    assert "F32 → BF16" in status
    assert re.search(r"byte for byte.*\b3\b", row(text, "verified"))


def test_nothing_was_comparable() -> None:
    """If no tensor can be compared, the card has no claim of equality."""
    unread = {"not_compared": {"a LoRA was merged into it": 12}, "compared": 0}
    text = model_card.render(facts(verified={"weights": WEIGHTS | unread}))
    assert row(text, "verified").startswith("no tensors ")
    assert "byte for byte" not in text


def test_zeroed_norms_have_another_warning() -> None:
    """If norms are zeroed, the card warns about norms instead of DoRA."""
    training = section(model_card.render(facts(norms=True)), "Train only the new layers")
    assert "norms" in training
    assert "LoRA" in training
    assert "DoRA" not in training
    assert "norms" not in model_card.render(facts())


def test_fewer_layers_are_no_expansion() -> None:
    """A pruned model has no new layers, so the card offers to train those at its seam."""
    layout = Layout((Slice(MODEL, 0, 2), Slice(MODEL, 4, 8)))
    found = facts(
        layout=layout, growth=None, identities=(), status=card_data.CHANGED, parameters=(90, 0)
    )
    text = model_card.render(found)
    assert "pruning" in ModelCard(text).data.tags
    training = section(text, "Train the layers at the merge seams")
    assert 'freeze_original_layers(model, layers="seams")' in training
    assert "--layers seams" in training
    assert "layers = {1, 2}" in training
    assert "| merge seams | 1, at layers 1-2 |" in text
    assert found.name == "base_90_6Layers-Pruned"


def test_a_model_with_nothing_to_train() -> None:
    """A model with only scaled layers has neither new layers nor seams, and no such section."""
    layout = Layout((Slice(MODEL, 0, 4), Slice(MODEL, 4, 8, (Scale(0.5),))))
    found = facts(
        layout=layout, growth=None, identities=(), status=card_data.CHANGED, parameters=(90, 0)
    )
    text = model_card.render(found)
    assert "freeze_original_layers" not in text
    assert "8 layers, 4 of them scaled" in text
    assert "| scaled layers | 4-7 |" in text
    assert found.name == "base_90_8Layers-Scaled"


def test_the_card_shows_lines_that_need_no_package() -> None:
    """The lines name the new layers, and are left out where the names in memory are unknown."""
    training = section(model_card.render(facts()), "Train only the new layers")
    assert "named_parameters" in training
    assert "named_parameters" not in model_card.render(facts(family=None))


def test_unknown_values_are_left_out() -> None:
    """Unknown values are omitted, and the unknown depth is a question mark."""
    found = facts(
        sources=[card_data.CardSource("base")], parameters=None, nbytes=None,
        status=card_data.UNKNOWN,
        directive=None, recipe=None, layers_file="mergekit_config.yml", inherited={}, verified={},
        task=Task(), tools={},
    )  # fmt: skip
    text = model_card.render(found)
    assert "? → 10 layers" in text
    assert "None" not in text
    assert "Made with" not in text
    assert "interleave.json" not in text
    assert row(text, "verified") == "nothing yet"
    assert "pipeline_tag" not in text
    assert found.name == "base_10Layers-Interleaved"


def test_a_custom_license_has_a_name_and_a_link() -> None:
    """The row of a custom license has its name and its link."""
    link = "https://x/(1)"
    inherited = {"license": "other", "license_name": "foo-1", "license_link": link}
    text = model_card.render(facts(sources=[replace(BASE, license="other")], inherited=inherited))
    assert row(text, "license") == f"[foo-1](<{link}>)"


def test_licenses_that_differ_are_listed() -> None:
    """Each source is listed with its license."""
    other = card_data.CardSource("org/b", "org/b", license="llama2")
    inherited = {"license": "other", "license_name": "x", "license_link": "https://x"}
    text = model_card.render(facts(sources=[BASE, other], inherited=inherited))
    cell = row(text, "license")
    assert re.fullmatch(r"\[org/base\]\(.*/org/base\): mit; \[org/b\]\(.*/org/b\): llama2", cell)


@pytest.mark.parametrize(
    ("found", "name"),
    [
        (facts(), "base_110_10Layers-Interleaved"),
        (copies(parameters=(8_986_644_480, 1)), "base_8.99B_10Layers-Interwoven"),
        (
            facts(layout=Layout((Slice(MODEL, 0, 8), Slice(MODEL, 7, 8)))),
            "base_110_9Layers-Appended",
        ),
        (
            facts(layout=Layout((Slice(MODEL, 0, 6), Slice(MODEL, 2, 8))), identities=()),
            "base_110_12Layers-Stacked",
        ),
        (
            facts(layout=Layout((Slice(MODEL, 4, 8), Slice(MODEL, 0, 4))), identities=()),
            "base_110_8Layers-Rearranged",
        ),
    ],
)
def test_suggested_names(found: card_data.CardData, name: str) -> None:
    """A suggested name has size, depth and placement."""
    assert found.name == name


@given(st.lists(st.text(max_size=120), min_size=1, max_size=5))
def test_suggested_names_are_valid(names: list[str]) -> None:
    """The Hub accepts the suggested name for any source names."""
    validate_repo_id(facts(sources=[card_data.CardSource(name) for name in names]).name)


@given(st.text(max_size=40))
def test_cards_of_odd_names_stay_cards(name: str) -> None:
    """No title or source name breaks the front matter or the table."""
    odd = replace(BASE, name=name or "x")
    growth = card_data.CardGrowth(odd, [odd], 8, "grown", ", then trained")
    text = model_card.render(
        facts(directory="x" + name, sources=[odd], lineage=[growth], since=[name], new_since=[4])
    )
    assert ModelCard(text).data.to_dict()["base_model_relation"] == "merge"
    rows = text.partition("| --- | --- |\n")[2].partition("\n\n")[0].split("\n")
    assert all(row.replace(r"\|", "").count("|") == 3 for row in rows)


def test_a_card_shows_each_check() -> None:
    """Each check has a line, and a card without checks names the command."""
    unverified = model_card.render(facts(verified={}))
    assert "`mk-interleave verify`" in section(unverified, "Verification")
    (line,) = section(model_card.render(facts()), "Verification").strip().splitlines()
    assert line.startswith("- Weights: ")
    for fact in ("240 bytes", "`org/base`", "byte for byte"):
        assert fact in line


class TestGenerated:
    """Tests of the digests in interleave.json that identify generated files."""

    def written(self, folder: Path) -> dict[str, Any]:
        """Write card and picture, and return the content of interleave.json."""
        texts = card_files.generate(facts())
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return {card_files.KEY: card_files.digests(texts)}

    @pytest.mark.parametrize("name", card_files.FILES)
    def test_unedited(self, name: str, tmp_path: Path) -> None:
        """A generated file is recognized, also with other line ends."""
        content, file = self.written(tmp_path), tmp_path / name
        assert card_files.is_generated(file, content)
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
        assert card_files.is_generated(file, content)
        card_files.check_replaceable(tmp_path, content, force=False)

    @pytest.mark.parametrize(
        ("name", "old", "new"),
        [
            ("README.md", "license: mit", "license: gpl"),
            ("README.md", "# deeper", "# deepest"),
            ("README.md", "## Recipe", "## Recipe\n\nMine."),
            ("layers.svg", "original", "mine"),
        ],
    )
    def test_edited(self, name: str, old: str, new: str, tmp_path: Path) -> None:
        """Any change of front matter, text or picture needs --force."""
        content, file = self.written(tmp_path), tmp_path / name
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")
        assert not card_files.is_generated(file, content)
        with pytest.raises(OutputError, match=re.escape(str(file))):
            card_files.check_replaceable(tmp_path, content, force=False)
        card_files.check_replaceable(tmp_path, content, force=True)

    @pytest.mark.parametrize("content", [{}, {"generated": 5}, {"generated": {"README.md": []}}])
    def test_another_card(self, content: dict[str, Any], tmp_path: Path) -> None:
        """A card without a valid digest is not a generated one."""
        (tmp_path / "README.md").write_text("# Mine\n")
        assert not card_files.is_generated(tmp_path / "README.md", content)
        with pytest.raises(OutputError):
            card_files.check_replaceable(tmp_path, content, force=False)

    def test_a_card_by_release_0_1(self, tmp_path: Path) -> None:
        """A card of release 0.1 has its own digest in its last line."""
        page = tmp_path / "README.md"
        page.write_text("# Old\n<!-- as mk-interleave wrote it: ccd2955cfc4a825d -->\n")
        assert card_files.is_generated(page, {})
        page.write_text("# Odd\n<!-- as mk-interleave wrote it: ccd2955cfc4a825d -->\n")
        assert not card_files.is_generated(page, {})


def test_the_picture_is_svg() -> None:
    """The picture is an SVG document."""
    assert ET.fromstring(model_card.picture(facts())).tag.endswith("svg")  # noqa: S314 - our own


def test_generated_cards_pass_the_lint(tmp_path: Path) -> None:
    """Generated cards of any status pass the lint."""
    (tmp_path / "layers.svg").touch()
    for found in (facts(), copies(), facts(status=card_data.TRAINED), facts(verified={})):
        assert not list(card_lint.problems(model_card.render(found), tmp_path))


def test_the_repository_is_the_id_to_load() -> None:
    """With a repository, the card's title, code and commands name it; else the directory."""
    text = model_card.render(facts(repo="me/mine"))
    assert "\n# mine\n" in text
    assert text.count('from_pretrained("me/mine", ') == 2
    commands = section(text, "Upload and conversion")
    assert commands.count("\n```sh\n") == 2
    assert all(block.count("\n") == 4 for block in re.findall(r"```sh.*?```", commands, re.DOTALL))
    assert "\nhf upload me/mine deeper .\n" in commands
    local = section(model_card.render(facts()), "Upload and conversion")
    assert "\nhf upload YOUR-NAME/base_110_10Layers-Interleaved deeper .\n" in local


def test_the_recipe_is_folded() -> None:
    """The recipe is behind a summary, with the empty lines that Markdown needs."""
    recipe = section(model_card.render(facts()), "Recipe")
    assert "<summary>1 line of YAML</summary>\n\n```yaml\nslices: []\n```\n\n</details>" in recipe


def test_only_a_trained_model_is_a_finetune() -> None:
    """After training, the relation to the base is `finetune`."""
    relations = {
        status: ModelCard(model_card.render(facts(status=status))).data.base_model_relation
        for status in (card_data.EQUAL, card_data.CHANGED, card_data.TRAINED, card_data.UNVERIFIED)
    }
    assert [*relations.values()] == ["merge", "merge", "finetune", "finetune"]
