"""config.json is derived for the new depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_interleave.checkpoint.checkpoint import open_checkpoint
from mergekit_interleave.directive.directive import parse
from mergekit_interleave.directive.growth import Append
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.layout.layout import expand
from mergekit_interleave.planning.grown_config import deepened, grow, moved_file, restated
from mergekit_interleave.planning.per_layer_config import Placement


def config_of(directive: str, path: Path, **config: Any) -> dict[str, Any]:
    """Return the config after growth of a model with 8 layers, or with the depth in its config."""
    path.mkdir(exist_ok=True)
    content = {"model_type": "llama", "num_hidden_layers": 8, **config}
    (path / "config.json").write_text(json.dumps(content))
    base = open_checkpoint(ModelRef(ModelPath(str(path))))
    growth = parse(directive, "x").growth
    assert growth is not None
    layout = expand(growth, base.ref, base.depth)
    return deepened(base, layout, grow({base.ref: base}, layout).placement)


def test_only_the_depth_changes(tmp_path: Path) -> None:
    """Unknown keys are kept in their order."""
    result = config_of("append: 2", tmp_path, strange=[1], torch_dtype="float32")
    expected = {
        "model_type": "llama",
        "num_hidden_layers": 10,
        "strange": [1],
        "torch_dtype": "float32",
    }
    assert list(result.items()) == list(expected.items())


def test_the_dtype_keeps_its_key(tmp_path: Path) -> None:
    """The dtype keeps its key: `dtype` of transformers 5, or the older `torch_dtype`."""
    for config, key in (({"dtype": "float32"}, "dtype"), ({}, "torch_dtype")):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "llama", "num_hidden_layers": 4, **config})
        )
        base = open_checkpoint(ModelRef(ModelPath(str(tmp_path))))
        layout = expand(Append(1), base.ref, 4)
        assert restated(deepened(base, layout, Placement()), dtype="float16")[key] == "float16"


def test_a_local_path_is_removed(tmp_path: Path) -> None:
    """A local path in `_name_or_path` is removed, and a Hub id is kept."""
    assert "_name_or_path" not in config_of("append: 1", tmp_path, _name_or_path="/home/me/llama")
    kept = config_of("append: 1", tmp_path, _name_or_path="org/name")
    assert kept["_name_or_path"] == "org/name"


class TestLayersThatDiffer:
    """Per-layer settings follow their layers to the new indices."""

    def test_lists_with_an_entry_for_each_layer(self, tmp_path: Path) -> None:
        """A copy has its source's entry, and entries beyond the depth are removed."""
        types = ["a", "b", "c", "d", "mtp"]
        config = {"model_type": "gemma2", "num_hidden_layers": 4, "layer_types": types}
        result = config_of("interleave: every 2", tmp_path, **config)
        assert result["layer_types"] == ["a", "b", "b", "c", "d", "d"]

    def test_a_list_that_is_too_short(self, tmp_path: Path) -> None:
        """A list that is too short is refused and named."""
        config = {"model_type": "gemma2", "num_hidden_layers": 4, "layer_types": ["a"]}
        with pytest.raises(RefusedError, match=r"layer_types .*\b1\b.*\b4 layers"):
            config_of("append: 1", tmp_path, **config)

    def test_a_list_that_transformers_computes(self, tmp_path: Path) -> None:
        """A computed list is written out, because it would be computed for the new depth."""
        config = {"model_type": "gemma2", "num_hidden_layers": 4}
        result = config_of("append: 1", tmp_path, **config)
        kinds = ["sliding_attention", "full_attention"] * 2
        assert result["layer_types"] == [*kinds, kinds[-1]]

    def test_a_pattern_that_is_repeated(self, tmp_path: Path) -> None:
        """A repeated pattern is written out at full length."""
        config = {"model_type": "recurrent_gemma", "num_hidden_layers": 5}
        result = config_of("append: 1", tmp_path, block_types=["r", "r", "a"], **config)
        assert result["block_types"] == ["r", "r", "a", "r", "r", "r"]

    def test_indices_of_layers(self, tmp_path: Path) -> None:
        """Layer indices become those of the layers and their copies."""
        config = {"model_type": "bamba", "attn_layer_indices": [1, 2]}
        result = config_of("repeat: [1, 2]", tmp_path, **config)
        assert result["attn_layer_indices"] == [1, 2, 3]

    def test_a_count_of_first_layers(self, tmp_path: Path) -> None:
        """The count of first layers includes their copies, or the layout is refused."""
        config = {"model_type": "deepseek_v2", "first_k_dense_replace": 2}
        result = config_of("interleave: every 2", tmp_path, **config)
        assert result["first_k_dense_replace"] == 3
        with pytest.raises(RefusedError, match="first_k_dense_replace"):
            config_of("stack: [[0, 8], [1, 8]]", tmp_path, **config)

    def test_dense_layers_among_experts(self, tmp_path: Path) -> None:
        """A sparse step becomes a list of every dense layer."""
        config = {"model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [3]}
        result = config_of("repeat: [1, 2]", tmp_path, **config)
        assert result["decoder_sparse_step"] == 1
        assert result["mlp_only_layers"] == [0, 3, 4, 5, 7]

    def test_a_scale_over_the_root_of_the_depth(self, tmp_path: Path) -> None:
        """The scale grows with the depth, so that the factor of each layer stays the same."""
        config = {"model_type": "minicpm3", "num_hidden_layers": 4, "scale_depth": 1.0}
        result = config_of("append: 12", tmp_path, **config)
        assert result["scale_depth"] == pytest.approx(2.0)

    def test_other_names_for_the_depth(self, tmp_path: Path) -> None:
        """The depth is written under the key of the model type."""
        path = tmp_path / "x"
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 4}')
        base = open_checkpoint(ModelRef(ModelPath(str(path))))
        layout = expand(Append(1), base.ref, 4)
        result = deepened(base, layout, grow({base.ref: base}, layout).placement)
        assert result == {"model_type": "gpt2", "n_layer": 5}


def test_other_files_with_layer_settings(tmp_path: Path) -> None:
    """Layer counts and module names in other files follow their layers."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 4}')
    base = open_checkpoint(ModelRef(ModelPath(str(tmp_path))))
    growth = parse("interleave: every 2", "x").growth
    assert growth is not None
    layout = expand(growth, base.ref, 4)

    def moved(name: str, content: object) -> object:
        return json.loads(moved_file(name, json.dumps(content).encode(), base, layout))

    generation = {"assistant_early_exit": 2, "dola_layers": [0, 4], "top_p": 0.5}
    assert moved("generation_config.json", generation) == {
        "assistant_early_exit": 3,
        "dola_layers": [0, 6],
        "top_p": 0.5,
    }
    left = {"modules_to_not_convert": ["model.layers.1.mlp"]}
    assert moved("quantize_config.json", left) == {
        "modules_to_not_convert": ["model.layers.1.mlp", "model.layers.2.mlp"]
    }
    assert moved_file("LICENSE", b"{1", base, layout) == b"{1"
    assert moved_file("generation_config.json", b"{1", base, layout) == b"{1"
