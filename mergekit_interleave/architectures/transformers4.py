"""Provide typed access to `data/transformers4.json`, what transformers 4 reads from a config.json.

Releases before 5 do not read `rope_parameters`; they read the keys listed here, and use these
defaults if a config.json lacks them. `make clients` compares the file with that release.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

DATA = Path(__file__).parent / "data" / "transformers4.json"


class Transformers4Data(TypedDict):
    """The sections of `transformers4.json`.

    Attributes:
        release: The release that the values are from.
        renamed: The keys that transformers 5 writes under another name, by model type, each with
            the new name.
        layer_kinds: The entries of `layer_types` that transformers 5 writes under another name, by
            model type, each with the old name, which both read.
        defaults: The keys that transformers 4 reads where transformers 5 reads `rope_parameters` or
            a renamed key, by model type, each with its default.
    """

    release: str
    renamed: dict[str, dict[str, str]]
    layer_kinds: dict[str, dict[str, str]]
    defaults: dict[str, dict[str, Any]]


@cache
def _data() -> Transformers4Data:
    data: Transformers4Data = json.loads(DATA.read_text(encoding="utf-8"))
    return data


def defaults(model_type: str) -> Mapping[str, Any]:
    """Return the keys that only transformers 4 reads for a type, each with its default."""
    return _data()["defaults"].get(model_type, {})


def renamed(model_type: str) -> Mapping[str, str]:
    """Return the keys of a type that transformers 5 writes under another name, with that name."""
    return _data()["renamed"].get(model_type, {})


def layer_kinds(model_type: str) -> Mapping[str, str]:
    """Return the layer kinds that transformers 5 renamed for a type, each with its old name."""
    return _data()["layer_kinds"].get(model_type, {})
