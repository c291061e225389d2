"""`verify`: what is as its layout says passes, and anything else is named."""

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
from harness import Cli, load_tensors, make_llama

from mergekit_interleave.checkpoint.safetensors_header import read_tensors

O_PROJ = "model.layers.{}.self_attn.o_proj.weight"


@pytest.fixture(scope="module", params=["stream", "mergekit"])
def made(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: Any) -> Path:
    """`every 4` of the tiny Llama, by each engine: new layers 4 and 9; do not change it."""
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
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def stream(tiny: Path, tmp_path: Path) -> Path:
    """The same by the stream engine alone, to be spoiled."""
    _run("interleave: every 4", tmp_path / "out", "--model", tiny, "--engine", "stream")
    return tmp_path / "out"


def edit_bytes(out: Path, name: str, edit: Callable[[bytes], bytes]) -> None:
    """Change the bytes of one tensor where it lies."""
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


def edit_json(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


class TestWhole:
    """A model as it was made."""

    def test_against_its_base(self, mk: Cli, made: Path, tiny: Path) -> None:
        """Every tensor is compared."""
        result = mk("verify", made, "--against", tiny)
        assert (result.status, result.err) == (0, "")
        assert "93 of 93 tensors compared with tiny" in result.out

    def test_against_itself(self, mk: Cli, made: Path) -> None:
        """What can be told without the base, and what cannot is said."""
        result = mk("verify", made)
        assert (result.status, result.err) == (0, "")
        assert "18 of 93 tensors" in result.out
        assert "75 not" in result.out

    def test_without_torch(self, made: Path, tiny: Path) -> None:
        """Nothing heavy is loaded where nothing was computed."""
        import subprocess

        script = (
            "import sys\nfrom mergekit_interleave.cli import main as cli\n"
            f"try: cli.main(['verify', {str(made)!r}, '--against', {str(tiny)!r}])\n"
            "except SystemExit as e: print(e.code)\n"
            "print([n for n in ('torch', 'transformers', 'mergekit') if n in sys.modules])"
        )
        said = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert said.stdout.endswith("0\n[]\n"), said.stderr

    def test_as_json(self, mk: Cli, made: Path, tiny: Path) -> None:
        """For a program."""
        said = json.loads(mk("verify", made, "--against", tiny, "--json").out)
        assert (said["exact"], said["differences"], said["against"]) == (True, [], ["tiny"])
        assert said["tensors"] == 93
        assert said["bytes"] == said["compared"]

    def test_of_what_mergekit_yaml_wrote(
        self, mk: Cli, shell: Callable[..., Any], tiny: Path, tmp_path: Path
    ) -> None:
        """There is no interleave.json: its own YAML says the layers, its config is spelled anew."""
        done = shell(
            f"mk-interleave gen 'interleave: every 4' --model {tiny} > c.yml; mergekit-yaml c.yml o"
        )
        assert done.returncode == 0, done.stderr
        for words in ((), ("--against", tiny)):
            result = mk("verify", tmp_path / "o", *words)
            assert (result.status, result.err) == (0, "")

    def test_sharded(self, mk: Cli, sharded: Path, tmp_path: Path) -> None:
        """Several shards, an index, bfloat16, tied embeddings."""
        for engine in ("stream", "mergekit"):
            out = tmp_path / engine
            _run("repeat: [1, 3]", out, "--model", sharded, "--engine", engine)
            assert mk("verify", out, "--against", sharded).status == 0
            assert mk("verify", out).status == 0


class TestWrong:
    """Each is named, and the exit code is 1, with and without the base where it can be told."""

    def wrong(self, mk: Cli, out: Path, *words: object) -> str:
        """What is said of it."""
        result = mk("verify", out, *words)
        assert result.status == 1, result.out
        return result.out + result.err

    @pytest.mark.parametrize("where", [0, 1234, -1])
    @pytest.mark.parametrize(
        "name",
        ["model.embed_tokens.weight", "model.norm.weight", "model.layers.4.mlp.up_proj.weight"],
    )
    def test_a_flipped_bit(self, name: str, where: int, mk: Cli, stream: Path, tiny: Path) -> None:
        """In any tensor, anywhere in it."""

        def flip(data: bytes) -> bytes:
            place = where % len(data)
            return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]

        edit_bytes(stream, name, flip)
        said = self.wrong(mk, stream, "--against", tiny)
        assert f"{name} differs from" in said
        assert "in 1 place" in said

    def test_every_tensor(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """A bit of each: ten are shown, all are counted, and JSON has all."""
        for name in read_tensors(stream):
            edit_bytes(stream, name, lambda data: bytes([data[0] ^ 1]) + data[1:])
        said = self.wrong(mk, stream, "--against", tiny)
        assert "and 83 more" in said
        assert "in 93 places" in said
        listed = json.loads(mk("verify", stream, "--against", tiny, "--json").out)["differences"]
        assert {entry["tensor"] for entry in listed} == read_tensors(stream).keys()
        assert listed[9]["layer"] == 0

    def test_where_it_is(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """Row and column of the first number that differs."""
        name = "model.layers.0.mlp.up_proj.weight"  # 48 rows of 32 columns of 4 bytes
        at = (7 * 32 + 5) * 4 + 2
        edit_bytes(stream, name, lambda d: d[:at] + bytes([d[at] ^ 255]) + d[at + 1 :])
        said = self.wrong(mk, stream, "--against", tiny)
        assert f"layer 0: {name} differs from the base, first at [7, 5]" in said

    @pytest.mark.parametrize("against", [True, False])
    def test_a_number_in_a_zeroed_tensor(
        self, against: bool, mk: Cli, out: Path, tiny: Path
    ) -> None:
        """The smallest there is, at the end."""
        edit_bytes(out, O_PROJ.format(4), lambda data: data[:-4] + b"\x01\0\0\0")
        said = self.wrong(mk, out, *(("--against", tiny) if against else ()))
        assert f"layer 4: {O_PROJ.format(4)} is not zero, first at [31, 31]" in said

    def test_negative_zeros_are_zeros(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """As mergekit's multiplication makes them."""
        edit_bytes(stream, O_PROJ.format(4), lambda data: b"\0\0\0\x80" * (len(data) // 4))
        assert mk("verify", stream, "--against", tiny).status == 0
        edit_bytes(stream, O_PROJ.format(4), lambda data: b"\0\x80\0\0" * (len(data) // 4))
        assert "is not zero" in self.wrong(mk, stream, "--against", tiny)

    def test_two_layers_swapped(self, mk: Cli, out: Path, tiny: Path) -> None:
        """Both are named."""

        def swap(tensors: dict[str, Any]) -> None:
            for name in [name for name in tensors if ".layers.2." in name]:
                other = name.replace(".2.", ".3.")
                tensors[name], tensors[other] = tensors[other], tensors[name]

        edit_tensors(out, swap)
        said = self.wrong(mk, out, "--against", tiny)
        assert "layer 2: " in said
        assert "layer 3: " in said
        assert "in 18 places" in said

    def test_a_copy_that_is_none(self, mk: Cli, out: Path) -> None:
        """A new layer that differs from its original is found without the base."""
        name = "model.layers.9.mlp.gate_proj.weight"
        edit_bytes(out, name, lambda data: data[:40] + b"\x01" + data[41:])
        original = "model.layers.8.mlp.gate_proj.weight"
        assert f"layer 9: {name} differs from {original}" in self.wrong(mk, out)

    @pytest.mark.parametrize("against", [True, False])
    def test_a_tensor_missing(self, against: bool, mk: Cli, out: Path, tiny: Path) -> None:
        """Of a new layer."""
        name = "model.layers.4.mlp.up_proj.weight"
        edit_tensors(out, lambda tensors: tensors.pop(name))
        said = self.wrong(mk, out, *(("--against", tiny) if against else ()))
        assert f"layer 4: {name} is missing" in said

    def test_one_too_many(self, mk: Cli, out: Path, tiny: Path) -> None:
        """In a layer, and past the last."""
        import torch

        names = ("model.layers.4.mlp.extra", "model.layers.4.self_attn.rotary_emb.strange")
        edit_tensors(out, lambda tensors: tensors.update({n: torch.zeros(2) for n in names}))
        said = self.wrong(mk, out, "--against", tiny)
        assert all(name in said for name in names)
        assert "in 2 places" in said

    def test_another_dtype_or_shape(self, mk: Cli, out: Path, tiny: Path) -> None:
        """The same numbers do not make it the same."""

        def change(tensors: dict[str, Any]) -> None:
            tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
            tensors[O_PROJ.format(0)] = tensors[O_PROJ.format(0)].reshape(16, 64)

        edit_tensors(out, change)
        said = self.wrong(mk, out, "--against", tiny)
        assert re.search(r"model\.norm\.weight .*F64 \[32\].*F32 \[32\]", said)
        assert re.search(f"{O_PROJ.format(0)} .*\\[16, 64\\].*\\[32, 32\\]", said)

    @pytest.mark.parametrize("against", [True, False])
    def test_a_truncated_shard(self, against: bool, mk: Cli, out: Path, tiny: Path) -> None:
        """The file is named."""
        os.truncate(out / "model.safetensors", (out / "model.safetensors").stat().st_size - 1)
        said = self.wrong(mk, out, *(("--against", tiny) if against else ()))
        assert "model.safetensors: cut short" in said

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
        """The key, what it is and what it must be."""
        edit_json(out / "config.json", lambda config: config.update({key: value}))
        said = self.wrong(mk, out, "--against", tiny)
        assert f"config.json: {key} is {json.dumps(value)}" in said
        if key == "num_hidden_layers":
            assert re.search(r"config\.json.* 8 .* 10\b", self.wrong(mk, out))

    def test_a_config_that_means_the_same(self, mk: Cli, out: Path, tiny: Path) -> None:
        """A key that says what its class has anyway, or who wrote it, is no difference."""

        def spell(config: dict[str, Any]) -> None:
            config.pop("attention_dropout")
            config |= {"transformers_version": "4.0.0", "_name_or_path": "somewhere"}

        edit_json(out / "config.json", spell)
        assert mk("verify", out, "--against", tiny).status == 0

    def test_no_config(self, mk: Cli, out: Path, tiny: Path) -> None:
        """It is named."""
        (out / "config.json").unlink()
        assert "config.json: is missing" in self.wrong(mk, out, "--against", tiny)

    def test_an_index_that_lies(self, mk: Cli, sharded: Path, tmp_path: Path) -> None:
        """About a tensor, or a shard."""
        out = tmp_path / "out"
        _run("append: 1", out, "--model", sharded, "--engine", "stream")
        index = out / "model.safetensors.index.json"
        before = index.read_text()
        name = "model.norm.weight"
        edit_json(index, lambda content: content["weight_map"].pop(name))
        assert f"disagree about {name}" in self.wrong(mk, out, "--against", sharded)
        index.write_text(before)
        shutil.copy(next(out.glob("*.safetensors")), out / "model-stray.safetensors")
        said = self.wrong(mk, out, "--against", sharded)
        assert "model-stray.safetensors: " in said

    def test_a_file_that_is_gone(self, mk: Cli, out: Path, tiny: Path) -> None:
        """Which the run has written."""
        (out / "tokenizer.json").unlink()
        assert "tokenizer.json: is missing" in self.wrong(mk, out, "--against", tiny)

    def test_a_manifest_that_lies(self, mk: Cli, out: Path, tiny: Path) -> None:
        """About a layer, or by its fingerprint."""
        manifest = out / "interleave.json"
        before = manifest.read_text()
        edit_json(manifest, lambda content: content["layers"][4].update(zeroed=[], new=False))
        said = self.wrong(mk, out, "--against", tiny)
        assert "interleave.json: layer 4: new is false, expected true" in said
        assert "interleave.json: layer 4: zeroed is []" in said
        manifest.write_text(before)
        edit_json(manifest, lambda content: content.update(fingerprint="0" * 16))
        assert "interleave.json: the fingerprint" in self.wrong(mk, out)
        manifest.write_text(before)
        recipe = (out / "mergekit_config.yml").read_text()
        (out / "mergekit_config.yml").write_text(recipe.replace("[3, 4]", "[2, 3]"))
        assert "mergekit_config.yml: " in self.wrong(mk, out)

    def test_null_is_not_nothing(self, mk: Cli, tmp_path: Path) -> None:
        """Where a class has a default of its own."""
        base = make_llama(tmp_path / "base", mistral=True, sliding_window=None)
        _run("append: 1", tmp_path / "out", "--model", base, "--engine", "stream")
        assert mk("verify", tmp_path / "out", "--against", base).status == 0
        edit_json(tmp_path / "out/config.json", lambda config: config.pop("sliding_window"))
        assert "sliding_window" in self.wrong(mk, tmp_path / "out", "--against", base)

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
    def test_what_a_class_would_swallow(
        self, key: str, value: object, mk: Cli, stream: Path, tiny: Path
    ) -> None:
        """Or would not load at all."""
        edit_json(stream / "config.json", lambda config: config.update({key: value}))
        assert key in self.wrong(mk, stream, "--against", tiny)

    def test_two_ways_to_load_it(self, mk: Cli, sharded: Path, tmp_path: Path) -> None:
        """Transformers would take model.safetensors, and leave the index alone."""
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
        assert "holds both model.safetensors and" in self.wrong(mk, out, "--against", sharded)

    def test_small_files(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """Those of the base; and none that loads something else."""
        (stream / "tokenizer.json").write_text("{}")
        edit_json(stream / "generation_config.json", lambda c: c.update(repetition_penalty=9.0))
        (stream / "adapter_config.json").write_text("{}")
        said = self.wrong(mk, stream, "--against", tiny)
        assert "tokenizer.json: differs" in said
        assert "generation_config.json: differs" in said
        assert "adapter_config.json: " in said

    def test_a_lora_that_was_none(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """What OUT says of itself does not decide what is compared."""

        def lie(content: dict[str, Any]) -> None:
            content["models"][0]["model"] = "tiny+none/such"

        edit_json(stream / "interleave.json", lie)
        assert "a LoRA" in self.wrong(mk, stream, "--against", tiny)

    def test_originals_that_are_called_new(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """So that --trained would not look at them."""

        def lie(content: dict[str, Any]) -> None:
            content["layers"][2]["scale"] = [{"filter": None, "value": 2.0}]

        edit_json(stream / "interleave.json", lie)
        name = "model.layers.2.mlp.up_proj.weight"
        edit_bytes(stream, name, lambda data: bytes(len(data)))
        said = self.wrong(mk, stream, "--against", tiny, "--trained")
        assert "interleave.json: the fingerprint" in said

    @pytest.mark.parametrize(
        "lie",
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
    def test_a_manifest_of_nonsense(
        self, lie: dict[str, Any], against: bool, mk: Cli, stream: Path, tiny: Path
    ) -> None:
        """One error; it is the model that is wrong, not the command."""
        edit_json(stream / "interleave.json", lambda content: content.update(lie))
        said = self.wrong(mk, stream, *(("--against", tiny) if against else ()))
        assert "unexpected" not in said

    @pytest.mark.parametrize("content", ["slices: " + "[" * 50_000, "x: [", "append: 1", ""])
    def test_a_recipe_of_nonsense(self, content: str, stream: Path, tiny: Path) -> None:
        """Deep nests, too, which end the process where libyaml composes them."""
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
                assert (done.returncode, "unexpected" in done.stderr) == (1, False), done.stderr

    def test_a_config_that_is_a_pipe(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """Is not waited for."""
        (stream / "config.json").unlink()
        os.mkfifo(stream / "config.json")
        assert "config.json" in self.wrong(mk, stream, "--against", tiny)
        assert "config.json" in self.wrong(mk, stream)

    def test_a_depth_without_end(self, mk: Cli, tmp_path: Path) -> None:
        """A class that makes a list of its layers is not asked."""
        import toys

        base, out = tmp_path / "base", tmp_path / "out"
        toys.build("qwen3").save_pretrained(base)
        _run("append: 1", out, "--model", base, "--engine", "stream")

        def deepen(config: dict[str, Any]) -> None:
            config.pop("layer_types")
            config["num_hidden_layers"] = 10**12

        edit_json(out / "config.json", deepen)
        said = self.wrong(mk, out, "--against", base)
        assert "num_hidden_layers is 1000000000000" in said
        assert "more than 10000 layers" in self.wrong(mk, out)

    def test_names_without_letters(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """Are written as what they are, and do not move the cursor."""
        import torch
        from safetensors.torch import save_file

        tensors = load_tensors(stream)
        save_file({**tensors, "a\x1b[2Jb": torch.zeros(1)}, stream / "model.safetensors")
        assert "a\\x1b[2Jb " in self.wrong(mk, stream, "--against", tiny)

    def test_another_layout(self, mk: Cli, out: Path, tiny: Path, tmp_path: Path) -> None:
        """What it must be may be stated by whoever asked for it."""
        asked = tmp_path / "asked.yml"
        asked.write_text("interleave: every 2")
        said = self.wrong(mk, out, "--against", tiny, "--recipe", asked)
        assert "layer 2: " in said
        asked.write_text("interleave: every 4")
        assert mk("verify", out, "--against", tiny, "--recipe", asked).status == 0

    def test_another_base(self, mk: Cli, out: Path, tmp_path: Path) -> None:
        """Of the same shape: not what it was made of."""
        other = make_llama(tmp_path / "other")
        said = self.wrong(mk, out, "--against", other)
        assert "differs from" in said
        assert "in 89 places" in said  # 93 less the four that are zero

    def test_a_base_of_another_depth(self, mk: Cli, out: Path, tmp_path: Path) -> None:
        """Is named."""
        other = make_llama(tmp_path / "other", layers=12)
        said = self.wrong(mk, out, "--against", other)
        assert "has 12 layers" in said


class TestComputed:
    """Weights that were scaled or converted are computed again."""

    @pytest.mark.parametrize(
        "directive",
        [
            "repeat: [2, 4], dtype: bfloat16",
            "stack: [[0, 6], [2, 8]], dtype: float16, out_dtype: float32",
        ],
    )
    def test_converted(self, directive: str, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """To the last bit."""
        out = tmp_path / "out"
        _run(directive, out, "--model", tiny)
        assert mk("verify", out, "--against", tiny).status == 0
        edit_bytes(out, "lm_head.weight", lambda data: bytes([data[0] ^ 1]) + data[1:])
        said = mk("verify", out, "--against", tiny).out
        assert "lm_head.weight differs" in said
        assert "converted to " in said

    @pytest.mark.parametrize("keys", ["", "dtype: bfloat16", "dtype: float16\nout_dtype: float32"])
    def test_scaled(self, keys: str, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """In the dtype that mergekit computes in."""
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
        assert "0.7071" in mk("verify", out, "--against", tiny).out

    def test_with_a_lora(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """What cannot be computed again is said to be so."""
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
        assert "a LoRA was merged into it" in result.out
        assert "no tensor could be compared" in result.out
        without = mk("verify", tmp_path / "out", "--against", tiny)
        assert (without.status, "a LoRA" in without.err) == (1, True)


class TestSeveralModels:
    """A stack of two."""

    @pytest.fixture
    def two(self, tmp_path: Path) -> tuple[Path, Path, Path]:
        """They, and the stack."""
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
        """In their order."""
        one, other, out = two
        assert mk("verify", out, "--against", one, "--against", other).status == 0
        assert mk("verify", out).status == 0
        said = mk("verify", out, "--against", other, "--against", one)
        assert (said.status, "differs from" in said.out) == (1, True)

    def test_one_alone(self, two: tuple[Path, Path, Path], mk: Cli) -> None:
        """The error says which they are."""
        one, _, out = two
        said = mk("verify", out, "--against", one)
        assert said.status == 2
        assert re.search(r"--against.* 2 .* 1\b", said.err)
        assert "--against one --against other" in said.err


class TestTrained:
    """After training: originals are the base's to the bit, new layers are free."""

    @pytest.fixture
    def trained(self, tiny: Path, tmp_path: Path) -> Path:
        """New layers alone were moved, by an optimizer; saved by transformers."""
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
        """The layers are those of the untrained model's interleave.json."""
        words = ("verify", trained, "--against", tiny, "--recipe", tmp_path / "out/interleave.json")
        assert mk(*words, "--trained").status == 0
        untrained = mk(*words)
        assert (untrained.status, "layer 4: " in untrained.out) == (1, True)

    def test_an_original_that_moved(
        self, mk: Cli, trained: Path, tiny: Path, tmp_path: Path
    ) -> None:
        """One bit of it is enough."""
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
        """And stored so: the same numbers in a wider dtype; one more bit is a difference."""
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
        assert "number for number (75 of them stored in a wider dtype) the base's own" in text
        assert "is F32" in mk(*words).out
        model.model.layers[0].self_attn.o_proj.weight.data[1, 2] += 2**-12
        model.save_pretrained(tmp_path / "trained")
        said = mk(*words, "--trained")
        assert said.status == 1
        assert re.search(r"layers\.0\.self_attn\.o_proj\.weight .*F32.* at \[1, 2\]", said.out)

    def test_needs_the_base(self, mk: Cli, trained: Path) -> None:
        """Originals cannot be compared with themselves."""
        result = mk("verify", trained, "--trained")
        assert (result.status, "--trained" in result.err) == (2, True)

    def test_a_part_that_states_its_dtype(self, mk: Cli, tmp_path: Path) -> None:
        """As transformers writes it into the configs of composite models."""
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
        """Of two names that are tied, one must be there."""
        out = tmp_path / "out"
        _run("append: 1", out, "--model", sharded, "--engine", "stream")
        tensors = load_tensors(out)
        for file in out.glob("*.safetensors*"):
            file.unlink()
        from safetensors.torch import save_file

        del tensors["model.embed_tokens.weight"]
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        result = mk("verify", out, "--against", sharded, "--trained")
        assert (result.status, "model.embed_tokens.weight is missing" in result.out) == (1, True)

    def test_tied_embeddings(self, mk: Cli, tmp_path: Path) -> None:
        """The head that a base has stored beside them is not saved by transformers."""
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
        assert "lm_head.weight is missing" in mk(*words).out


class TestRecord:
    """interleave.json and the card say what was verified."""

    def verified(self, out: Path) -> Any:
        """What interleave.json says."""
        return json.loads((out / "interleave.json").read_text()).get("verified")

    def test_at_the_end_of_a_run(self, made: Path) -> None:
        """What was compared, and with what."""
        weights = self.verified(made)["weights"]
        assert (weights["exact"], weights["against"]) == (True, ["tiny"])
        assert "byte for byte" in (made / "README.md").read_text()

    def test_not_where_nothing_was(self, tiny: Path, tmp_path: Path) -> None:
        """With --no-verify."""
        words = ("append: 1", tmp_path / "out", "--model", tiny, "--engine", "stream")
        _run(*words, "--no-verify")
        assert self.verified(tmp_path / "out") is None
        assert "Nothing yet: run `mk-interleave verify`" in (tmp_path / "out/README.md").read_text()

    def test_by_verify(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """A failure, too; and what it writes is no difference the next time."""
        words = ("verify", stream, "--against", tiny)
        assert mk(*words, "--forward").status == 0
        assert self.verified(stream).keys() == {"weights", "forward"}
        assert mk(*words).status == 0
        assert self.verified(stream).keys() == {"weights", "forward"}
        edit_bytes(stream, "model.norm.weight", lambda data: b"\x01" + data[1:])
        before = (stream / "interleave.json").stat().st_mode
        assert mk(*words).status == 1
        assert self.verified(stream)["weights"]["exact"] is False
        assert "**failed** with 1 difference" in (stream / "README.md").read_text()
        assert self.verified(stream).keys() == {"weights"}
        assert (stream / "interleave.json").stat().st_mode == before

    def test_not_by_a_look_at_itself(self, mk: Cli, stream: Path) -> None:
        """It would stand in the place of what says more."""
        before = {file: file.read_bytes() for file in stream.iterdir()}
        assert mk("verify", stream).status == 0
        assert {file: file.read_bytes() for file in stream.iterdir()} == before

    def test_never_through_a_link(self, mk: Cli, stream: Path, tiny: Path, tmp_path: Path) -> None:
        """The Hub's cache is made of links, and what they point to is not ours."""
        linked = tmp_path / "linked"
        linked.mkdir()
        for file in stream.iterdir():
            (linked / file.name).symlink_to(file)
        before = (stream / "interleave.json").read_bytes()
        assert mk("verify", linked, "--against", tiny).status == 0
        assert (linked / "interleave.json").is_symlink()
        assert (stream / "interleave.json").read_bytes() == before

    def test_not_what_says_nothing_of_it(
        self, mk: Cli, stream: Path, tiny: Path, tmp_path: Path
    ) -> None:
        """Another layout was asked for, or another base."""
        (tmp_path / "asked.yml").write_text("interleave: every 2")
        other = make_llama(tmp_path / "other")
        before = {file: file.read_bytes() for file in stream.iterdir()}
        asked = ("--recipe", tmp_path / "asked.yml")
        assert mk("verify", stream, "--against", tiny, *asked).status == 1
        assert mk("verify", stream, "--against", other).status == 1
        assert {file: file.read_bytes() for file in stream.iterdir()} == before

    @pytest.mark.parametrize("nonsense", [[], {"weights": []}, {"weights": {"tools": []}}, 5])
    def test_a_record_of_nonsense(
        self, nonsense: object, mk: Cli, stream: Path, tiny: Path
    ) -> None:
        """Never costs the answer."""
        edit_json(stream / "interleave.json", lambda content: content.update(verified=nonsense))
        assert mk("verify", stream, "--against", tiny).status == 0

    def test_a_card_of_ones_own(self, mk: Cli, stream: Path, tiny: Path) -> None:
        """Stays as it is."""
        (stream / "README.md").write_text("# Mine")
        assert mk("verify", stream, "--against", tiny).status == 0
        assert (stream / "README.md").read_text() == "# Mine"

    def test_where_nothing_can_be_written(
        self, mk: Cli, stream: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The answer is the same."""

        def denied(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.mkstemp", denied)
        result = mk("verify", stream, "--against", tiny)
        assert (result.status, result.err.startswith("warning: ")) == (0, True)


class TestCommand:
    """The command line."""

    def test_no_such_directory(self, mk: Cli, tmp_path: Path) -> None:
        """Is an error."""
        result = mk("verify", tmp_path / "none")
        assert (result.status, "no such directory" in result.err) == (1, True)

    def test_a_plain_model(self, mk: Cli, tiny: Path) -> None:
        """Nothing says what it is."""
        result = mk("verify", tiny)
        assert (result.status, "interleave.json" in result.err) == (1, True)

    def test_forward_needs_the_base(self, mk: Cli, made: Path) -> None:
        """It is a wrong command."""
        assert mk("verify", made, "--forward").status == 2

    @pytest.mark.parametrize(
        "content",
        ["", "[]", "{}", '{"version": 1}', '{"version": 2}', '{"version": 1, "layers": 5}', "\0"],
    )
    def test_a_broken_manifest(self, content: str, mk: Cli, stream: Path) -> None:
        """Is one error."""
        (stream / "interleave.json").write_text(content)
        result = mk("verify", stream)
        assert (result.status, result.err.count("error:")) == (1, 1)
        assert "unexpected" not in result.err


class TestOtherTokenizer:
    """mergekit makes embeddings and head anew; everything else is still compared."""

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
        """The norm before the head, for one."""
        out = tmp_path / "out"
        _run(f"append: 1, {keys}", out, "--model", tiny)
        result = mk("verify", out, "--against", tiny)
        assert result.status == 0, result.out
        assert f"{84 - unread} of 84 tensors compared" in result.out
        edit_bytes(out, "model.norm.weight", lambda data: bytes([data[0] ^ 1]) + data[1:])
        assert mk("verify", out, "--against", tiny).status == 1

    @pytest.mark.parametrize("keys", ["tokenizer_source: base", "chat_template: chatml"])
    @pytest.mark.parametrize("gone", [True, False])
    def test_a_head_that_does_not_fit(
        self, keys: str, gone: bool, mk: Cli, tiny: Path, tmp_path: Path
    ) -> None:
        """Embeddings and head have as many rows, and are there."""
        out = tmp_path / "out"
        _run(f"append: 1, {keys}", out, "--model", tiny)

        def cut(tensors: dict[str, Any]) -> None:
            tensors["lm_head.weight"] = tensors["lm_head.weight"][:3].clone()
            if gone:
                del tensors["model.embed_tokens.weight"]

        edit_tensors(out, cut)
        assert mk("verify", out, "--against", tiny).status == 1
