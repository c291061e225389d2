"""Reading a model directory."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from conftest import load_tensors

from mergekit_interleave.checkpoint import (
    Checkpoint,
    is_checkpoint,
    open_checkpoint,
    read_tensors,
)
from mergekit_interleave.errors import CheckpointError
from mergekit_interleave.reference import ModelPath, ModelRef


def opened(path: Path) -> Checkpoint:
    """The checkpoint of a directory."""
    return open_checkpoint(ModelRef(ModelPath(str(path))))


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with any header."""
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


class TestConfig:
    """config.json."""

    def test_the_depth_and_type_are_read(self, tiny: Path) -> None:
        """From the usual keys."""
        checkpoint = opened(tiny)
        assert (checkpoint.depth, checkpoint.model_type) == (8, "llama")

    @pytest.mark.parametrize(
        ("config", "depth"),
        [
            ({"n_layer": 12}, 12),
            ({"model_type": "x", "text_config": {"num_hidden_layers": 26}}, 26),
        ],
    )
    def test_other_keys_for_the_depth(
        self, tmp_path: Path, config: dict[str, object], depth: int
    ) -> None:
        """Older names, and the text part of a vision-language model."""
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert opened(tmp_path).depth == depth

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("{", "not valid JSON"),
            ("[]", "expected a JSON object"),
            ("[" * 100_000, "not valid JSON"),
            ("\xff", "not valid JSON"),
        ],
    )
    def test_a_broken_config_is_named(self, tmp_path: Path, content: str, reason: str) -> None:
        """By its path."""
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(CheckpointError, match=reason) as error:
            opened(tmp_path)
        assert "config.json" in str(error.value)

    @pytest.mark.parametrize("depth", [None, 0, -1, "32", True, 1.5])
    def test_no_layer_count_to_be_had(self, tmp_path: Path, depth: object) -> None:
        """The hint names the flag that states it."""
        (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": depth}))
        with pytest.raises(CheckpointError, match="layer") as error:
            _ = opened(tmp_path).depth
        assert "--layers" in str(error.value.hint)

    def test_what_is_no_checkpoint(self, tmp_path: Path) -> None:
        """A directory without config.json, a file, a name of nothing."""
        assert not is_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            opened(tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match="not a directory"):
            opened(tmp_path / "file")
        with pytest.raises(CheckpointError, match="no such directory"):
            opened(tmp_path / "nothing")


class TestTensors:
    """Headers and index."""

    @pytest.mark.parametrize("name", ["tiny", "sharded"])
    def test_headers_say_what_the_library_loads(
        self, name: str, request: pytest.FixtureRequest
    ) -> None:
        """Names, shapes and sizes are those of the safetensors library."""
        path = request.getfixturevalue(name)
        loaded = load_tensors(path)
        tensors = read_tensors(path)
        assert tensors.keys() == loaded.keys()
        for key, tensor in tensors.items():
            assert tensor.shape == tuple(loaded[key].shape)
            assert tensor.elements == loaded[key].numel()
            assert tensor.nbytes == loaded[key].nbytes

    def test_a_layers_tensors_end_at_its_index(self, tmp_path: Path) -> None:
        """Layer 1 does not take those of layer 10."""
        header = {
            f"model.layers.{i}.x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
            for i in (1, 10)
        }
        write_header(tmp_path / "model.safetensors", header, b"\0" * 4)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert opened(tmp_path).layer_tensors(1) == ["model.layers.1.x"]

    def test_buffers_that_no_model_loads_are_left_out(self, tmp_path: Path) -> None:
        """Early Llama checkpoints hold rotary frequencies."""
        names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.x"]
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        header = dict.fromkeys(names, entry)
        write_header(tmp_path / "model.safetensors", header, b"\0" * 4)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert opened(tmp_path).layer_tensors(0) == ["model.layers.0.x"]

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "cut short"),
            (b"version https://git-lfs.github.com/spec/v1\n", "cut short"),
            (struct.pack("<Q", 2**60) + b"{}", "cut short"),
            (struct.pack("<Q", 2) + b"{", "cut short"),
            (struct.pack("<Q", 2) + b"[]", "broken safetensors header"),
            (struct.pack("<Q", 4) + b"{{{{", "broken safetensors header"),
        ],
    )
    def test_a_broken_file_is_named(self, tmp_path: Path, content: bytes, reason: str) -> None:
        """Whatever it holds."""
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=reason) as error:
            read_tensors(tmp_path)
        assert "model.safetensors" in str(error.value)

    @pytest.mark.parametrize(
        "entry",
        [
            {},
            {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]},
            {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
            {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
            [],
        ],
    )
    def test_a_broken_entry_is_an_error(self, tmp_path: Path, entry: object) -> None:
        """Shapes and offsets must agree."""
        write_header(tmp_path / "model.safetensors", {"x": entry}, b"\0" * 8)
        with pytest.raises(CheckpointError, match="broken safetensors header"):
            read_tensors(tmp_path)

    def test_a_file_that_was_cut_short(self, own_tiny: Path) -> None:
        """Its header promises more data than there is."""
        file = own_tiny / "model.safetensors"
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="ends before its last tensor"):
            read_tensors(own_tiny)

    def test_index_and_shards_must_agree(self, sharded: Path, tmp_path: Path) -> None:
        """A tensor that only one of them has is named."""
        for file in sharded.iterdir():
            (tmp_path / file.name).symlink_to(file)
        index = tmp_path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        del content["weight_map"]["model.norm.weight"]
        index.unlink()
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"disagree about model\.norm\.weight"):
            read_tensors(tmp_path)

    @pytest.mark.parametrize(
        "shard", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x"]
    )
    def test_an_index_names_only_files_beside_it(self, tmp_path: Path, shard: str) -> None:
        """A path elsewhere is refused."""
        content = {"weight_map": {"x": shard}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="not the name of a shard"):
            read_tensors(tmp_path)

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        """By its path."""
        content = {"weight_map": {"x": "a.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"a\.safetensors: No such file"):
            read_tensors(tmp_path)

    def test_two_sets_of_weights_are_ambiguous(self, own_tiny: Path) -> None:
        """Transformers reads the one, mergekit the other."""
        content = {"weight_map": {"x": "a.safetensors"}}
        (own_tiny / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="holds both"):
            read_tensors(own_tiny)

    def test_pickles_are_not_loaded(self, tmp_path: Path) -> None:
        """Nor opened."""
        (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        with pytest.raises(CheckpointError, match="pickles are not loaded"):
            read_tensors(tmp_path)

    def test_no_weights_at_all(self, tmp_path: Path) -> None:
        """An error that says what was looked for."""
        with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
            read_tensors(tmp_path)


class TestOrigin:
    """Where a directory came from."""

    def test_the_cache_path_tells_id_and_commit(self, tmp_path: Path) -> None:
        """Of a directory in the Hub's cache."""
        commit = "0123456789abcdef0123456789abcdef01234567"
        path = tmp_path / "models--org--na.me" / "snapshots" / commit
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        assert opened(path).hub_origin == ModelPath("org/na.me", commit)
        assert opened(path.parent / "../snapshots" / commit).hub_origin is not None
