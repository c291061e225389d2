"""Every command accepts the keys of a mergekit config that mergekit ignores, with one warning."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dialect
import published
import pytest
import yaml
from harness import Cli, fuzz
from hypothesis import given
from hypothesis import strategies as st

import mergekit_interleave as api

NOISE = "parameters: {int8_mask: true, normalize: true}\nanchors: &a {b: 1}\n"
NAMED = "parameters.int8_mask, parameters.normalize, anchors: "


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Path:
    """Write a config for the tiny model, with keys that mergekit ignores."""
    file = tmp_path / "cfg.yml"
    file.write_text(dialect.BODY.replace("MODEL", str(tiny)) + NOISE)
    return file


@pytest.fixture
def grown(config: Path, mk: Cli, tmp_path: Path) -> Path:
    """Write the model, as mergekit-yaml leaves it: with the config in place of interleave.json."""
    out = tmp_path / "out"
    assert mk("run", config, out, "--engine", "stream").status == 0
    (out / "interleave.json").unlink()
    (out / "README.md").unlink()
    shutil.copy(config, out / "mergekit_config.yml")
    return out


def warnings(text: str) -> list[str]:
    """Return the warning lines."""
    return [line for line in text.splitlines() if line.startswith(("warning: ", "warning  "))]


@pytest.mark.parametrize("command", ["gen", "plan", "run", "explain"])
def test_commands_that_read_a_config(command: str, mk: Cli, config: Path, tmp_path: Path) -> None:
    """A config with ignored keys gives one warning that names them, and exit status 0."""
    words = (command, config, *([tmp_path / "other", "--engine", "stream"] * (command == "run")))
    result = mk(*words)
    assert result.status == 0, result.err
    (warning,) = warnings(result.err + result.out)
    assert NAMED in warning
    assert "int8_mask" not in result.out.replace(warning, "")


@pytest.mark.parametrize("command", ["verify", "card", "fix-config", "train"])
def test_commands_that_read_a_model(command: str, mk: Cli, grown: Path) -> None:
    """The config of a model that mergekit-yaml wrote may have ignored keys."""
    result = mk(command, grown, *(["--for", "peft"] if command == "train" else []))
    assert result.status == 0, result.err
    (warning,) = warnings(result.err)
    assert NAMED in warning


@pytest.mark.parametrize("line", dialect.REFUSED)
def test_what_mergekit_refuses(line: str, mk: Cli, config: Path) -> None:
    """A config that mergekit refuses is refused, and the key is named."""
    body = yaml.safe_load(config.read_text()) | yaml.safe_load(line)
    config.write_text(yaml.safe_dump(body))
    result = mk("plan", config)
    assert (result.status, line.partition(":")[0] in result.err) == (2, True), result.err


EXTRAS = st.dictionaries(
    st.sampled_from(["anchors", "int8_mask", "slerp", "model", "layers", "zero", "repeat"]),
    st.sampled_from([1, "text", [0, 8], {"a": 1}]),
)
SETTINGS = st.dictionaries(
    st.sampled_from(["int8_mask", "normalize", "weight"]), st.sampled_from([True, 0.5, [0, 1]])
)


@st.composite
def configs(pick: st.DrawFn) -> dict[str, Any]:
    """Draw a config in mergekit's dialect, with ignored keys on every level."""
    starts = pick(st.lists(st.integers(0, 7), min_size=1, max_size=6))
    slices = []
    for start in starts:
        stop = pick(st.integers(start + 1, 8))
        source = {"model": "MODEL", "layer_range": [start, stop], **pick(EXTRAS_OF_SOURCE)}
        slices.append({"sources": [source], "parameters": pick(SETTINGS)})
    top = {"slices": slices, "merge_method": "passthrough", "parameters": pick(SETTINGS)}
    return {**pick(EXTRAS), **top}


EXTRAS_OF_SOURCE = st.dictionaries(st.sampled_from(["weight", "density", "name"]), st.just(1))


@pytest.fixture(scope="module")
def explained(tiny: Path) -> Callable[[dict[str, Any]], None]:
    """Return a function that explains a config and plans the result."""

    def check(document: dict[str, Any]) -> None:
        written = api.explain(io.StringIO(yaml.safe_dump(document).replace("MODEL", str(tiny))))
        assert len(written.warnings) <= 1
        bounds = [part["sources"][0]["layer_range"] for part in document["slices"]]
        expected = [index for start, stop in bounds for index in range(start, stop)]
        layers = [layer.source for layer in api.plan(str(written)).layout.layers]
        assert layers == expected

    return check


@fuzz(40)
@given(document=configs())
def test_plan_accepts_what_explain_writes(
    document: dict[str, Any], explained: Callable[[dict[str, Any]], None]
) -> None:
    """`plan` accepts the directive that `explain` writes for any config, and it has its layers."""
    explained(document)


@pytest.mark.parametrize("merge", published.MERGES[::4], ids=lambda merge: merge["name"])
def test_published_merges(merge: dict[str, Any], mk: Cli) -> None:
    """`plan` accepts what `explain` writes for a published merge with the usual extra keys."""
    text = yaml.safe_dump(published.document(merge), sort_keys=False) + NOISE
    written = mk("explain", "-", stdin=text)
    assert written.status == 0
    planned = mk("plan", "-", stdin=written.out)
    assert planned.status == 0, planned.err
