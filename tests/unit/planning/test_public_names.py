"""Source models have public names that contain no local path."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.planning.public_names import PublicNames

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """Return a checkpoint of a directory, named by its path or by a Hub id."""
    path.mkdir(parents=True, exist_ok=True)
    return Checkpoint(ModelRef(ModelPath(name or str(path))), path, {}, is_local=name is None)


def named(*checkpoints: Checkpoint, base_model: str | None = None) -> PublicNames:
    """Return the public names of some checkpoints."""
    return PublicNames.of({c.ref: c for c in checkpoints}, base_model)


def test_a_directory_is_called_by_its_name(tmp_path: Path) -> None:
    """The public name of a directory is its last part."""
    model = checkpoint(tmp_path / "some" / "model")
    assert named(model)(model.ref) == "model"
    assert named(model).origins == {}


def test_equal_directory_names_are_numbered(tmp_path: Path) -> None:
    """Two directories with the same name have different public names."""
    one, two = checkpoint(tmp_path / "a" / "model"), checkpoint(tmp_path / "b" / "model")
    names = named(one, two)
    assert [names(one.ref), names(two.ref)] == ["model", "model~2"]


def test_one_directory_has_one_name(tmp_path: Path) -> None:
    """Two spellings of a path have the same public name."""
    one = checkpoint(tmp_path / "model")
    ref = ModelRef(ModelPath(f"{tmp_path}/model/"))
    names = named(one, Checkpoint(ref, one.path, {}, is_local=True))
    assert [names(one.ref), names(ref)] == ["model", "model"]


def test_a_cache_path_is_called_by_id_and_commit(tmp_path: Path) -> None:
    """The public name of a path in the Hub cache has the id and the commit."""
    model = checkpoint(tmp_path / "models--org--name" / "snapshots" / COMMIT)
    assert named(model)(model.ref) == f"org/name@{COMMIT}"
    assert named(model).origins[model.ref].path == "org/name"


def test_a_hub_id_stays_as_it_was_written(tmp_path: Path) -> None:
    """A Hub id stays without its commit, which is part of the origin."""
    path = tmp_path / "models--org--name" / "snapshots" / COMMIT
    model = checkpoint(path, "org/name")
    assert named(model)(model.ref) == "org/name"
    assert named(model).origins[model.ref] == ModelPath("org/name", COMMIT)


def test_a_stated_base_model(tmp_path: Path) -> None:
    """--base-model names the only local source and must be a Hub id."""
    model = checkpoint(tmp_path / "model")
    assert named(model, base_model="org/name")(model.ref) == "org/name"
    with pytest.raises(DirectiveError, match=rf"base.model: .*{re.escape(str(tmp_path))}"):
        named(model, base_model=str(tmp_path))
    with pytest.raises(DirectiveError, match=r"^base.model: .*several"):
        named(model, checkpoint(tmp_path / "other"), base_model="org/name")


def test_a_lora_is_named_too(tmp_path: Path) -> None:
    """The public name of a local adapter is the last part of its path."""
    (tmp_path / "adapter").mkdir()
    base = checkpoint(tmp_path / "model")
    ref = ModelRef(base.ref.model, ModelPath(str(tmp_path / "adapter")))
    names = PublicNames.of({ref: Checkpoint(ref, base.path, {}, is_local=True)})
    assert names(ref) == "model+adapter"
