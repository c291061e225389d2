"""The model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from mergekit_interleave import card
from mergekit_interleave.growth import Every, Repeat
from mergekit_interleave.layout import Edit, Layout, Slice, expand
from mergekit_interleave.reference import ModelPath, ModelRef
from mergekit_interleave.scaling import zeroed_scales

MODEL = ModelRef(ModelPath("org/base"))


def facts(**changes: Any) -> card.Facts:
    """Some facts."""
    settings: dict[str, Any] = {
        "name": "deeper",
        "layout": expand(
            Every(4), MODEL, 8, lambda _: Edit(zeroed_scales(["o_proj", "down_proj"]))
        ),
        "sources": ["org/base"],
        "names": ["org/base"],
        "identities": {4, 9},
        "base_models": ["org/base"],
        "base_card": {"license": "mit", "language": ["en"], "base_model": "org/older"},
        "directive": "interleave: every 4\n",
        "recipe": "slices: []\n",
        "depth": 8,
        "parameters": (110, 100),
        "identity": True,
        "conversion": None,
        "fingerprint": "0123",
        **changes,
    }
    return card.Facts(**settings)


def test_the_front_matter_is_read_by_huggingface_hub() -> None:
    """License and language are the base's, its lineage is not copied."""
    data = ModelCard(card.write(facts())).data.to_dict()
    assert data == {
        "base_model": ["org/base"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mergekit", "merge", "mergekit-interleave", "block-expansion"],
        "license": "mit",
        "language": ["en"],
    }


def test_without_a_hub_id_no_base_model_is_named() -> None:
    """An invented lineage would be worse than none."""
    assert "base_model" not in ModelCard(card.write(facts(base_models=[]))).data.to_dict()


def test_the_body_says_what_the_model_is() -> None:
    """Depth, growth, new layers, the recipe."""
    text = card.write(facts())
    assert "8 → 10 layers" in text
    assert "100 → 110 (+10.0%)" in text
    assert "0-3 [4] 5-8 [9]" in text
    assert "| 4 | org/base 3 | zeroed |" in text
    assert "computes what its base computes" in text
    assert "```yaml\nslices: []\n```" in text


def test_copies_are_not_called_identities() -> None:
    """An up-scaling changes the outputs, and the card says so."""
    text = card.write(facts(layout=expand(Repeat((2, 4)), MODEL, 8), identities=(), identity=False))
    assert "its outputs differ" in text
    assert "depth-up-scaling" in ModelCard(text).data.tags


def test_fewer_layers_are_not_called_an_expansion() -> None:
    """Nothing is new where layers were only left out or moved."""
    layout = Layout((Slice(MODEL, 0, 2), Slice(MODEL, 4, 8)))
    text = card.write(facts(layout=layout, identities=(), identity=False))
    assert "8 → 6 layers, by leaving layers out." in text
    assert "new layers are copies" not in text


def test_a_base_card_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    """Broken front matter costs the inherited fields, not the card."""
    assert card.read_front_matter(tmp_path) == {}
    for text in ("---\n{\n---\n", "---\n- a\n---\n", "no front matter"):
        (tmp_path / "README.md").write_text(text)
        assert card.read_front_matter(tmp_path) == {}
    (tmp_path / "README.md").write_text(
        yaml.safe_dump({"license": "mit"}, explicit_start=True) + "---\n"
    )
    assert card.read_front_matter(tmp_path) == {"license": "mit"}
