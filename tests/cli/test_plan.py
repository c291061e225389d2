"""`plan`: what `run` would make, and nothing written."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import zoo
from harness import Cli, emulate_sharing, make_llama

LINES = """\
what        2 new layers, zeroed, one after every 4th of 8: block expansion
layers      8 → 10, 2 of them new
map         0-3 [4] 5-8 [9]
sources     0-3 3-7 7
distance    copies are 1 away from their originals on average, 1 at most
parameters  66,080 → 81,568 (81.6K)
trainable   15,488 in the new layers, 19.0% of all
bytes       326 kB
engine      mergekit, which writes the right tensors of this type; --engine stream writes the same
mergekit    326 kB written
stream      318 kB written, 20.5 kB of zeros that take no room
memory      about 900 MB by mergekit, 32.1 MB by stream
"""

MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}


def lines(text: str) -> dict[str, str]:
    """The lines by their names; of several of one name the last."""
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def write_config(folder: Path, **changes: Any) -> Path:
    """A directory with a config.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**MISTRAL, **changes}))
    return folder


def test_all_of_it_in_a_pipe(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """Plain lines; the directory stays empty."""
    result = mk("plan", "--every", "4", "--model", tiny, cwd=tmp_path)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(LINES)
    free, config, fingerprint = result.out[len(LINES) :].splitlines()
    assert free.startswith("free        ")
    assert config == "config      num_hidden_layers: 8 → 10"
    assert fingerprint.startswith("fingerprint ")
    assert os.listdir(tmp_path) == []


def test_the_plan_is_what_run_makes(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """Parameters, bytes, config and fingerprint, by the model itself."""
    words = ("--repeat", "2:6x3", "--zero", "auto", "--model", tiny)
    planned = json.loads(mk("plan", *words, "--json", cwd=tmp_path).out)
    out = tmp_path / "out"
    said = mk("run", out, *words, "--engine", "stream").out
    made = json.loads((out / "interleave.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert planned["fingerprint"] == made["fingerprint"]
    assert planned["new_layers"] == [i for i, layer in enumerate(made["layers"]) if layer["new"]]
    assert [layer["layer"] for layer in planned["layers"]] == [x["layer"] for x in made["layers"]]
    assert f"{planned['parameters']['after']:,} parameters" in said
    assert planned["writing"]["nbytes"] == made["verified"]["weights"]["compared"]
    assert {key: change["to"] for key, change in planned["config"].items()} == {
        key: config[key] for key in planned["config"]
    }


def test_shared_bytes(mk: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where blocks can be shared between the base and this directory, they are counted as such."""
    base = make_llama(tmp_path / "base", hidden_size=128, intermediate_size=512)
    emulate_sharing(monkeypatch)
    planned = mk("plan", "--every", "4", "--model", base, cwd=tmp_path)
    assert "MB shared with the base" in planned.out
    words = ("run", "--every", "4", tmp_path / "out", "--model", base, "--engine", "stream")
    made = mk(*words).out.splitlines()[0]
    assert made.split(": ")[-1] == lines(planned.out)["stream"]


def test_what_stream_cannot_do(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """Is the reason for the other engine."""
    words = ("plan", "--every", "4", "--model", tiny, "--dtype", "float16")
    result = lines(mk(*words, cwd=tmp_path).out)
    assert result["engine"].startswith("mergekit, because the stream engine does no arithmetic: mo")
    assert result["mergekit"] == "163 kB written"
    assert "stream" not in result
    assert "stream" not in result["memory"]


def test_what_mergekit_cannot_do(mk: Cli, tmp_path: Path) -> None:
    """Likewise: some types need more than zeros, of some it loses tensors."""
    zoo.quiet()
    for name, reason in (
        ("doge", "cannot fill model.layers."),
        ("gpt_neox", "cannot write the right tensors of model type gpt_neox"),
    ):
        base = zoo.save(name, tmp_path / name)
        result = mk("plan", "--every", "2", "--model", base, cwd=tmp_path)
        assert result.status == 0, result.err
        assert f"engine      stream, because mergekit {reason}" in result.out
        assert "written" in lines(result.out)["stream"]
        assert "mergekit" not in lines(result.out)


class TestByConfigAlone:
    """Where no weights are at hand, the class is asked what it would build."""

    def test_the_published_sizes(self, mk: Cli, tmp_path: Path) -> None:
        """8.99B for a Mistral with a zeroed layer after every fourth, 10.73B interwoven."""
        write_config(tmp_path, vocab_size=32002)
        result = mk("plan", "--every", "4", cwd=tmp_path)
        assert result.status == 0, result.err
        found = lines(result.out)
        assert found["parameters"] == "7,241,748,480 → 8,986,644,480 (8.99B, by config.json)"
        assert found["bytes"] == "about 18 GB"
        assert "zeroed" in result.out
        write_config(tmp_path)
        result = mk("plan", "--repeat", "8:24", cwd=tmp_path)
        assert "→ 10,731,524,096 (10.73B, by config.json)" in result.out
        assert "16 of 32 layers twice, side by side" in result.out

    def test_they_are_those_of_the_weights(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """The same numbers either way."""
        config = (tiny / "config.json").read_text()
        (tmp_path / "config.json").write_text(config)
        alone = json.loads(mk("plan", "--every", "4", "--json", cwd=tmp_path).out)
        whole = json.loads(mk("plan", "--every", "4", "--json", "--model", tiny).out)
        assert alone["parameters"].pop("counted_from") == "config.json"
        assert whole["parameters"].pop("counted_from") == "weights"
        assert alone["parameters"] == whole["parameters"]
        assert alone["writing"]["nbytes"] == whole["writing"]["nbytes"]
        assert alone["layers"] == whole["layers"]

    def test_what_cannot_be_built(self, mk: Cli, tmp_path: Path) -> None:
        """Is a warning, and the rest is said."""
        write_config(tmp_path, num_attention_heads=0)
        result = mk("plan", "--every", "4", cwd=tmp_path)
        assert result.status == 0, result.err
        assert lines(result.out)["warning"].startswith("the parameters cannot be counted")
        assert lines(result.out)["bytes"] == "unknown until the weights are available"


def test_words_are_enough_for_a_picture(
    mk: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models that cannot be read: their layers, and nothing of their size."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ("plan", "--repeat", "8:24", "--model", "org/m", "--layers", "32", "--svg", "x.svg")
    result = mk(*words, cwd=tmp_path)
    assert result.status == 0, result.err
    found = lines(result.out)
    assert found["layers"] == "32 → 48, 16 of them new"
    assert (found["config"], "parameters" in found) == ("not known", False)
    assert (tmp_path / "x.svg").exists()
    assert json.loads(mk(*words, "--json", cwd=tmp_path).out)["config"] is None
    stack = "models: {a: org/one, b: org/two}, layout: [a 0:24, b 8:32]"
    found = lines(mk("plan", stack, cwd=tmp_path).out)
    assert (found["layers"], found["sources"]) == ("? + ? → 48, 0 of them new", "A 0-23, B 8-31")
    one = make_llama(tmp_path / "one")
    found = lines(mk("plan", f"layout: [{one} 0:4, org/x 2:8]", cwd=tmp_path).out)
    assert found["layers"] == "8 + ? → 10, 0 of them new"
    source = "{sources: [{model: org/x, layer_range: [0, 8]}]}"
    (tmp_path / "w.yml").write_text(f"slices: [{source}, {source}]\nmerge_method: passthrough\n")
    for layers in ([], ["--layers", "8"]):
        found = lines(mk("plan", "w.yml", *layers, cwd=tmp_path).out)
        assert found["sources"] == "0-7 0-7"


def test_where_layers_come_from(mk: Cli, tiny: Path) -> None:
    """The source layers in order, of several models behind their letters."""
    found = lines(mk("plan", "stack: [[0, 6], [4, 8]]", "--model", tiny).out)
    assert (found["map"], found["sources"]) == ("0-5 [6-7] 8-9", "0-5 4-7")
    assert found["what"] == "8 → 10 layers in 2 slices: depth up-scaling"
    found = lines(mk("plan", "--drop", "2:4", "--model", tiny).out)
    assert found["sources"] == "0-1 4-7"


def test_what_run_refuses(mk: Cli, tmp_path: Path) -> None:
    """Plan refuses, too."""
    write_config(tmp_path, model_type="bert", num_hidden_layers=8)
    result = mk("plan", "--every", "4", cwd=tmp_path)
    assert (result.status, "is refused" in result.err) == (1, True)
    other = write_config(tmp_path / "other", model_type="qwen2")
    two = write_config(tmp_path / "two", model_type="qwen2")
    words = f"layout: [{other} 0:24, {two} 8:32]"
    result = mk("plan", words, cwd=tmp_path)
    assert (result.status, "cannot be stacked" in result.err) == (1, True)


def test_distance_of_copies(mk: Cli, tiny: Path) -> None:
    """Side by side they are near, as a block they are far: LongCAT's argument."""
    near = json.loads(mk("plan", "--repeat", "2:6", "--model", tiny, "--json").out)
    far = json.loads(mk("plan", "--repeat", "2:6@block", "--model", tiny, "--json").out)
    assert (near["distance"], far["distance"]) == (
        {"mean": 1.0, "largest": 1},
        {"mean": 4.0, "largest": 4},
    )
    shorter = json.loads(mk("plan", "--drop", "2:6", "--model", tiny, "--json").out)
    assert shorter["distance"] is None


def test_every_warning(mk: Cli, tiny: Path) -> None:
    """Among the lines, and not besides."""
    words = ("plan", "--every", "4", "--zero", "o_proj,down_proj,input_layernorm", "--model", tiny)
    result = mk(*words)
    assert lines(result.out)["warning"].startswith("zero: input_layernorm.weight is zeroed too")
    assert result.err == ""
    assert json.loads(mk(*words, "--json").out)["warnings"] == [lines(result.out)["warning"]]


def test_no_room(mk: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is a warning here, where nothing is written."""
    usage = shutil.disk_usage(tiny)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    result = mk("plan", "--every", "4", "--model", tiny)
    assert (result.status, lines(result.out)["warning"]) == (
        0,
        "there is not enough free space here",
    )


def test_a_drawing(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """An SVG file with the layers of the plan, and nothing else written."""
    result = mk("plan", "--every", "4", "--svg", "layers.svg", "--model", tiny, cwd=tmp_path)
    assert result.status == 0, result.err
    assert os.listdir(tmp_path) == ["layers.svg"]
    root = ET.fromstring((tmp_path / "layers.svg").read_bytes())  # noqa: S314 - it is our own
    assert "8 original, 2 zeroed" in "".join(root.itertext())
    result = mk("plan", "--every", "4", "--svg", "no/such/place", "--model", tiny, cwd=tmp_path)
    assert (result.status, result.err.startswith("error: ")) == (1, True)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_table_on_a_terminal(tiny: Path, tmp_path: Path, encoding: str) -> None:
    """With a picture above it, one sign for each layer; no line is wider than the terminal."""
    words = [sys.executable, "-m", "mergekit_interleave", "plan", "--every", "4", "--model", tiny]
    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": "60", "PYTHONIOENCODING": encoding, "TERM": "xterm"}
    with subprocess.Popen(words, stdout=theirs, cwd=tmp_path, env=env) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # its end, on Linux
            pass
        assert process.wait() == 0
    text = re.sub(r"\x1b\[[\d;]*m|\r", "", shown.decode(encoding))
    assert "".join(text.splitlines()[0].split()[1:]) == (
        "████░████░" if encoding == "utf-8" else "####.####."
    )
    assert max(map(len, text.splitlines())) <= 60
    assert "block expansion" in " ".join(text.split())
