"""The model that a class builds from a config.json, without memory for its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import zoo
from safetensors.torch import load_file

from mergekit_interleave.checkpoint import meta_model


@pytest.mark.parametrize("name", ["kolibri1", "mixtral", "deepseek_v4", "nemotron_h", "llama"])
def test_stored_names_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    """Each stored name is in the file, also for renamed, stacked and split tensors."""
    zoo.quiet()
    base = zoo.save(name, tmp_path)
    names = meta_model.stored_names(meta_model.build(base))
    names_of_class, names_of_file = map(
        _unnumbered, (names.values(), load_file(base / "model.safetensors"))
    )
    assert names_of_class <= names_of_file
    assert any(stored != name for name, stored in names.items()) == (name != "llama")


def _unnumbered(names: Iterable[str]) -> set[str]:
    return {re.sub(r"\.\d+(?=\.)", ".*", name) for name in names}
