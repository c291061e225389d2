"""The digest of weights changes with their values and does not depend on their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergekit_interleave.checkpoint.safetensors_header import to_json
from mergekit_interleave.output import weight_sample


def tensors() -> dict[str, np.ndarray]:
    """Return a small tensor, which is read whole, and a large one, which is sampled."""
    return {"a.weight": np.arange(8.0), "b.weight": np.arange(100_000.0)}


def digest(place: Path, found: dict[str, np.ndarray]) -> str:
    """Save tensors in one file and return their digest."""
    save_file(found, place / "model.safetensors")
    return weight_sample.digest(place)


@pytest.mark.parametrize("change", ["small", "ends", "many", "name", "dtype"])
def test_a_change_changes_the_digest(tmp_path: Path, change: str) -> None:
    """Other values, names or dtypes give another digest; the same ones give the same."""
    before, found = digest(tmp_path, tensors()), tensors()
    assert digest(tmp_path, tensors()) == before
    if change == "small":
        found["a.weight"][3] += 1
    elif change == "ends":
        found["b.weight"][-1] += 1
    elif change == "many":
        found["b.weight"][::500] += 1
    elif change == "name":
        found["c.weight"] = found.pop("a.weight")
    else:
        found["a.weight"] = found["a.weight"].view(np.int64)
    assert digest(tmp_path, found) != before


def test_shards_do_not_matter(tmp_path: Path) -> None:
    """The same tensors in several files have the same digest."""
    before = digest(tmp_path, tensors())
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for i, (name, value) in enumerate(tensors().items()):
        weight_map[name] = f"model-{2 - i}.safetensors"
        save_file({name: value}, tmp_path / weight_map[name])
    index = to_json({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert weight_sample.digest(tmp_path) == before
