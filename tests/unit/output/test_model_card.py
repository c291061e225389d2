"""The model card: what it says, and that what it says is valid."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.architectures.task import Task
from mergekit_interleave.directive.growth import Every, Repeat
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.directive.scale import zeroed_scales
from mergekit_interleave.layout.layout import Edit, Layout, Slice, expand
from mergekit_interleave.output import card_metadata, model_card

MODEL = ModelRef(ModelPath("org/base"))
BASE = model_card.CardSource("org/base", "org/base", None, "0" * 40, 8, 100, "mit")
WEIGHTS = {
    "exact": True,
    "differences": 0,
    "against": ["org/base"],
    "tensors": 12,
    "bytes": 240,
    "compared": 240,
    "tools": {"mergekit-interleave": "0.1.0"},
}


def facts(**changes: Any) -> model_card.CardData:
    """Some facts."""
    settings: dict[str, Any] = {
        "title": "deeper",
        "layout": expand(
            Every(4), MODEL, 8, lambda _: Edit(zeroed_scales(["o_proj", "down_proj"]))
        ),
        "growth": Every(4),
        "sources": [BASE],
        "identities": {4, 9},
        "status": model_card.EQUAL,
        "norms": False,
        "fingerprint": "0123",
        "task": Task("text-generation"),
        "inherited": {"license": "mit", "language": ["en"]},
        "directive": "interleave: every 4\n",
        "recipe": "slices: []\n",
        "says": "interleave.json",
        "tools": {"mergekit-interleave": "0.1.0"},
        "parameters": (110, 10),
        "nbytes": 220,
        "dtypes": ["BF16"],
        "verified": {"weights": WEIGHTS},
        **changes,
    }
    return model_card.CardData(**settings)


def copies(**changes: Any) -> model_card.CardData:
    """An up-scaling."""
    layout = expand(Repeat((2, 4)), MODEL, 8)
    growth = Repeat((2, 4))
    settings = {"status": model_card.CHANGED, **changes}
    return facts(layout=layout, growth=growth, identities=(), **settings)


def test_the_front_matter_is_read_by_huggingface_hub() -> None:
    """License and language are the base's, the task is the config's."""
    data = ModelCard(model_card.write(facts())).data.to_dict()
    assert data == {
        "base_model": ["org/base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mergekit", "merge", "mergekit-interleave", "block-expansion"],
        "license": "mit",
        "language": ["en"],
    }


def test_what_the_bases_card_says_wins() -> None:
    """Over what config.json tells."""
    inherited = {"pipeline_tag": "feature-extraction", "library_name": "sentence-transformers"}
    data = ModelCard(model_card.write(facts(inherited=inherited))).data.to_dict()
    assert data["pipeline_tag"] == "feature-extraction"
    assert data["library_name"] == "sentence-transformers"


def test_without_a_hub_id_no_base_model_is_named() -> None:
    """An invented lineage would be worse than none."""
    text = model_card.write(facts(sources=[replace(BASE, name="base", hub_id=None)]))
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "`base`, 8 → 10 layers" in text
    assert "On its maker's disk, perhaps not on the Hub: `base`." in text


def test_each_base_model_is_named_once() -> None:
    """In the order of the layers, with the LoRAs that were merged in."""
    layout = Layout((Slice(MODEL, 0, 2), Slice(ModelRef(ModelPath("org/b")), 0, 2)))
    sources = [BASE, model_card.CardSource("org/b+org/lora", "org/b", "org/lora"), BASE]
    found = facts(
        layout=layout, growth=None, sources=sources, identities=(), status=model_card.CHANGED
    )
    data = ModelCard(model_card.write(found)).data.to_dict()
    assert data["base_model"] == ["org/base", "org/b", "org/lora"]
    assert "frankenmerge" in data["tags"]


def test_the_body_says_what_the_model_is() -> None:
    """Depth, growth, new layers, what was verified, the recipe, what it can be merged with."""
    text = model_card.write(facts())
    assert (
        "[org/base](https://huggingface.co/org/base), 8 → 10 layers, 100 → 110 parameters "
        "(+10.0%): 2 new layers, zeroed, one after every 4th of 8: block expansion."
    ) in text
    assert "**Status: untrained, and equal to its base.**" in text
    assert "0-3 [4] 5-8 [9]" in text
    assert "| new layers | 4, 9 |" in text
    assert "| verified | all tensors compared with those they come from, byte for byte |" in text
    assert "`0123`: only models of the same one can be merged with this one" in text
    assert "```yaml\nslices: []\n```" in text
    assert "![layer map](layers.svg)" in text
    assert "arxiv.org/abs/2401.02415" in text
    assert "arxiv.org/abs/2403.13257" in text


def test_its_depth_is_said_once() -> None:
    """Of slices the sentence says it."""
    layout = Layout((Slice(MODEL, 0, 6), Slice(MODEL, 2, 8)))
    found = facts(layout=layout, growth=None, identities=(), status=model_card.CHANGED)
    assert (
        "org/base), 100 → 110 parameters (+10.0%): 8 → 12 layers in 2 slices: depth up-scaling."
    ) in model_card.write(found)


def test_copies_are_not_called_identities() -> None:
    """An up-scaling changes the outputs, cites another paper, and needs no warning of LoRA."""
    text = model_card.write(copies())
    assert "**Status: untrained, and changed.**" in text
    assert "depth-up-scaling" in ModelCard(text).data.tags
    assert "arxiv.org/abs/2312.15166" in text
    assert "2401.02415" not in text
    assert "DoRA" not in text


@pytest.mark.parametrize(
    "status", [model_card.TRAINED, model_card.TOUCHED, model_card.WRONG, model_card.UNKNOWN]
)
def test_no_more_is_said_than_is_known(status: str) -> None:
    """What was trained, or is wrong, is not called equal to its base."""
    text = model_card.write(facts(status=status))
    assert f"**Status: {status}.**" in text
    assert "equal to its base" not in text
    assert ("to the bit" in text) == (status == model_card.TRAINED)
    assert ("DoRA" in text) == (status in (model_card.WRONG, model_card.UNKNOWN))


def test_what_was_trained_is_told_as_past() -> None:
    """What it was made as is no longer what it is."""
    text = model_card.write(facts(status=model_card.TRAINED))
    assert "block expansion, and trained since." in text
    assert "configuration that gave the weights that were trained:" in text
    assert "## Train the new layers further" in text
    assert "Brackets hold the new layers, as they were made." in text
    assert "before it was trained" in model_card.picture(facts(status=model_card.TRAINED))
    assert "trained" not in model_card.picture(facts())


def test_coarse_weights_are_trained_in_float32() -> None:
    """16 bits would round most steps away."""
    lines = model_card.write(facts(dtypes=["BF16"])).splitlines()
    assert [re.findall(r'dtype="(\w+)"', line)[0] for line in lines if "dtype=" in line] == [
        "auto",
        "float32",
    ]


def test_a_conversion_rounds() -> None:
    """And then nothing is equal to the last bit."""
    text = model_card.write(
        facts(conversion="F32 → BF16", verified={"weights": WEIGHTS | {"computed": 3}})
    )
    assert "computes what its base computes but for rounding" in text
    assert "byte for byte (3 of them computed again)" in text


def test_what_could_not_be_compared_was_not() -> None:
    """All tensors of a model with a LoRA."""
    unread = {"not_compared": {"a LoRA was merged into it": 12}, "compared": 0}
    assert "| verified | no tensors compared" in model_card.write(
        facts(verified={"weights": WEIGHTS | unread})
    )


def test_closed_norms_have_another_warning() -> None:
    """Of them the output projections are no remedy."""
    text = model_card.write(facts(norms=True))
    assert "must be trained in full" in text
    assert "DoRA" not in text


def test_fewer_layers_are_no_expansion() -> None:
    """Nothing is new where layers were only left out, and there is nothing to train."""
    layout = Layout((Slice(MODEL, 0, 2), Slice(MODEL, 4, 8)))
    found = facts(
        layout=layout, growth=None, identities=(), status=model_card.CHANGED, parameters=(90, 0)
    )
    text = model_card.write(found)
    assert "pruning" in ModelCard(text).data.tags
    assert "freeze_original_layers" not in text
    assert found.name == "base_90_6Layers-Pruned"


def test_what_is_not_known_is_left_out() -> None:
    """Of a directory whose sources are not at hand."""
    found = facts(
        sources=[model_card.CardSource("base")], parameters=None, nbytes=None,
        status=model_card.UNKNOWN,
        directive=None, recipe=None, says="mergekit_config.yml", inherited={}, verified={},
        task=Task(), tools={},
    )  # fmt: skip
    text = model_card.write(found)
    assert "? → 10 layers" in text
    assert "None" not in text
    assert "Made with" not in text
    assert "interleave.json" not in text
    assert "nothing yet" in text
    assert "pipeline_tag" not in text
    assert found.name == "base_10Layers-Interleaved"


def test_a_license_of_its_own_has_name_and_place() -> None:
    """`other` alone says nothing."""
    link = "https://x/(1)"
    inherited = {"license": "other", "license_name": "foo-1", "license_link": link}
    text = model_card.write(facts(sources=[replace(BASE, license="other")], inherited=inherited))
    assert f"| license | [foo-1](<{link}>) |" in text


def test_licenses_that_differ_are_listed() -> None:
    """With each source."""
    other = model_card.CardSource("org/b", "org/b", license="llama2")
    inherited = {"license": "other", "license_name": "x", "license_link": "https://x"}
    text = model_card.write(facts(sources=[BASE, other], inherited=inherited))
    assert "/org/base): mit; [org/b](https://huggingface.co/org/b): llama2 |" in text


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
def test_suggested_names(found: model_card.CardData, name: str) -> None:
    """Size, depth and placement, as published models have them."""
    assert found.name == name


@given(st.lists(st.text(max_size=120), min_size=1, max_size=5))
def test_suggested_names_are_names(names: list[str]) -> None:
    """That the Hub takes, whatever the sources are called."""
    validate_repo_id(facts(sources=[model_card.CardSource(name) for name in names]).name)


@given(st.text(max_size=40))
def test_cards_of_odd_names_stay_cards(name: str) -> None:
    """A title or a source's name breaks neither front matter nor table."""
    text = model_card.write(facts(title="x" + name, sources=[replace(BASE, name=name or "x")]))
    assert ModelCard(text).data.to_dict()["base_model_relation"] == "merge"
    rows = text.partition("| --- | --- |\n")[2].partition("\n\n")[0].split("\n")
    assert all(row.replace(r"\|", "").count("|") == 3 for row in rows)


class TestSeal:
    """Whether someone has edited a card is known from it alone."""

    def test_as_it_was_written(self) -> None:
        """Whatever the ends of its lines have become."""
        text = model_card.write(facts())
        assert model_card.is_sealed(text)
        assert model_card.is_sealed(text.replace("\n", "\r\n"))

    @pytest.mark.parametrize("edit", ["front", "body", "behind", "seal"])
    def test_edited(self, edit: str) -> None:
        """Anywhere."""
        text = model_card.write(facts())
        edited = {
            "front": text.replace("license: mit", "license: gpl"),
            "body": text.replace("# deeper", "# deepest"),
            "behind": f"{text}\nMine.\n",
            "seal": text.replace(" -->\n", "0 -->\n"),
        }[edit]
        assert edited != text
        assert not model_card.is_sealed(edited)

    def test_other_cards(self) -> None:
        """Have none."""
        assert not model_card.is_sealed("")
        assert not model_card.is_sealed("# Mine\n")


def test_what_was_verified_is_written_anew() -> None:
    """And no more than that."""
    text = model_card.write(facts(verified={}))
    again = model_card.reverified(text, {"weights": WEIGHTS})
    assert "Nothing: " in text
    assert "all tensors, 240 bytes, compared with `org/base`" in again
    assert model_card.reverified("# Mine", {"weights": WEIGHTS}) == "# Mine"


def test_the_picture_is_of_the_layers() -> None:
    """An SVG file."""
    assert ET.fromstring(model_card.picture(facts())).tag.endswith("svg")  # noqa: S314 - our own


def test_the_offline_check_finds_nothing(tmp_path: Path) -> None:
    """In any of these."""
    (tmp_path / "layers.svg").touch()
    for found in (facts(), copies(), facts(status=model_card.TRAINED), facts(verified={})):
        assert not list(card_metadata.problems(model_card.write(found), tmp_path))
