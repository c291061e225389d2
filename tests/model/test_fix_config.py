"""`fix-config`: what plain `mergekit-yaml` left behind, mended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import stored
import zoo
from harness import Cli

Shell = Callable[..., "CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    zoo.quiet()


def config_of(path: Path) -> dict[str, object]:
    """Its config.json."""
    content: dict[str, object] = json.loads((path / "config.json").read_text())
    return content


def test_a_config_that_was_not_written(mk: Cli, shell: Shell, tmp_path: Path) -> None:
    """Mergekit stops after the weights where a list has another length than the depth."""
    base, out = zoo.save("qwen2", tmp_path / "base"), tmp_path / "out"
    (base / "LICENSE").write_text("MIT")
    made = shell("mk-interleave gen 'interleave: every 2' --model base > cfg.yml")
    assert "fix-config" in made.stderr
    assert shell("mergekit-yaml cfg.yml out").returncode != 0
    assert not (out / "config.json").exists()
    lost = mk("fix-config", out)
    assert (lost.status, "--recipe FILE" in lost.err) == (2, True)
    mended = mk("fix-config", out, "--recipe", tmp_path / "cfg.yml", cwd=tmp_path)
    assert mended.status == 0, mended.err
    assert (out / "mergekit_config.yml").is_file()
    assert mended.out.splitlines()[0] == "config.json: written, for 12 layers"
    assert "LICENSE: added" in mended.out
    assert not zoo.compare(base, out)


def test_a_config_that_was_not_deepened(mk: Cli, shell: Shell, tmp_path: Path) -> None:
    """Only what is wrong is changed, and it is said; a second time there is nothing to do."""
    base, out = zoo.save("nanochat", tmp_path / "base"), tmp_path / "out"
    shell("mk-interleave gen 'interleave: every 4' --model $PWD/base > cfg.yml")
    merged = shell("mergekit-yaml cfg.yml out")
    assert merged.returncode == 0, merged.stderr
    assert config_of(out)["num_hidden_layers"] == 8
    mended = mk("fix-config", out, cwd=tmp_path)
    assert mended.status == 0, mended.err
    assert "config.json: num_hidden_layers: 8 -> 10" in mended.out
    assert not zoo.compare(base, out)
    again = mk("fix-config", out, cwd=tmp_path)
    assert again.out == f"{out}: its config.json is correct\n"


@pytest.mark.parametrize("make", [stored.fp8, stored.glm4_moe], ids=["quantized", "head"])
def test_what_run_wrote_is_right(make: Callable[[Path], Path], mk: Cli, tmp_path: Path) -> None:
    """Names of modules are not moved on twice, and a head behind the layers belongs there."""
    base, out = make(tmp_path / "base"), tmp_path / "out"
    assert mk("run", "interleave: every 2", out, "--model", base).status == 0
    recipe = (out / "mergekit_config.yml").read_text().replace("model: base", f"model: {base}")
    (tmp_path / "cfg.yml").write_text(recipe)
    result = mk("fix-config", out, "--recipe", tmp_path / "cfg.yml")
    assert result.out == f"{out}: its config.json is correct\n", result.err


def test_weights_of_another_recipe_are_left_alone(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """Nothing is changed."""
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    recipe = mk("gen", "interleave: every 4", "--model", tiny).out
    (out / "mergekit_config.yml").write_text(recipe)
    before = (out / "config.json").read_bytes()
    result = mk("fix-config", out)
    assert result.status == 1
    assert "its weights do not match its recipe" in result.err
    assert (out / "config.json").read_bytes() == before


def test_the_mended_config_is_that_of_run(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """A config that was spoiled is what it was again."""
    out = tmp_path / "out"
    assert mk("run", "interleave: every 4, dtype: float16", out, "--model", tiny).status == 0
    config = config_of(out)
    spoiled = {**config, "num_hidden_layers": 8, "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(spoiled))
    recipe = (out / "mergekit_config.yml").read_text().replace("tiny", str(tiny))
    (tmp_path / "cfg.yml").write_text(recipe)
    mended = mk("fix-config", out, "--recipe", tmp_path / "cfg.yml")
    assert mended.status == 0, mended.err
    assert config_of(out) == config


def test_the_model_may_have_moved(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """The recipe in OUT calls it by a public name; the hint says how to say where it is."""
    out = tmp_path / "out"
    assert mk("run", "interleave: every 4", out, "--model", tiny).status == 0
    (out / "config.json").write_text("{broken")
    lost = mk("fix-config", out, cwd=tmp_path)
    assert lost.status == 1
    assert "--model DIR" in lost.err
    mended = mk("fix-config", out, "--model", tiny)
    assert mended.out.startswith("config.json: written, for 10 layers"), mended.err
    assert config_of(out)["num_hidden_layers"] == 10


@pytest.mark.parametrize(
    ("path", "reason"),
    [("nowhere", "no such directory"), ("file", "is a file"), ("empty", "--recipe FILE")],
)
def test_what_is_no_model(path: str, reason: str, mk: Cli, tmp_path: Path) -> None:
    """One error, and no traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    result = mk("fix-config", tmp_path / path)
    assert result.status != 0
    assert result.err.startswith("error: ")
    assert reason in result.err
