"""Test `verify`: it passes a model that matches its layout, and names every difference."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zoo
from harness import Cli, edit_json, load_tensors, make_llama

from mergekit_interleave.checkpoint.safetensors_header import read_tensors

O_PROJ = "model.layers.{}.self_attn.o_proj.weight"


@pytest.fixture(scope="module", params=["stream", "mergekit"])
def made(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: Any) -> Path:
    """Expand the tiny Llama by `every 4`, once per engine; tests must not change the result."""
    out = tmp_path_factory.mktemp("made") / "out"
    _run("interleave: every 4", out, "--model", tiny, "--engine", request.param)
    return Path(out)


def _run(*words: object) -> None:
    from mergekit_interleave.cli import main as cli

    with pytest.raises(SystemExit) as exit_info:
        cli.main(["run", *map(str, words)])
    assert not exit_info.value.code


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """Copy the expanded model, so that a test may damage it."""
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def stream(tiny: Path, tmp_path: Path) -> Path:
    """Expand with the stream engine only; a test may damage the result."""
    _run("interleave: every 4", tmp_path / "out", "--model", tiny, "--engine", "stream")
    return tmp_path / "out"


def one_line(text: str, *parts: str) -> bool:
    """Whether one line of a text contains all parts."""
    return any(all(part in line for part in parts) for line in text.splitlines())


def edit_bytes(out: Path, name: str, edit: Callable[[bytes], bytes]) -> None:
    """Change the bytes of one tensor in place."""
    tensor = read_tensors(out)[name]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start)
        data = file.read(tensor.nbytes)
        file.seek(tensor.start)
        file.write(edit(data))


def edit_tensors(out: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a model that has one shard."""
    from safetensors.torch import save_file

    tensors = load_tensors(out)
    edit(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


class TestWhole:
    """`verify` passes an undamaged model."""

    def test_against_its_base(self, mk: Cli, made: Path, tiny: Path) -> None:
        """`verify --against` compares every tensor."""
        result = mk("verify", made, "--against", tiny)
        assert (result.status, result.err) == (0, "")
        assert one_line(result.out, "weights: 93 of 93 tensors ", " tiny, ")

    def test_against_itself(self, mk: Cli, made: Path) -> None:
        """Without the base, `verify` compares what it can and counts what it cannot."""
        result = mk("verify", made)
        assert (result.status, result.err) == (0, "")
        assert one_line(result.out, "weights: 18 of 93 tensors ")
        assert one_line(result.out, " 75 not compared: ", "--against BASE")

    def test_without_torch(self, made: Path, tiny: Path) -> None:
        """`verify` does not import torch for a model that was only copied."""
        import subprocess

        script = (
            "import sys\nfrom mergekit_interleave.cli import main as cli\n"
            f"try: cli.main(['verify', {str(made)!r}, '--against', {str(tiny)!r}])\n"
            "except SystemExit as e: print(e.code)\n"
            "print([n for n in ('torch', 'transformers', 'mergekit') if n in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert done.stdout.endswith("0\n[]\n"), done.stderr

    def test_as_json(self, mk: Cli, made: Path, tiny: Path) -> None:
        """`verify --json` prints the result as JSON."""
        report = json.loads(mk("verify", made, "--against", tiny, "--json").out)
        assert (report["exact"], report["differences"], report["against"]) == (True, [], ["tiny"])
        assert report["tensors"] == 93
        assert report["bytes"] == report["compared"]

    def test_of_what_mergekit_yaml_wrote(
        self, mk: Cli, shell: Callable[..., Any], tiny: Path, tmp_path: Path
    ) -> None:
        """`verify` takes the layers from mergekit_config.yml if there is no interleave.json."""
        done = shell(
            f"mk-interleave gen 'interleave: every 4' --model {tiny} > c.yml; mergekit-yaml c.yml o"
        )
        assert done.returncode == 0, done.stderr
        for words in ((), ("--against", tiny)):
            result = mk("verify", tmp_path / "o", *words)
            assert (result.status, result.err) == (0, "")

    def test_sharded(self, mk: Cli, sharded: Path, tmp_path: Path) -> None:
        """`verify` passes a model with several shards, bfloat16 and tied embeddings."""
        for engine in ("stream", "mergekit"):
            out = tmp_path / engine
            _run("repeat: [1, 3]", out, "--model", sharded, "--engine", engine)
            assert mk("verify", out, "--against", sharded).status == 0
            assert mk("verify", out).status == 0


class TestWrong:
    """`verify` names each difference and exits with 1, without the base if possible."""

    def wrong(self, mk: Cli, out: Path, *words: object) -> str:
        """Run `verify`, check that it fails, and return what it prints."""
        result = mk("verify", out, *words)
        assert result.status == 1, result.out
        return result.out + result.err

    @pytest.mark.parametrize("where", [0, 1234, -1])
    @pytest.mark.parametrize(
        "name",
        ["model.embed_tokens.weight", "model.norm.weight", "model.layers.4.mlp.up_proj.weight"],
    )
    def test_a_flipped_bit(self, name: str, where: int, mk: Cli, stream: Path, tiny: Path) -> None:
        """`verify` finds one flipped bit in any tensor, at any place."""

        def flip(data: bytes) -> bytes:
            place = where % len(data)
            return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]

        edit_bytes(stream, name, flip)
        printed = self.wrong(mk, stream, "--against", tiny)
        assert one_line(printed, f"{name} differs", "[")
        assert "in 1 place" in printed

    def test_every_tensor(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """`verify` prints ten differences and counts all; `--json` lists all."""
        for name in read_tensors(stream):
            edit_bytes(stream, name, lambda data: bytes([data[0] ^ 1]) + data[1:])
        printed = self.wrong(mk, stream, "--against", tiny)
        assert "and 83 more" in printed
        assert "in 93 places" in printed
        listed = json.loads(mk("verify", stream, "--against", tiny, "--json").out)["differences"]
        assert {entry["tensor"] for entry in listed} == read_tensors(stream).keys()
        assert listed[9]["layer"] == 0

    def test_where_it_is(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """`verify` names the row and column of the first number that differs."""
        name = "model.layers.0.mlp.up_proj.weight"  # 48 rows of 32 columns of 4 bytes
        at = (7 * 32 + 5) * 4 + 2
        edit_bytes(stream, name, lambda d: d[:at] + bytes([d[at] ^ 255]) + d[at + 1 :])
        printed = self.wrong(mk, stream, "--against", tiny)
        assert one_line(printed, f"layer 0: {name} differs", "[7, 5]")

    @pytest.mark.parametrize("against", [True, False])
    def test_a_number_in_a_zeroed_tensor(
        self, against: bool, mk: Cli, out: Path, tiny: Path
    ) -> None:
        """`verify` finds the smallest nonzero number at the end of a zeroed tensor."""
        edit_bytes(out, O_PROJ.format(4), lambda data: data[:-4] + b"\x01\0\0\0")
        printed = self.wrong(mk, out, *(("--against", tiny) if against else ()))
        assert one_line(printed, f"layer 4: {O_PROJ.format(4)} ", "not zero", "[31, 31]")

    def test_negative_zeros_are_zeros(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """`verify` accepts negative zeros, which mergekit's multiplication writes."""
        edit_bytes(stream, O_PROJ.format(4), lambda data: b"\0\0\0\x80" * (len(data) // 4))
        assert mk("verify", stream, "--against", tiny).status == 0
        edit_bytes(stream, O_PROJ.format(4), lambda data: b"\0\x80\0\0" * (len(data) // 4))
        printed = self.wrong(mk, stream, "--against", tiny)
        assert one_line(printed, f"layer 4: {O_PROJ.format(4)} ", "not zero", "[0, 0]")

    def test_two_layers_swapped(self, mk: Cli, out: Path, tiny: Path) -> None:
        """`verify` names both of two swapped layers."""

        def swap(tensors: dict[str, Any]) -> None:
            for name in [name for name in tensors if ".layers.2." in name]:
                other = name.replace(".2.", ".3.")
                tensors[name], tensors[other] = tensors[other], tensors[name]

        edit_tensors(out, swap)
        printed = self.wrong(mk, out, "--against", tiny)
        assert "layer 2: " in printed
        assert "layer 3: " in printed
        assert "in 18 places" in printed

    def test_a_copy_that_is_none(self, mk: Cli, out: Path) -> None:
        """Without the base, `verify` finds a new layer that differs from its original."""
        name = "model.layers.9.mlp.gate_proj.weight"
        edit_bytes(out, name, lambda data: data[:40] + b"\x01" + data[41:])
        original = "model.layers.8.mlp.gate_proj.weight"
        assert one_line(self.wrong(mk, out), f"layer 9: {name} ", f" {original} ", "[0, 10]")

    @pytest.mark.parametrize("against", [True, False])
    def test_a_tensor_missing(self, against: bool, mk: Cli, out: Path, tiny: Path) -> None:
        """`verify` names a missing tensor of a new layer."""
        name = "model.layers.4.mlp.up_proj.weight"
        edit_tensors(out, lambda tensors: tensors.pop(name))
        printed = self.wrong(mk, out, *(("--against", tiny) if against else ()))
        assert one_line(printed, f"layer 4: {name} is missing")

    def test_one_too_many(self, mk: Cli, out: Path, tiny: Path) -> None:
        """`verify` names each tensor that the layout does not have."""
        import torch

        names = ("model.layers.4.mlp.extra", "model.layers.4.self_attn.rotary_emb.strange")
        edit_tensors(out, lambda tensors: tensors.update({n: torch.zeros(2) for n in names}))
        printed = self.wrong(mk, out, "--against", tiny)
        assert all(one_line(printed, f"{name} ", "layout") for name in names)
        assert "in 2 places" in printed

    def test_another_dtype_or_shape(self, mk: Cli, out: Path, tiny: Path) -> None:
        """`verify` names the dtype and shape of a tensor, and what they must be."""

        def change(tensors: dict[str, Any]) -> None:
            tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
            tensors[O_PROJ.format(0)] = tensors[O_PROJ.format(0)].reshape(16, 64)

        edit_tensors(out, change)
        printed = self.wrong(mk, out, "--against", tiny)
        assert one_line(printed, "model.norm.weight ", "F64 [32]", "F32 [32]")
        assert one_line(printed, f"layer 0: {O_PROJ.format(0)} ", "F32 [16, 64]", "F32 [32, 32]")

    @pytest.mark.parametrize("against", [True, False])
    def test_a_truncated_shard(self, against: bool, mk: Cli, out: Path, tiny: Path) -> None:
        """`verify` names a truncated file."""
        os.truncate(out / "model.safetensors", (out / "model.safetensors").stat().st_size - 1)
        printed = self.wrong(mk, out, *(("--against", tiny) if against else ()))
        assert one_line(printed, f"{out / 'model.safetensors'}: cut short")
        assert "warning" not in printed
        if against:
            recorded = json.loads((out / "interleave.json").read_text())["verified"]["weights"]
            assert recorded["failed"] == {"weights": 1}
            assert "**failed**" in (out / "README.md").read_text()

    @pytest.mark.parametrize("command", ["verify", "card", "train"])
    def test_an_invalid_directive_in_interleave_json(
        self, command: str, mk: Cli, out: Path
    ) -> None:
        """Every command that reads an interleave.json names it if its directive is invalid."""
        edit_json(out / "interleave.json", lambda content: content.update(directive={"a": 1}))
        result = mk(command, out, *(("--for", "trl") if command == "train" else ()))
        assert result.status == 1
        assert one_line(result.out + result.err, f"{out / 'interleave.json'}: ", "'a'")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_hidden_layers", 8),
            ("rms_norm_eps", 1e-5),
            ("num_key_value_heads", 4),
            ("tie_word_embeddings", True),
            ("hidden_act", "gelu"),
        ],
    )
    def test_a_wrong_config_field(
        self, key: str, value: object, mk: Cli, out: Path, tiny: Path
    ) -> None:
        """`verify` names a wrong key of config.json, its value and the right one."""
        edit_json(out / "config.json", lambda config: config.update({key: value}))
        printed = self.wrong(mk, out, "--against", tiny)
        assert one_line(printed, f"config.json: {key} is {json.dumps(value)}, expected ")
        if key == "num_hidden_layers":
            assert one_line(self.wrong(mk, out), f"error: {out}: ", "config.json", "8 layers", "10")

    def test_a_config_that_means_the_same(self, mk: Cli, out: Path, tiny: Path) -> None:
        """A missing default or another author in config.json is no difference."""

        def spell(config: dict[str, Any]) -> None:
            config.pop("attention_dropout")
            config |= {"transformers_version": "4.0.0", "_name_or_path": "somewhere"}

        edit_json(out / "config.json", spell)
        assert mk("verify", out, "--against", tiny).status == 0

    def test_no_config(self, mk: Cli, out: Path, tiny: Path) -> None:
        """`verify` names a missing config.json."""
        (out / "config.json").unlink()
        assert one_line(self.wrong(mk, out, "--against", tiny), "config.json: ", "missing")

    def test_a_wrong_index(self, mk: Cli, sharded: Path, tmp_path: Path) -> None:
        """`verify` names a tensor or a shard that the index omits."""
        out = tmp_path / "out"
        _run("append: 1", out, "--model", sharded, "--engine", "stream")
        index = out / "model.safetensors.index.json"
        before = index.read_text()
        name = "model.norm.weight"
        edit_json(index, lambda content: content["weight_map"].pop(name))
        assert one_line(self.wrong(mk, out, "--against", sharded), f"{index}: ", name)
        index.write_text(before)
        shutil.copy(next(out.glob("*.safetensors")), out / "model-stray.safetensors")
        printed = self.wrong(mk, out, "--against", sharded)
        assert one_line(printed, "model-stray.safetensors: ", "index")

    def test_a_file_that_is_gone(self, mk: Cli, out: Path, tiny: Path) -> None:
        """`verify` names a missing file that `run` had written."""
        (out / "tokenizer.json").unlink()
        assert one_line(self.wrong(mk, out, "--against", tiny), "tokenizer.json: ", "missing")

    def test_a_wrong_manifest(self, mk: Cli, out: Path, tiny: Path) -> None:
        """`verify` names wrong layers and a wrong fingerprint in the recorded files."""
        manifest = out / "interleave.json"
        before = manifest.read_text()
        edit_json(manifest, lambda content: content["layers"][4].update(zeroed=[], new=False))
        printed = self.wrong(mk, out, "--against", tiny)
        assert one_line(printed, "interleave.json: layer 4: new ", "false")
        assert one_line(printed, "interleave.json: layer 4: zeroed ", "[]")
        manifest.write_text(before)
        edit_json(manifest, lambda content: content.update(fingerprint="0" * 16))
        assert one_line(self.wrong(mk, out), "interleave.json: ", "fingerprint")
        manifest.write_text(before)
        recipe = (out / "mergekit_config.yml").read_text()
        (out / "mergekit_config.yml").write_text(recipe.replace("[3, 4]", "[2, 3]"))
        assert one_line(self.wrong(mk, out), "mergekit_config.yml: ", "layers")

    def test_null_is_not_a_missing_key(self, mk: Cli, tmp_path: Path) -> None:
        """A missing key differs from null if the class has another default."""
        base = make_llama(tmp_path / "base", mistral=True, sliding_window=None)
        _run("append: 1", tmp_path / "out", "--model", base, "--engine", "stream")
        assert mk("verify", tmp_path / "out", "--against", base).status == 0
        edit_json(tmp_path / "out/config.json", lambda config: config.pop("sliding_window"))
        printed = self.wrong(mk, tmp_path / "out", "--against", base)
        assert one_line(printed, "config.json: sliding_window ", "missing", "null")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_hidden_layers", 10.0),
            ("hidden_size", 32.0),
            ("attn_implementation", "somebody/kernel"),
            ("experts_implementation", "x"),
            ("quantization_config", {}),
        ],
    )
    def test_values_that_a_class_would_accept(
        self, key: str, value: object, mk: Cli, stream: Path, tiny: Path
    ) -> None:
        """`verify` names a value that the config class would accept silently or fail to load."""
        edit_json(stream / "config.json", lambda config: config.update({key: value}))
        printed = self.wrong(mk, stream, "--against", tiny)
        assert one_line(printed, f"config.json: {key} is {json.dumps(value)}, expected ")

    def test_two_ways_to_load_it(self, mk: Cli, sharded: Path, tmp_path: Path) -> None:
        """`verify` refuses model.safetensors beside an index, which transformers would ignore."""
        out = tmp_path / "out"
        _run("append: 1", out, "--model", sharded, "--engine", "stream")
        first = min(out.glob("*.safetensors"))
        first.rename(out / "model.safetensors")

        def renamed(content: dict[str, Any]) -> None:
            for name, shard in content["weight_map"].items():
                if shard == first.name:
                    content["weight_map"][name] = "model.safetensors"

        edit_json(out / "model.safetensors.index.json", renamed)
        edit_json(out / "interleave.json", lambda content: content.update(files=[]))
        printed = self.wrong(mk, out, "--against", sharded)
        assert one_line(printed, f"{out}: ", " model.safetensors ", "model.safetensors.index.json")

    def test_small_files(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """`verify` names small files that differ from the base's, and an added adapter."""
        (stream / "tokenizer.json").write_text("{}")
        edit_json(stream / "generation_config.json", lambda c: c.update(repetition_penalty=9.0))
        (stream / "adapter_config.json").write_text("{}")
        printed = self.wrong(mk, stream, "--against", tiny)
        assert one_line(printed, "tokenizer.json: differs")
        assert one_line(printed, "generation_config.json: differs")
        assert one_line(printed, "adapter_config.json: ", "adapter")
        assert "in 3 places" in printed

    def test_a_lora_that_was_not_used(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """interleave.json cannot exclude tensors from the comparison by naming a LoRA."""

        def name_a_lora(content: dict[str, Any]) -> None:
            content["models"][0]["model"] = "tiny+none/such"

        edit_json(stream / "interleave.json", name_a_lora)
        printed = self.wrong(mk, stream, "--against", tiny)
        assert one_line(printed, "error: ", "LoRA", str(tiny))
        assert one_line(printed, "hint: ", "--against")

    @pytest.mark.parametrize(
        ("factor", "found"),
        [(0.0, "interleave.json: layer 2: new "), (2.0, "layer 2: model.layers.2.mlp.up_proj")],
    )
    def test_originals_that_are_called_new(
        self, factor: float, found: str, mk: Cli, stream: Path, tiny: Path
    ) -> None:
        """interleave.json cannot hide a changed original layer from --trained by an edit."""

        def scale_an_original(content: dict[str, Any]) -> None:
            content["layers"][2]["scale"] = [{"filter": None, "value": factor}]

        edit_json(stream / "interleave.json", scale_an_original)
        name = "model.layers.2.mlp.up_proj.weight"
        edit_bytes(stream, name, lambda data: bytes(len(data)))
        printed = self.wrong(mk, stream, "--against", tiny, "--trained")
        assert one_line(printed, "interleave.json: ", "fingerprint")
        assert one_line(printed, found)

    @pytest.mark.parametrize(
        "changes",
        [
            {"layers": []},
            {"layers": [{"model": 0, "layer": -1, "new": False, "scale": []}]},
            {"layers": [{"model": 0, "layer": 0, "scale": [{"filter": "x", "value": 10**400}]}]},
            {"layers": [{"model": 0, "layer": 0, "scale": [{"filter": "x", "value": "x"}]}]},
            {"models": [{"model": "tiny", "layers": float("inf")}]},
            {"models": [{"model": "tiny", "layers": 8}, {"model": "other", "layers": 8}]},
            {"models": [{"model": "tiny\ud800", "layers": 8}]},
            {"models": []},
            {"directive": 5},
            {"version": 10**400},
        ],
    )
    @pytest.mark.parametrize("against", [True, False])
    def test_an_invalid_manifest(
        self, changes: dict[str, Any], against: bool, mk: Cli, stream: Path, tiny: Path
    ) -> None:
        """An invalid interleave.json gives one error with exit code 1."""
        edit_json(stream / "interleave.json", lambda content: content.update(changes))
        printed = self.wrong(mk, stream, *(("--against", tiny) if against else ()))
        assert one_line(printed, f"error: {stream / 'interleave.json'}: ")

    @pytest.mark.parametrize("content", ["slices: " + "[" * 50_000, "x: [", "append: 1", ""])
    def test_an_invalid_recipe(self, content: str, stream: Path, tiny: Path) -> None:
        """An invalid mergekit_config.yml gives exit code 1, even if it is nested very deeply."""
        import subprocess

        (stream / "mergekit_config.yml").write_text(content)
        command = [sys.executable, "-m", "mergekit_interleave", "verify", str(stream)]
        for words in ((), ("--against", str(tiny))):
            for gone in (False, True):
                if gone:
                    (stream / "interleave.json").rename(stream / "x")
                done = subprocess.run(
                    [*command, *words], capture_output=True, text=True, check=False
                )
                if gone:
                    (stream / "x").rename(stream / "interleave.json")
                assert done.returncode == 1
                if gone:
                    assert done.stderr.startswith(f"error: {stream / 'mergekit_config.yml'}: ")
                else:
                    assert one_line(done.stdout, "mergekit_config.yml: ")

    def test_a_config_that_is_a_pipe(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """`verify` does not wait for a config.json that is a pipe."""
        (stream / "config.json").unlink()
        os.mkfifo(stream / "config.json")
        printed = self.wrong(mk, stream, "--against", tiny)
        assert one_line(printed, f"{stream / 'config.json'}: ", "regular file")
        assert one_line(self.wrong(mk, stream), f"error: {stream}: ", "config.json")

    def test_a_huge_depth(self, mk: Cli, tmp_path: Path) -> None:
        """`verify` refuses a huge depth before a config class makes a list of its layers."""
        import toys

        base, out = tmp_path / "base", tmp_path / "out"
        toys.build("qwen3").save_pretrained(base)
        _run("append: 1", out, "--model", base, "--engine", "stream")

        def deepen(config: dict[str, Any]) -> None:
            config.pop("layer_types")
            config["num_hidden_layers"] = 10**12

        edit_json(out / "config.json", deepen)
        printed = self.wrong(mk, out, "--against", base)
        assert one_line(printed, "config.json: num_hidden_layers is 1000000000000, expected 9")
        assert one_line(self.wrong(mk, out), f"error: {out / 'config.json'}: ", "10000")

    def test_control_characters_in_names(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """`verify` escapes control characters in a tensor's name."""
        import torch
        from safetensors.torch import save_file

        tensors = load_tensors(stream)
        save_file({**tensors, "a\x1b[2Jb": torch.zeros(1)}, stream / "model.safetensors")
        printed = self.wrong(mk, stream, "--against", tiny)
        assert one_line(printed, "a\\x1b[2Jb ", "layout")
        assert "\x1b" not in printed

    def test_another_layout(self, mk: Cli, out: Path, tiny: Path, tmp_path: Path) -> None:
        """--recipe states the layout that the model must have."""
        asked = tmp_path / "asked.yml"
        asked.write_text("interleave: every 2")
        printed = self.wrong(mk, out, "--against", tiny, "--recipe", asked)
        assert "layer 2: " in printed
        asked.write_text("interleave: every 4")
        assert mk("verify", out, "--against", tiny, "--recipe", asked).status == 0

    def test_another_base(self, mk: Cli, out: Path, tmp_path: Path) -> None:
        """`verify` fails against another base of the same shape."""
        other = make_llama(tmp_path / "other")
        printed = self.wrong(mk, out, "--against", other)
        assert one_line(printed, "layer 0: model.layers.0.mlp.up_proj.weight differs")
        assert "in 89 places" in printed  # all 93 tensors except the four that are zero

    def test_a_base_of_another_depth(self, mk: Cli, out: Path, tmp_path: Path) -> None:
        """`verify` names a base whose depth differs from the recorded one."""
        other = make_llama(tmp_path / "other", layers=12)
        printed = self.wrong(mk, out, "--against", other)
        assert one_line(printed, f"error: {other}: ", "12 layers", "8")


class TestNamed:
    """`--layers` and `--also` name what else was trained."""

    @pytest.fixture(scope="class")
    def tied(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Return a base whose head and embeddings share one tensor."""
        return make_llama(tmp_path_factory.mktemp("tied") / "base", tie_word_embeddings=True)

    def test_trained_seams(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """Only the named layers may differ, and the card then calls the model trained."""
        out = tmp_path / "out"
        _run("drop: [2, 5]", out, "--model", tiny)
        edit_bytes(out, "model.layers.2.mlp.up_proj.weight", lambda data: bytes(len(data)))
        words = ("verify", out, "--against", tiny, "--trained")
        assert mk(*words).status == 1
        assert mk(*words, "--layers", "0:2").status == 1
        found = mk(*words, "--layers", "seams")
        assert (found.status, found.err) == (0, "")
        assert "18 not compared" in found.out
        text = (out / "README.md").read_text()
        assert re.search(r"\*\*Status: trained\.\*\* .*\bnot trained\b", text)

    @pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
    def test_a_trained_tied_head(self, name: str, mk: Cli, tied: Path, tmp_path: Path) -> None:
        """Either name of a shared tensor accepts its changes."""
        out = tmp_path / "out"
        _run("append: 1", out, "--model", tied, "--engine", "stream")
        edit_bytes(out, "model.embed_tokens.weight", lambda data: bytes(len(data)))
        words = ("verify", out, "--against", tied, "--trained")
        assert mk(*words).status == 1
        assert mk(*words, "--also", name).status == 0

    @pytest.mark.parametrize(
        ("words", "key"),
        [
            (("--layers", "seams"), "--trained"),
            (("--trained", "--also", "head"), "also"),
            (("--trained", "--layers", "seam"), "layers"),
        ],
    )
    def test_words_that_name_nothing(
        self, words: tuple[str, ...], key: str, mk: Cli, out: Path, tiny: Path
    ) -> None:
        """Such words are wrong for every model."""
        result = mk("verify", out, "--against", tiny, *words)
        assert (result.status, result.out) == (2, "")
        assert key in result.err


class TestComputed:
    """`verify` recomputes weights that were scaled or converted."""

    @pytest.mark.parametrize(
        "directive",
        [
            "repeat: [2, 4], dtype: bfloat16",
            "stack: [[0, 6], [2, 8]], dtype: float16, out_dtype: float32",
        ],
    )
    def test_converted(self, directive: str, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """Converted weights are compared to the last bit."""
        out = tmp_path / "out"
        _run(directive, out, "--model", tiny)
        assert mk("verify", out, "--against", tiny).status == 0
        edit_bytes(out, "lm_head.weight", lambda data: bytes([data[0] ^ 1]) + data[1:])
        result = mk("verify", out, "--against", tiny)
        assert result.status == 1
        dtype = "BF16" if "bfloat16" in directive else "F32"
        assert one_line(result.out, "lm_head.weight ", f" {dtype}, ", "[0, 0]")

    @pytest.mark.parametrize("keys", ["", "dtype: bfloat16", "dtype: float16\nout_dtype: float32"])
    def test_scaled(self, keys: str, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """Scaled weights are recomputed in the dtype that mergekit computes in."""
        out, recipe = tmp_path / "out", tmp_path / "recipe.yml"
        scale = "{scale: [{filter: q_proj, value: 0.7071067811865476}, {value: 1.0}]}"
        recipe.write_text(
            "merge_method: passthrough\nslices:\n"
            f"- sources: [{{model: {tiny}, layer_range: [0, 8]}}]\n"
            f"- sources: [{{model: {tiny}, layer_range: [2, 4], parameters: {scale}}}]\n"
            f"- sources: [{{model: {tiny}, layer_range: [7, 8]}}]\n{keys}\n"
        )
        _run(recipe, out)
        for words in (("--against", tiny), ()):
            result = mk("verify", out, *words)
            assert (result.status, result.err) == (0, ""), result.out
        name = "model.layers.8.self_attn.q_proj.weight"
        edit_bytes(out, name, lambda data: bytes([data[0] ^ 1]) + data[1:])
        result = mk("verify", out, "--against", tiny)
        assert result.status == 1
        assert one_line(result.out, f"layer 8: {name} ", "layers.2.", "0.7071", "[0, 0]")

    def test_scaled_layers_that_are_no_copies(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """Scaled layers without an unscaled original are recomputed, with and without the base."""
        out = tmp_path / "out"
        _run("layout: [[0, 2], {layers: [2, 4], times: 2, scale: {q_proj: 0.5}}, [4, 8]]", out,
             "--model", tiny)  # fmt: skip
        for words in (("--against", tiny), ()):
            assert mk("verify", out, *words).status == 0
        file = out / "interleave.json"
        kept = file.read_text()
        assert [layer["new"] for layer in json.loads(kept)["layers"]] == [
            0,
            0,
            0,
            1,
            0,
            1,
            0,
            0,
            0,
            0,
        ]

        def as_release_0_2_wrote_it(content: dict[str, Any]) -> None:
            for layer in content["layers"]:
                layer["new"] = bool(layer["scale"])
            content["new_parameters"] *= 2

        edit_json(file, as_release_0_2_wrote_it)
        assert mk("verify", out, "--against", tiny).status == 0
        file.write_text(kept)
        edit_json(file, lambda content: content["layers"][2].update(new=True))
        assert mk("verify", out).status == 1

    def test_with_a_lora(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """`verify` says which weights it cannot recompute because a LoRA was merged."""
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny),
            LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        )
        model.save_pretrained(tmp_path / "lora")
        _run("append: 1", tmp_path / "out", "--model", f"{tiny}+{tmp_path / 'lora'}")
        base = f"{tiny}+{tmp_path / 'lora'}"
        result = mk("verify", tmp_path / "out", "--against", base)
        assert result.status == 0, result.out
        assert "LoRA" in result.out
        assert "no tensor" in result.out
        without = mk("verify", tmp_path / "out", "--against", tiny)
        assert without.status == 1
        assert one_line(without.err, "error: ", "LoRA", str(tiny))


class TestSeveralModels:
    """`verify` compares a stack of two models with both."""

    @pytest.fixture
    def two(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        """Create two models and a stack of them."""
        one, other = make_llama(tmp_path / "one"), make_llama(tmp_path / "other")
        recipe = tmp_path / "recipe.yml"
        recipe.write_text(
            "merge_method: passthrough\nslices:\n"
            f"- sources: [{{model: {one}, layer_range: [0, 6]}}]\n"
            f"- sources: [{{model: {other}, layer_range: [2, 8]}}]\n"
        )
        _run(recipe, tmp_path / "out")
        return one, other, tmp_path / "out"

    def test_both_are_named(self, two: tuple[Path, Path, Path], mk: Cli) -> None:
        """--against must name the two models in their order."""
        one, other, out = two
        assert mk("verify", out, "--against", one, "--against", other).status == 0
        assert mk("verify", out).status == 0
        result = mk("verify", out, "--against", other, "--against", one)
        assert result.status == 1
        assert one_line(result.out, "layer 0: model.layers.0.mlp.up_proj.weight differs")

    def test_one_alone(self, two: tuple[Path, Path, Path], mk: Cli) -> None:
        """If --against names one of two models, the hint names both in order."""
        one, _, out = two
        result = mk("verify", out, "--against", one)
        assert result.status == 2
        error, hint = result.err.splitlines()
        assert error.startswith("error: --against: ")
        assert "2 models" in error
        assert hint.endswith(": --against one --against other")


class TestTrained:
    """After training, original layers must equal the base, and new layers may differ."""

    @pytest.fixture
    def trained(self, tiny: Path, tmp_path: Path) -> Path:
        """Train only the new layers, and save the model with transformers."""
        import torch
        from transformers import AutoModelForCausalLM

        out = tmp_path / "out"
        _run("interleave: every 4", out, "--model", tiny)
        model = AutoModelForCausalLM.from_pretrained(out)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(f".layers.{i}." in name for i in (4, 9)))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        tokens = torch.arange(32).unsqueeze(0)
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        model.config.use_cache = False
        model.save_pretrained(tmp_path / "trained")
        return tmp_path / "trained"

    def test_only_new_layers_differ(
        self, mk: Cli, trained: Path, tiny: Path, tmp_path: Path
    ) -> None:
        """--trained allows new layers to differ, and reads which are new from --recipe."""
        words = ("verify", trained, "--against", tiny, "--recipe", tmp_path / "out/interleave.json")
        assert mk(*words, "--trained").status == 0
        untrained = mk(*words)
        assert (untrained.status, "layer 4: " in untrained.out) == (1, True)
        assert "layer 3: " not in untrained.out

    def test_an_original_that_moved(
        self, mk: Cli, trained: Path, tiny: Path, tmp_path: Path
    ) -> None:
        """--trained finds one flipped bit in an original layer."""
        name = "model.layers.0.mlp.up_proj.weight"
        edit_bytes(trained, name, lambda data: bytes([data[0] ^ 1]) + data[1:])
        words = ("verify", trained, "--against", tiny, "--recipe", tmp_path / "out/interleave.json")
        result = mk(*words, "--trained")
        assert (result.status, f"layer 0: {name} differs" in result.out) == (1, True)

    def test_an_untrained_model_is_not_called_trained(
        self, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """`--trained` records the full comparison if the new layers are as `run` wrote them."""
        out = tmp_path / "out"
        assert mk("run", "interleave: every 4", out, "--model", tiny).status == 0
        assert mk("verify", out, "--against", tiny, "--trained").status == 0
        verified = json.loads((out / "interleave.json").read_text())["verified"]
        assert "trained" not in verified
        assert "not_compared" not in verified["weights"]
        assert "**Status: trained" not in (out / "README.md").read_text()

    def test_trained_in_float32(self, mk: Cli, tmp_path: Path) -> None:
        """--trained accepts a wider dtype, and finds a number that changed in it."""
        import torch
        from transformers import AutoModelForCausalLM

        base, out = make_llama(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "out"
        _run("interleave: every 4", out, "--model", base)
        model = AutoModelForCausalLM.from_pretrained(out, dtype="float32")
        for layer in (4, 9):
            model.model.layers[layer].self_attn.o_proj.weight.data += 2**-12
        model.save_pretrained(tmp_path / "trained")
        shutil.copy(out / "interleave.json", tmp_path / "trained")
        words = ("verify", tmp_path / "trained", "--against", base)
        assert mk(*words, "--trained").status == 0
        assert mk("card", tmp_path / "trained").status == 0
        text = (tmp_path / "trained/README.md").read_text()
        assert "**Status: trained.**" in text
        assert "75 of them" in text
        assert "wider dtype" in text
        assert one_line(mk(*words).out, "model.embed_tokens.weight ", "F32 [64, 32]", "BF16")
        model.model.layers[0].self_attn.o_proj.weight.data[1, 2] += 2**-12
        model.save_pretrained(tmp_path / "trained")
        result = mk(*words, "--trained")
        assert result.status == 1
        assert one_line(result.out, f"layer 0: {O_PROJ.format(0)} ", " F32, ", "[1, 2]")

    def test_needs_the_base(self, mk: Cli, trained: Path) -> None:
        """--trained needs --against."""
        result = mk("verify", trained, "--trained")
        assert result.status == 2
        assert one_line(result.err, "error: --trained ")
        assert one_line(result.err, "hint: ", "--against")

    def test_a_part_that_states_its_dtype(self, mk: Cli, tmp_path: Path) -> None:
        """--trained accepts the dtype that transformers adds to the configs of composite models."""
        import composites
        from transformers import AutoModelForImageTextToText

        composites.build("smolvlm").save_pretrained(tmp_path / "base")
        _run("append: 1", tmp_path / "out", "--model", tmp_path / "base", "--engine", "stream")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        model.save_pretrained(tmp_path / "t")
        words = ("verify", tmp_path / "t", "--against", tmp_path / "base", "--trained")
        result = mk(*words, "--recipe", tmp_path / "out/interleave.json")
        assert result.status == 0, result.out

    def test_no_embeddings_at_all(self, mk: Cli, sharded: Path, tmp_path: Path) -> None:
        """One of two tied tensors must be stored."""
        out = tmp_path / "out"
        _run("append: 1", out, "--model", sharded, "--engine", "stream")
        tensors = load_tensors(out)
        for file in out.glob("*.safetensors*"):
            file.unlink()
        from safetensors.torch import save_file

        del tensors["model.embed_tokens.weight"]
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        result = mk("verify", out, "--against", sharded, "--trained")
        assert result.status == 1
        assert one_line(result.out, "model.embed_tokens.weight is missing")

    def test_tied_embeddings(self, mk: Cli, tmp_path: Path) -> None:
        """--trained accepts a missing tied head, which transformers does not save."""
        import torch
        from transformers import AutoModelForCausalLM

        base = make_llama(tmp_path / "base", tie_word_embeddings=True)

        def store_head(tensors: dict[str, Any]) -> None:
            tensors["lm_head.weight"] = torch.clone(tensors["model.embed_tokens.weight"])

        edit_tensors(base, store_head)
        _run("append: 1", tmp_path / "out", "--model", base, "--engine", "stream")
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "t")
        words = ("verify", tmp_path / "t", "--against", base)
        words = (*words, "--recipe", tmp_path / "out/interleave.json")
        assert mk(*words, "--trained").status == 0
        assert one_line(mk(*words).out, "lm_head.weight is missing")


class TestRecord:
    """interleave.json and the card record what was verified."""

    def verified(self, out: Path) -> Any:
        """Return the record of interleave.json."""
        return json.loads((out / "interleave.json").read_text()).get("verified")

    def test_at_the_end_of_a_run(self, made: Path) -> None:
        """`run` records what it compared, and with which model."""
        weights = self.verified(made)["weights"]
        assert (weights["exact"], weights["against"]) == (True, ["tiny"])
        assert "| verified | all tensors " in (made / "README.md").read_text()

    def test_not_where_nothing_was(self, tiny: Path, tmp_path: Path) -> None:
        """With --no-verify, `run` records no verification."""
        words = ("append: 1", tmp_path / "out", "--model", tiny, "--engine", "stream")
        _run(*words, "--no-verify")
        assert self.verified(tmp_path / "out") is None
        text = (tmp_path / "out/README.md").read_text()
        assert "| verified | nothing yet |" in text
        assert "`mk-interleave verify`" in text.partition("## Verification")[2].splitlines()[2]

    def test_by_verify(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """`verify` records success and failure, and its record is no difference the next time."""
        words = ("verify", stream, "--against", tiny)
        assert mk(*words, "--forward").status == 0
        assert self.verified(stream).keys() == {"weights", "forward"}
        assert mk(*words).status == 0
        assert self.verified(stream).keys() == {"weights", "forward"}
        edit_bytes(stream, "model.norm.weight", lambda data: b"\x01" + data[1:])
        before = (stream / "interleave.json").stat().st_mode
        assert mk(*words).status == 1
        assert self.verified(stream)["weights"]["exact"] is False
        assert "| verified | **failed** with 1 " in (stream / "README.md").read_text()
        assert self.verified(stream).keys() == {"weights"}
        assert (stream / "interleave.json").stat().st_mode == before

    def test_not_without_the_base(self, mk: Cli, stream: Path) -> None:
        """Without the base, `verify` keeps the fuller record of an earlier comparison."""
        before = {file: file.read_bytes() for file in stream.iterdir()}
        assert mk("verify", stream).status == 0
        assert {file: file.read_bytes() for file in stream.iterdir()} == before

    def test_never_through_a_link(self, mk: Cli, stream: Path, tiny: Path, tmp_path: Path) -> None:
        """`verify` does not write through links, such as those of the Hub's cache."""
        linked = tmp_path / "linked"
        linked.mkdir()
        for file in stream.iterdir():
            (linked / file.name).symlink_to(file)
        before = (stream / "interleave.json").read_bytes()
        assert mk("verify", linked, "--against", tiny).status == 0
        assert (linked / "interleave.json").is_symlink()
        assert (stream / "interleave.json").read_bytes() == before

    def test_not_for_another_layout_or_base(
        self, mk: Cli, stream: Path, tiny: Path, tmp_path: Path
    ) -> None:
        """`verify` records no comparison with another layout or another base."""
        (tmp_path / "asked.yml").write_text("interleave: every 2")
        other = make_llama(tmp_path / "other")
        before = {file: file.read_bytes() for file in stream.iterdir()}
        asked = ("--recipe", tmp_path / "asked.yml")
        assert mk("verify", stream, "--against", tiny, *asked).status == 1
        assert mk("verify", stream, "--against", other).status == 1
        assert {file: file.read_bytes() for file in stream.iterdir()} == before

    @pytest.mark.parametrize("nonsense", [[], {"weights": []}, {"weights": {"tools": []}}, 5])
    def test_an_invalid_record(self, nonsense: object, mk: Cli, stream: Path, tiny: Path) -> None:
        """An invalid earlier record does not make `verify` fail."""
        edit_json(stream / "interleave.json", lambda content: content.update(verified=nonsense))
        assert mk("verify", stream, "--against", tiny).status == 0

    def test_a_card_that_the_user_wrote(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """`verify` does not change a card that the user wrote."""
        (stream / "README.md").write_text("# Mine")
        assert mk("verify", stream, "--against", tiny).status == 0
        assert (stream / "README.md").read_text() == "# Mine"

    def test_where_nothing_can_be_written(
        self, mk: Cli, stream: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the record cannot be written, `verify` warns and succeeds."""

        def denied(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.mkstemp", denied)
        result = mk("verify", stream, "--against", tiny)
        assert result.status == 0
        assert one_line(result.err, "warning: ", f"{stream / 'interleave.json'}: ")


class TestCommand:
    """`verify` reports wrong arguments."""

    def test_no_such_directory(self, mk: Cli, tmp_path: Path) -> None:
        """`verify` reports a missing directory."""
        result = mk("verify", tmp_path / "none")
        assert result.status == 1
        assert one_line(result.err, f"error: {tmp_path / 'none'}: ")

    def test_a_plain_model(self, mk: Cli, tiny: Path) -> None:
        """`verify` needs a model whose layers are recorded."""
        result = mk("verify", tiny)
        assert result.status == 1
        assert one_line(result.err, f"error: {tiny}: ", "interleave.json", "mergekit_config.yml")
        assert one_line(result.err, "hint: ", "--recipe")

    def test_forward_needs_the_base(self, mk: Cli, made: Path) -> None:
        """--forward without --against gives exit code 2."""
        result = mk("verify", made, "--forward")
        assert result.status == 2
        assert one_line(result.err, "error: --forward ")
        assert one_line(result.err, "hint: ", "--against")

    @pytest.mark.parametrize(
        "content",
        ["", "[]", "{}", '{"version": 1}', '{"version": 2}', '{"version": 1, "layers": 5}', "\0"],
    )
    def test_a_broken_manifest(self, content: str, mk: Cli, stream: Path) -> None:
        """An invalid interleave.json gives one error."""
        (stream / "interleave.json").write_text(content)
        result = mk("verify", stream)
        assert (result.status, result.err.count("error:")) == (1, 1)
        assert one_line(result.err, f"error: {stream / 'interleave.json'}: ")


class TestOtherTokenizer:
    """`verify` skips only embeddings and head if mergekit made them for another tokenizer."""

    @pytest.mark.parametrize(
        ("keys", "unread"),
        [
            ("tokenizer: {source: base, pad_to_multiple_of: 128}", 2),
            ("tokenizer_source: base", 2),
            ("chat_template: chatml", 0),
        ],
    )
    def test_what_is_compared(
        self, keys: str, unread: int, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """`verify` still compares the tensors that do not depend on the tokenizer."""
        out = tmp_path / "out"
        _run(f"append: 1, {keys}", out, "--model", tiny)
        result = mk("verify", out, "--against", tiny)
        assert result.status == 0, result.out
        assert f"weights: {84 - unread} of 84 tensors " in result.out
        edit_bytes(out, "model.norm.weight", lambda data: bytes([data[0] ^ 1]) + data[1:])
        changed = mk("verify", out, "--against", tiny)
        assert changed.status == 1
        assert one_line(changed.out, "model.norm.weight differs", "[0]")

    @pytest.mark.parametrize("keys", ["tokenizer_source: base", "chat_template: chatml"])
    @pytest.mark.parametrize("gone", [True, False])
    def test_a_head_that_does_not_fit(
        self, keys: str, gone: bool, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """Embeddings and head must be stored and have the same number of rows."""
        out = tmp_path / "out"
        _run(f"append: 1, {keys}", out, "--model", tiny)

        def cut(tensors: dict[str, Any]) -> None:
            tensors["lm_head.weight"] = tensors["lm_head.weight"][:3].clone()
            if gone:
                del tensors["model.embed_tokens.weight"]

        edit_tensors(out, cut)
        result = mk("verify", out, "--against", tiny)
        assert result.status == 1
        if gone:
            assert one_line(result.out, "model.embed_tokens.weight is missing")
        elif "tokenizer" in keys:
            assert one_line(result.out, "embeddings", "head", "rows")
        else:
            assert one_line(result.out, "lm_head.weight ", "F32 [3, 32]", "F32 [64, 32]")


def test_a_wrong_base_is_named(mk: Cli, stream: Path, tiny: Path, tmp_path: Path) -> None:
    """Another model of the same type, or of another type, gives a hint with the right base."""
    make_llama(tmp_path / "other")
    zoo.save("qwen2", tmp_path / "qwen2")
    for name in ("other", "qwen2"):
        result = mk("verify", stream, "--against", tmp_path / name)
        assert result.status == 1
        assert result.err.splitlines()[-1].endswith("--against tiny")
        assert result.out.startswith("config.json: model_type is ") == (name == "qwen2")
    edit_bytes(stream, O_PROJ.format(0), lambda data: data[::-1])
    assert "hint" not in mk("verify", stream, "--against", tiny).err


def test_bases_in_another_order(mk: Cli, tiny: Path, tmp_path: Path) -> None:
    """Sources in another order than in interleave.json are put in order by the hint."""
    other, out = make_llama(tmp_path / "other"), tmp_path / "out"
    _run(f"models: {{a: {tiny}, b: {other}}}, layout: [a 0:6, b 3:8]", out)
    result = mk("verify", out, "--against", other, "--against", tiny)
    assert result.status == 1
    right = f"--against {tiny} --against {other}"
    assert result.err.splitlines()[-1].endswith(f": {right}")
    assert mk("verify", out, *right.split()).status == 0
