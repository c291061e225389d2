"""`fix-config` repairs what plain `mergekit-yaml` gets wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import stored
import zoo
from harness import Cli, Result

Shell = Callable[..., "CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    zoo.quiet()


def config_of(path: Path) -> dict[str, object]:
    """Read a model's config.json."""
    content: dict[str, object] = json.loads((path / "config.json").read_text())
    return content


def unchanged(result: Result, out: Path) -> bool:
    """Return whether the report is one line on OUT, and no line on a changed file."""
    return (result.status, result.out.count("\n")) == (0, 1) and result.out.startswith(f"{out}: ")


def test_a_config_that_was_not_written(mk: Cli, shell: Shell, tmp_path: Path) -> None:
    """A missing config.json is written: mergekit stops if a list does not have the new depth."""
    base, out = zoo.save("qwen2", tmp_path / "base"), tmp_path / "out"
    (base / "LICENSE").write_text("MIT")
    made = shell("mk-interleave gen 'interleave: every 2' --model base > cfg.yml")
    assert "fix-config" in made.stderr
    assert shell("mergekit-yaml cfg.yml out").returncode != 0
    assert not (out / "config.json").exists()
    lost = mk("fix-config", out)
    assert (lost.status, "--recipe FILE" in lost.err) == (2, True)
    fixed = mk("fix-config", out, "--recipe", tmp_path / "cfg.yml", cwd=tmp_path)
    assert fixed.status == 0, fixed.err
    assert (out / "mergekit_config.yml").is_file()
    assert re.match(r"config\.json: .*\b12\b", fixed.out), fixed.out
    assert config_of(out)["num_hidden_layers"] == 12
    assert "\nLICENSE: " in fixed.out
    assert (out / "LICENSE").read_text() == "MIT"
    assert not zoo.compare(base, out)


@pytest.mark.slow
def test_no_progress_bar_is_shown(shell: Shell, tiny: Path) -> None:
    """`fix-config` hides the bar with which transformers loads weights."""
    grown = shell(f"mk-interleave run 'append: 1' out --model {tiny}")
    fixed = shell(f"unset TQDM_DISABLE; mk-interleave fix-config out --model {tiny}")
    assert (grown.stderr, fixed.stderr, fixed.returncode) == ("", "", 0)


def test_a_config_that_was_not_deepened(mk: Cli, shell: Shell, tmp_path: Path) -> None:
    """Only wrong keys are changed and reported, and a second call changes nothing."""
    base, out = zoo.save("nanochat", tmp_path / "base"), tmp_path / "out"
    shell("mk-interleave gen 'interleave: every 4' --model $PWD/base > cfg.yml")
    merged = shell("mergekit-yaml cfg.yml out")
    assert merged.returncode == 0, merged.stderr
    assert config_of(out)["num_hidden_layers"] == 8
    fixed = mk("fix-config", out, cwd=tmp_path)
    assert fixed.status == 0, fixed.err
    assert "config.json: num_hidden_layers: 8 -> 10" in fixed.out
    assert not zoo.compare(base, out)
    again = mk("fix-config", out, cwd=tmp_path)
    assert unchanged(again, out)


@pytest.mark.parametrize("make", [stored.fp8, stored.glm4_moe], ids=["quantized", "head"])
def test_the_config_of_run_is_kept(make: Callable[[Path], Path], mk: Cli, tmp_path: Path) -> None:
    """A result of `run` with module names or a prediction head is not changed again."""
    base, out = make(tmp_path / "base"), tmp_path / "out"
    assert mk("run", "interleave: every 2", out, "--model", base).status == 0
    recipe = (out / "mergekit_config.yml").read_text().replace("model: base", f"model: {base}")
    (tmp_path / "cfg.yml").write_text(recipe)
    before = (out / "config.json").read_bytes()
    result = mk("fix-config", out, "--recipe", tmp_path / "cfg.yml")
    assert unchanged(result, out), result
    assert (out / "config.json").read_bytes() == before


def test_weights_of_another_recipe_are_left_alone(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """If the weights do not match the recipe, nothing is changed."""
    out = tmp_path / "out"
    shutil.copytree(tiny, out)
    recipe = mk("gen", "interleave: every 4", "--model", tiny).out
    (out / "mergekit_config.yml").write_text(recipe)
    before = (out / "config.json").read_bytes()
    result = mk("fix-config", out)
    assert result.status == 1
    assert re.search(rf"^error: {re.escape(str(out))}: .*model\.layers\.8\.", result.err), (
        result.err
    )
    assert (out / "config.json").read_bytes() == before


def test_the_repaired_config_is_that_of_run(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """A config that was changed by hand is restored to the one that `run` wrote."""
    out = tmp_path / "out"
    assert mk("run", "interleave: every 4, dtype: float16", out, "--model", tiny).status == 0
    config = config_of(out)
    spoiled = {**config, "num_hidden_layers": 8, "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(spoiled))
    recipe = (out / "mergekit_config.yml").read_text().replace("tiny", str(tiny))
    (tmp_path / "cfg.yml").write_text(recipe)
    fixed = mk("fix-config", out, "--recipe", tmp_path / "cfg.yml")
    assert fixed.status == 0, fixed.err
    assert config_of(out) == config


def test_the_model_may_have_moved(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """If the recipe's model name is not a path, the hint names `--model DIR`."""
    out = tmp_path / "out"
    assert mk("run", "interleave: every 4", out, "--model", tiny).status == 0
    (out / "config.json").write_text("{broken")
    lost = mk("fix-config", out, cwd=tmp_path)
    assert lost.status == 1
    assert "--model DIR" in lost.err
    fixed = mk("fix-config", out, "--model", tiny)
    assert re.match(r"config\.json: .*\b10\b", fixed.out), fixed.err
    assert config_of(out)["num_hidden_layers"] == 10


@pytest.mark.parametrize(
    ("path", "status", "hint"),
    [("nowhere", 1, ""), ("file", 1, ""), ("empty", 2, "--recipe FILE")],
)
def test_a_path_that_is_not_a_model(
    path: str, status: int, hint: str, mk: Cli, tmp_path: Path
) -> None:
    """A path that is not a model is one error without a traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    result = mk("fix-config", tmp_path / path)
    assert result.status == status
    assert result.err.startswith(f"error: {tmp_path / path}: ")
    assert hint in result.err
