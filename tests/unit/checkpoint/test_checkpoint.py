"""A model directory is read as a checkpoint."""

from __future__ import annotations

import json
import re
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
    """Open the checkpoint of a directory."""
    return open_checkpoint(ModelRef(ModelPath(str(path))))


class TestConfig:
    """Tests of config.json."""

    def test_the_depth_and_type_are_read(self, tiny: Path) -> None:
        """Depth and model type are read from the usual keys."""
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
        """The depth is also read from older keys, and from text_config of a multimodal model."""
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert opened(tmp_path).depth == depth

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("{", "JSON"),
            ("[]", "JSON object"),
            ("[" * 100_000, "JSON"),
            ("\xff", "JSON"),
        ],
    )
    def test_a_broken_config_is_named(self, tmp_path: Path, content: str, reason: str) -> None:
        """The error for a broken config.json names the file."""
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(CheckpointError, match=reason) as error:
            opened(tmp_path)
        assert "config.json" in str(error.value)

    @pytest.mark.parametrize("depth", [None, 0, -1, "32", True, 1.5])
    def test_a_missing_or_invalid_layer_count(self, tmp_path: Path, depth: object) -> None:
        """If the depth is unknown, the hint names --layers."""
        (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": depth}))
        with pytest.raises(CheckpointError, match="layer") as error:
            _ = opened(tmp_path).depth
        assert "--layers" in str(error.value.hint)

    def test_paths_that_are_no_checkpoint(self, tmp_path: Path) -> None:
        """A directory without config.json, a file and a missing path are no checkpoints."""
        assert not is_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            opened(tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}/file: ")) as error:
            opened(tmp_path / "file")
        assert f"--model {tmp_path}" in str(error.value.hint)
        with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}/nothing: ")) as error:
            opened(tmp_path / "nothing")
        assert "org/name" in str(error.value.hint)


class TestTensors:
    """Tests of tensor names by layer."""

    def test_tensors_of_one_layer(self, tmp_path: Path) -> None:
        """The tensors of layer 1 do not include those of layer 10."""
        header = {
            f"model.layers.{i}.x": {"dtype": "F32", "shape": [1], "data_offsets": [at, at + 4]}
            for at, i in ((0, 1), (4, 10))
        }
        write_header(tmp_path / "model.safetensors", header, b"\0" * 8)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert opened(tmp_path).layer_tensors(1) == ["model.layers.1.x"]

    def test_unused_buffers_are_left_out(self, tmp_path: Path) -> None:
        """Rotary frequencies of early Llama checkpoints are not tensors of a layer."""
        names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.x"]
        header = {
            name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
            for i, name in enumerate(names)
        }
        write_header(tmp_path / "model.safetensors", header, b"\0" * 8)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert opened(tmp_path).layer_tensors(0) == ["model.layers.0.x"]


class TestOrigin:
    """Tests of a checkpoint's origin."""

    def test_the_cache_path_gives_id_and_commit(self, tmp_path: Path) -> None:
        """The path of a snapshot in the Hub cache gives the Hub id and the commit."""
        commit = "0123456789abcdef0123456789abcdef01234567"
        path = tmp_path / "models--org--na.me" / "snapshots" / commit
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        assert opened(path).hub_origin == ModelPath("org/na.me", commit)
        assert opened(path.parent / "../snapshots" / commit).hub_origin is not None
