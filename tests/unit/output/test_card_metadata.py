"""The front matter of model cards is read, and parts of it are inherited."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_interleave.output import card_metadata

GOOD: dict[str, Any] = {
    "base_model": ["org/base"],
    "base_model_relation": "merge",
    "license": "mit",
    "tags": ["merge"],
}


def read(directory: Path) -> tuple[Mapping[str, Any], list[str]]:
    """Return the front matter of a directory's card, and the warnings."""
    warnings: list[str] = []
    return card_metadata.read(directory, warnings.append), warnings


@pytest.mark.parametrize("content", ["---\n{\n---\n", "---\n- a\n---\n", "no front matter", ""])
def test_a_card_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    """Malformed front matter gives one warning and no fields."""
    assert read(tmp_path) == ({}, [])
    (tmp_path / "README.md").write_text(content)
    fields, warnings = read(tmp_path)
    assert fields == {}
    assert len(warnings) == ("{" in content)
    assert all(f"{tmp_path / 'README.md'}: " in warning for warning in warnings)


def test_a_card_with_a_byte_order_mark(tmp_path: Path) -> None:
    """A byte order mark does not hide the front matter."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8-sig")
    assert read(tmp_path) == ({"license": "mit"}, [])


def test_a_card_is_read(tmp_path: Path) -> None:
    """Only its front matter is read."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# x\n---\nlicense: gpl\n---\n")
    assert read(tmp_path) == ({"license": "mit"}, [])


class TestInherited:
    """Tests of the fields that a model inherits from the cards of its sources."""

    def test_the_base_determines_the_fields(self) -> None:
        """License, language, task and library are taken; lineage, tags and datasets are not."""
        own = {
            **GOOD,
            "language": ["en", "de"],
            "pipeline_tag": "text-generation",
            "library_name": "transformers",
            "datasets": ["org/data"],
        }
        assert card_metadata.inherited({"a": own}, "a", ()) == {
            "license": "mit",
            "language": ["en", "de"],
            "pipeline_tag": "text-generation",
            "library_name": "transformers",
        }

    def test_norwegian(self) -> None:
        """`no` is read as the language, although YAML reads it as false."""
        for written, read in (("no", "no"), ("[en, no]", ["en", "no"])):
            card = yaml.safe_load(f"language: {written}")
            assert card_metadata.inherited({"a": card}, "a", ())["language"] == read

    def test_values_of_other_types_are_dropped(self) -> None:
        """Numbers, mappings and empty values give no field."""
        for value in (5, {"a": 1}, [1], [], "", None):
            card = dict.fromkeys(["license", "language", "pipeline_tag"], value)
            assert card_metadata.inherited({"a": card}, "a", ()) == {}
        assert card_metadata.inherited({"a": {"pipeline_tag": ["x", "y"]}}, "a", ()) == {}

    def test_a_custom_license(self) -> None:
        """A custom license becomes `other`, with a name and a link to a file or the base's page."""
        card = {"license": "other", "license_name": "qwen", "license_link": "LICENSE"}
        found = {"license": "other", "license_name": "qwen", "license_link": "LICENSE"}
        assert card_metadata.inherited({"a": card}, "a", ["LICENSE"]) == found
        found["license_link"] = "https://huggingface.co/org/a"
        assert card_metadata.inherited({"org/a": card}, "org/a", ()) == found
        assert card_metadata.inherited({"a": card}, "a", ()) == {}

    def test_an_unknown_license(self) -> None:
        """A license that the Hub would reject becomes `other`."""
        card = {"license": "tongyi-qianwen"}
        assert card_metadata.inherited({"org/a": card}, "org/a", ["LICENSE.md"]) == {
            "license": "other",
            "license_name": "tongyi-qianwen",
            "license_link": "LICENSE.md",
        }

    def test_several_licenses(self) -> None:
        """A list of licenses becomes `other`, and its name lists them all."""
        card = {"license": ["mit", "apache-2.0"]}
        assert card_metadata.license_of(card) == "mit, apache-2.0"
        assert (
            card_metadata.inherited({"org/a": card}, "org/a", ())["license_name"]
            == "mit-apache-2.0"
        )

    @pytest.mark.parametrize(
        "odd", ["x\n\n# Injected", "a <!-- verified --> /home/bob/x", "é" * 999]
    )
    def test_hostile_values(self, odd: str) -> None:
        """Values of a base that could inject text are reduced or dropped."""
        card = {"license": "other", "license_name": odd, "license_link": odd, "language": odd}
        card |= {"pipeline_tag": odd, "library_name": odd}
        found = card_metadata.inherited({"org/a": card}, "org/a", ())
        assert found.keys() == {"license", "license_name", "license_link"}
        assert re.fullmatch(r"[\w.-]{1,80}", found["license_name"], re.ASCII)
        assert "\n" not in str(card_metadata.license_of({"license": odd}))

    def test_licenses_that_differ(self) -> None:
        """Licenses that differ become `other`; if one is unknown, there is no license."""
        cards: dict[str, dict[str, Any]] = {"org/a": {"license": "mit"}, "b": {"license": "llama2"}}
        found = card_metadata.inherited(cards, "org/a", ["LICENSE"])
        assert found["license"] == "other"
        assert found["license_link"] == "https://huggingface.co/org/a"
        assert card_metadata.inherited({**cards, "c": {}}, "org/a", ["LICENSE"]) == {}

    def test_licenses_that_agree(self) -> None:
        """Licenses agree in upper and lower case."""
        cards = {"a": {"license": "MIT"}, "b": {"license": ["mit"]}}
        assert card_metadata.inherited(cards, "a", ())["license"] == "mit"

    def test_only_strings_of_known_keys_come_from_interleave_json(self) -> None:
        """Entries with unknown keys or other types are dropped."""
        odd = {
            "license": "mit",
            "language": ["en"],
            "pipeline_tag": 5,
            "library_name": [],
            "a": "b",
        }
        assert card_metadata.filtered(odd) == {"license": "mit", "language": ["en"]}
