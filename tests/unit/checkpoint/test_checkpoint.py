"""Reading a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import write_header

from mergekit_interleave.checkpoint.checkpoint import (
    Checkpoint,
    is_checkpoint,
    open_checkpoint,
)
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError


def opened(path: Path) -> Checkpoint:
    """The checkpoint of a directory."""
    return open_checkpoint(ModelRef(ModelPath(str(path))))


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
    """Which layer a tensor belongs to."""

    def test_a_layers_tensors_end_at_its_index(self, tmp_path: Path) -> None:
        """Layer 1 does not take those of layer 10."""
        header = {
            f"model.layers.{i}.x": {"dtype": "F32", "shape": [1], "data_offsets": [at, at + 4]}
            for at, i in ((0, 1), (4, 10))
        }
        write_header(tmp_path / "model.safetensors", header, b"\0" * 8)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert opened(tmp_path).layer_tensors(1) == ["model.layers.1.x"]

    def test_buffers_that_no_model_loads_are_left_out(self, tmp_path: Path) -> None:
        """Early Llama checkpoints hold rotary frequencies."""
        names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.x"]
        header = {
            name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
            for i, name in enumerate(names)
        }
        write_header(tmp_path / "model.safetensors", header, b"\0" * 8)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert opened(tmp_path).layer_tensors(0) == ["model.layers.0.x"]


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
