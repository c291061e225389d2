"""Test `plan`: it shows what `run` would write, and writes nothing."""

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

PLAN = {
    "what": "2 new layers, zeroed, one after every 4th of 8",
    "layers": "8 → 10, 2 ",
    "map": "0-3 [4] 5-8 [9]",
    "sources": "0-3 3-7 7",
    "distance": "1 layer on average ",
    "parameters": "66,080 → 81,568 (81.6K)",
    "trainable": "15,488 in the new layers, 19.0% ",
    "bytes": "326 kB",
    "engine": "mergekit, ",
    "mergekit": "326 kB written",
    "stream": "318 kB written, 20.5 kB ",
    "memory": "about 900 MB by mergekit, 410 MB by stream",
    "upload": "about ",
    "free disk": "",
    "config": "num_hidden_layers: 8 → 10",
    "fingerprint": "7b0fdf8d69fc1c3d",
}
"""The lines of a plan in their order: name and start of the text."""

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
    """Map the name of each line to its text; if a name repeats, keep the last line."""
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def write_config(folder: Path, **changes: Any) -> Path:
    """Create a directory with only a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**MISTRAL, **changes}))
    return folder


def test_all_of_it_in_a_pipe(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """In a pipe, `plan` prints plain lines and creates no file."""
    result = mk("plan", "--every", "4", "--model", tiny, cwd=tmp_path)
    assert (result.status, result.err) == (0, "")
    assert [line[:12].rstrip() for line in result.out.splitlines()] == [*PLAN]
    for line, text in zip(result.out.splitlines(), PLAN.values(), strict=True):
        assert line[12:].startswith(text), line
    assert os.listdir(tmp_path) == []


def test_the_plan_is_what_run_makes(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """`plan --json` matches the parameters, bytes, config and fingerprint that `run` writes."""
    words = ("--repeat", "2:6x3", "--zero", "auto", "--model", tiny)
    planned = json.loads(mk("plan", *words, "--json", cwd=tmp_path).out)
    out = tmp_path / "out"
    printed = mk("run", out, *words, "--engine", "stream").out
    manifest = json.loads((out / "interleave.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert planned["fingerprint"] == manifest["fingerprint"]
    layers = manifest["layers"]
    assert planned["new_layers"] == [i for i, layer in enumerate(layers) if layer["new"]]
    assert [layer["layer"] for layer in planned["layers"]] == [layer["layer"] for layer in layers]
    assert f"{planned['parameters']['after']:,} parameters" in printed
    assert planned["writing"]["nbytes"] == manifest["verified"]["weights"]["compared"]
    assert {key: change["to"] for key, change in planned["config"].items()} == {
        key: config[key] for key in planned["config"]
    }


def test_shared_bytes(mk: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` counts the blocks that the output can share with the base."""
    base = make_llama(tmp_path / "base", hidden_size=128, intermediate_size=512)
    emulate_sharing(monkeypatch)
    planned = mk("plan", "--every", "4", "--model", base, cwd=tmp_path)
    stream = lines(planned.out)["stream"]
    assert " MB shared" in stream
    words = ("run", "--every", "4", tmp_path / "out", "--model", base, "--engine", "stream")
    written = mk(*words).out.splitlines()[0]
    assert written.split(": ")[-1] == stream


def test_what_stream_cannot_do(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """If the stream engine cannot write the result, the plan says why it uses mergekit."""
    words = ("plan", "--every", "4", "--model", tiny, "--dtype", "float16")
    result = lines(mk(*words, cwd=tmp_path).out)
    assert result["engine"].startswith("mergekit, because the stream engine ")
    assert "model.embed_tokens.weight" in result["engine"]
    assert "F16" in result["engine"]
    assert result["mergekit"] == "163 kB written"
    assert "stream" not in result
    assert "stream" not in result["memory"]


def test_what_mergekit_cannot_do(mk: Cli, tmp_path: Path) -> None:
    """If mergekit cannot write the result, the plan says why it uses the stream engine."""
    zoo.quiet()
    for name, named in (
        ("doge", "model.layers."),
        ("gpt_neox", "gpt_neox"),
    ):
        base = zoo.save(name, tmp_path / name)
        result = mk("plan", "--every", "2", "--model", base, cwd=tmp_path)
        assert result.status == 0, result.err
        engine = lines(result.out)["engine"]
        assert engine.startswith("stream, because mergekit ")
        assert named in engine
        assert "written" in lines(result.out)["stream"]
        assert "mergekit" not in lines(result.out)


class TestByConfigAlone:
    """Without weights, `plan` counts the parameters of the model class for config.json."""

    def test_the_published_sizes(self, mk: Cli, tmp_path: Path) -> None:
        """`plan` shows the published sizes: 8.99B with zeroed layers, 10.73B interwoven."""
        write_config(tmp_path, vocab_size=32002)
        result = mk("plan", "--every", "4", cwd=tmp_path)
        assert result.status == 0, result.err
        shown = lines(result.out)
        assert shown["parameters"] == "7,241,748,480 → 8,986,644,480 (8.99B, by config.json)"
        assert shown["bytes"] == "about 18 GB"
        assert "zeroed" in shown["what"]
        write_config(tmp_path)
        result = mk("plan", "--repeat", "8:24", cwd=tmp_path)
        shown = lines(result.out)
        assert shown["parameters"].endswith("→ 10,731,524,096 (10.73B, by config.json)")
        assert shown["what"].startswith("16 of 32 layers twice")

    def test_they_are_those_of_the_weights(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """`plan` gives the same numbers from config.json as from the weights."""
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
        """If transformers cannot build the model, `plan` warns and shows the rest."""
        write_config(tmp_path, num_attention_heads=0)
        result = mk("plan", "--every", "4", cwd=tmp_path)
        assert result.status == 0, result.err
        shown = lines(result.out)
        assert "parameters" in shown["warning"]
        assert "parameters" not in shown
        assert shown["bytes"].startswith("unknown")
        assert shown["layers"].startswith("32 → 40")


def test_an_unreadable_model(mk: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` draws the layers of an unreadable model, and states no size or config."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ("plan", "--repeat", "8:24", "--model", "org/m", "--layers", "32", "--svg", "x.svg")
    result = mk(*words, cwd=tmp_path)
    assert result.status == 0, result.err
    shown = lines(result.out)
    assert shown["layers"] == "32 → 48, 16 of them new"
    assert (shown["config"], "parameters" in shown) == ("not known", False)
    assert (tmp_path / "x.svg").exists()
    assert json.loads(mk(*words, "--json", cwd=tmp_path).out)["config"] is None
    stack = "models: {a: org/one, b: org/two}, layout: [a 0:24, b 8:32]"
    shown = lines(mk("plan", stack, cwd=tmp_path).out)
    assert (shown["layers"], shown["sources"]) == ("? + ? → 48, 0 of them new", "A 0-23, B 8-31")
    one = make_llama(tmp_path / "one")
    shown = lines(mk("plan", f"layout: [{one} 0:4, org/x 2:8]", cwd=tmp_path).out)
    assert shown["layers"] == "8 + ? → 10, 0 of them new"
    source = "{sources: [{model: org/x, layer_range: [0, 8]}]}"
    (tmp_path / "w.yml").write_text(f"slices: [{source}, {source}]\nmerge_method: passthrough\n")
    for layers in ([], ["--layers", "8"]):
        shown = lines(mk("plan", "w.yml", *layers, cwd=tmp_path).out)
        assert shown["sources"] == "0-7 0-7"


def test_where_layers_come_from(mk: Cli, tiny: Path) -> None:
    """`plan` lists the source layers in order."""
    shown = lines(mk("plan", "stack: [[0, 6], [4, 8]]", "--model", tiny).out)
    assert (shown["map"], shown["sources"]) == ("0-5 [6-7] 8-9", "0-5 4-7")
    assert shown["what"].startswith("8 → 10 layers in 2 slices")
    shown = lines(mk("plan", "--drop", "2:4", "--model", tiny).out)
    assert shown["sources"] == "0-1 4-7"


def test_what_run_refuses(mk: Cli, tmp_path: Path) -> None:
    """`plan` refuses what `run` refuses."""
    write_config(tmp_path, model_type="bert", num_hidden_layers=8)
    result = mk("plan", "--every", "4", cwd=tmp_path)
    assert result.status == 1
    assert result.err.startswith(f"error: {tmp_path}: model type bert ")
    other = write_config(tmp_path / "other", model_type="qwen2")
    two = write_config(tmp_path / "two", model_type="qwen2", rms_norm_eps=1e-3)
    words = f"layout: [{other} 0:24, {two} 8:32]"
    result = mk("plan", words, cwd=tmp_path)
    assert result.status == 1
    assert "rms_norm_eps" in result.err


def test_distance_of_copies(mk: Cli, tiny: Path) -> None:
    """Copies side by side are nearer to their originals than copies as a block."""
    near = json.loads(mk("plan", "--repeat", "2:6", "--model", tiny, "--json").out)
    far = json.loads(mk("plan", "--repeat", "2:6@block", "--model", tiny, "--json").out)
    assert (near["distance"], far["distance"]) == (
        {"mean": 1.0, "largest": 1},
        {"mean": 4.0, "largest": 4},
    )
    shorter = json.loads(mk("plan", "--drop", "2:6", "--model", tiny, "--json").out)
    assert shorter["distance"] is None


def test_every_warning(mk: Cli, tiny: Path) -> None:
    """Warnings are lines of the plan, and not on standard error."""
    words = ("plan", "--every", "4", "--zero", "o_proj,down_proj,input_layernorm", "--model", tiny)
    result = mk(*words)
    assert lines(result.out)["warning"].startswith("zero: input_layernorm.weight ")
    assert result.err == ""
    assert json.loads(mk(*words, "--json").out)["warnings"] == [lines(result.out)["warning"]]


def test_no_room(mk: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan` warns, rather than fails, if there is too little free space."""
    usage = shutil.disk_usage(tiny)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    result = mk("plan", "--every", "4", "--model", tiny)
    assert result.status == 0
    assert "free disk space" in lines(result.out)["warning"]


def test_a_drawing(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """`plan --svg` writes only an SVG file with the planned layers."""
    result = mk("plan", "--every", "4", "--svg", "layers.svg", "--model", tiny, cwd=tmp_path)
    assert result.status == 0, result.err
    assert os.listdir(tmp_path) == ["layers.svg"]
    root = ET.fromstring((tmp_path / "layers.svg").read_bytes())  # noqa: S314 - this program wrote it
    assert "8 original, 2 zeroed" in "".join(root.itertext())
    result = mk("plan", "--every", "4", "--svg", "no/such/place", "--model", tiny, cwd=tmp_path)
    assert (result.status, result.err.startswith("error: no/such/place: ")) == (1, True)
    words = ("plan", "--every", "2", "--model", tiny, "--svg")
    assert mk(*words, "layers.svg", cwd=tmp_path).status == 0
    assert "8 original, 4 zeroed" in (tmp_path / "layers.svg").read_text()


@pytest.mark.parametrize(
    ("name", "status"), [("mine.svg", 1), ("config.json", 2), ("notes", 1), ("new.png", 2)]
)
def test_a_drawing_replaces_no_other_file(
    mk: Cli, tiny: Path, tmp_path: Path, name: str, status: int
) -> None:
    """`plan --svg` refuses a file that is no such picture, and a name of another kind."""
    if name != "new.png":
        (tmp_path / name).write_text("<svg>mine</svg>")
    result = mk("plan", "--every", "4", "--model", tiny, "--svg", name, cwd=tmp_path)
    assert (result.status, name in result.err.splitlines()[0]) == (status, True)
    texts = [file.read_text() for file in tmp_path.iterdir()]
    assert texts == ([] if name == "new.png" else ["<svg>mine</svg>"])
    (tmp_path / "empty.svg").touch()
    words = ("plan", "--every", "4", "--model", tiny, "--svg", "empty.svg")
    assert mk(*words, cwd=tmp_path).status == 0


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_table_on_a_terminal(tiny: Path, tmp_path: Path, encoding: str) -> None:
    """On a terminal, the plan fits the width and starts with one sign for each layer."""
    words = [sys.executable, "-m", "mergekit_interleave", "plan", "--every", "4", "--model", tiny]
    reader, terminal = pty.openpty()
    env = {**os.environ, "COLUMNS": "60", "PYTHONIOENCODING": encoding, "TERM": "xterm"}
    with subprocess.Popen(words, stdout=terminal, cwd=tmp_path, env=env) as process:
        os.close(terminal)
        shown = b""
        try:
            while chunk := os.read(reader, 4096):
                shown += chunk
        except OSError:  # Linux raises it at the end of the output
            pass
        assert process.wait() == 0
    text = re.sub(r"\x1b\[[\d;]*m|\r", "", shown.decode(encoding))
    assert "".join(text.splitlines()[0].split()[1:]) == (
        "████░████░" if encoding == "utf-8" else "####.####."
    )
    assert max(map(len, text.splitlines())) <= 60
    assert "block expansion" in " ".join(text.split())
