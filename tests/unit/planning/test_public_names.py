"""What a source is called before the world."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_interleave.checkpoint.checkpoint import Checkpoint
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.planning.public_names import PublicNames

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """A checkpoint at a directory, named by it or by a Hub id."""
    path.mkdir(parents=True, exist_ok=True)
    return Checkpoint(ModelRef(ModelPath(name or str(path))), path, {}, is_local=name is None)


def named(*checkpoints: Checkpoint, base_model: str | None = None) -> PublicNames:
    """The names of some checkpoints."""
    return PublicNames.of({c.ref: c for c in checkpoints}, base_model)


def test_a_directory_is_called_by_its_name(tmp_path: Path) -> None:
    """Never by its path."""
    model = checkpoint(tmp_path / "some" / "model")
    assert named(model)(model.ref) == "model"
    assert named(model).origins == {}


def test_twins_are_told_apart(tmp_path: Path) -> None:
    """Two directories of one name are two models."""
    one, two = checkpoint(tmp_path / "a" / "model"), checkpoint(tmp_path / "b" / "model")
    names = named(one, two)
    assert [names(one.ref), names(two.ref)] == ["model", "model~2"]


def test_one_directory_has_one_name(tmp_path: Path) -> None:
    """However it is spelled."""
    one = checkpoint(tmp_path / "model")
    ref = ModelRef(ModelPath(f"{tmp_path}/model/"))
    names = named(one, Checkpoint(ref, one.path, {}, is_local=True))
    assert [names(one.ref), names(ref)] == ["model", "model"]


def test_a_cache_path_is_called_by_id_and_commit(tmp_path: Path) -> None:
    """It came from the Hub."""
    model = checkpoint(tmp_path / "models--org--name" / "snapshots" / COMMIT)
    assert named(model)(model.ref) == f"org/name@{COMMIT}"
    assert named(model).origins[model.ref].path == "org/name"


def test_a_hub_id_stays_as_it_was_written(tmp_path: Path) -> None:
    """The commit goes into interleave.json alone."""
    path = tmp_path / "models--org--name" / "snapshots" / COMMIT
    model = checkpoint(path, "org/name")
    assert named(model)(model.ref) == "org/name"
    assert named(model).origins[model.ref] == ModelPath("org/name", COMMIT)


def test_the_user_knows_best(tmp_path: Path) -> None:
    """--base-model names the one local source."""
    model = checkpoint(tmp_path / "model")
    assert named(model, base_model="org/name")(model.ref) == "org/name"
    with pytest.raises(DirectiveError, match=r"^base_model: .* Hub id"):
        named(model, base_model=str(tmp_path))
    with pytest.raises(DirectiveError, match="several"):
        named(model, checkpoint(tmp_path / "other"), base_model="org/name")


def test_a_lora_is_named_too(tmp_path: Path) -> None:
    """A local adapter by its directory's name."""
    (tmp_path / "adapter").mkdir()
    base = checkpoint(tmp_path / "model")
    ref = ModelRef(base.ref.model, ModelPath(str(tmp_path / "adapter")))
    names = PublicNames.of({ref: Checkpoint(ref, base.path, {}, is_local=True)})
    assert names(ref) == "model+adapter"
