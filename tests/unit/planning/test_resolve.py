"""A directive is resolved to a layout, its sources and warnings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import CheckpointError, InterleaveError, LayoutError
from mergekit_interleave.planning import (
    edits,
    expansion_plan,
    grown_config,
    per_layer_config,
    resolve,
)


def asked(text: str, model: Path) -> Directive:
    """Return a directive with its model."""
    directive = directives.parse(text, "x")
    return dataclasses.replace(directive, model=ModelRef(ModelPath(str(model))))


def planned(directive: Directive) -> expansion_plan.ExpansionPlan:
    """Return the plan of a directive, after deriving its config.json."""
    models = Models()
    expansion = resolve.resolve(directive, models, strict=True)
    plan = expansion_plan.plan_expansion(expansion, models, None)
    plan.config()
    return plan


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (resolve, "expand"),
        (edits, "zeroed_scales"),
        (edits, "edit_of"),
        (expansion_plan, "assemble"),
        (grown_config, "place"),
        (grown_config, "restated"),
        (per_layer_config, "_counts"),
    ],
)
def test_a_bug_is_not_blamed_on_the_config(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    """A KeyError in this project's code is not reported as a malformed config."""

    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(module, name, broken)
    text = "interleave: every 4\nzero: [o_proj, down_proj]"
    with pytest.raises(KeyError, match="a bug"):
        planned(asked(text, tiny))


@pytest.mark.parametrize(
    ("model_type", "values", "key"),
    [
        ("qwen2", {"max_window_layers": "many"}, "max_window_layers"),
        ("qwen2_moe", {"mlp_only_layers": 3}, "mlp_only_layers"),
        ("qwen2_moe", {"decoder_sparse_step": [1]}, "decoder_sparse_step"),
        ("jamba", {"attn_layer_period": 0, "attn_layer_offset": 0}, "attn_layer_period"),
        ("gemma4_text", {"num_kv_shared_layers": "all"}, "num_kv_shared_layers"),
    ],
)
def test_a_malformed_config_is_named_with_its_key(
    tmp_path: Path, model_type: str, values: dict[str, Any], key: str
) -> None:
    """A config value of the wrong type is a CheckpointError that names file and key."""
    stated = {"model_type": model_type, "num_hidden_layers": 8, **values}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    base = Models().open(ModelRef(ModelPath(str(tmp_path))))
    layout = resolve.resolve(asked("interleave: every 4\nzero: none", tmp_path), Models()).layout
    with pytest.raises(CheckpointError) as raised:
        grown_config.grow({base.ref: base}, layout, only_stated=True)
    assert str(tmp_path / "config.json") in str(raised.value)
    assert key in str(raised.value)


def test_models_are_not_changed(tiny: Path) -> None:
    """Resolving a directive with a stated depth does not change the models."""
    models = Models()
    stated = dataclasses.replace(asked("interleave: every 4", tiny), layers=8)
    expansion = resolve.resolve(stated, models)
    assert not models.cached_only
    assert [*expansion.sources] == [*expansion.layout.models]


def test_warnings_are_values(tmp_path: Path) -> None:
    """A model that cannot be checked gives warnings in the expansion, without repetition."""
    missing = dataclasses.replace(asked("interleave: every 4", tmp_path / "none"), layers=8)
    expansion = resolve.resolve(missing, Models())
    assert not expansion.sources
    assert any(str(tmp_path / "none") in warning for warning in expansion.warnings)
    assert len(expansion.warnings) == len(set(expansion.warnings))


def test_an_error_keeps_the_warnings_before_it(tmp_path: Path) -> None:
    """An error has the earlier warnings in its `warnings`."""
    missing = dataclasses.replace(asked("repeat: 6:12", tmp_path / "none"), layers=8)
    with pytest.raises(LayoutError) as raised:
        resolve.resolve(missing, Models())
    assert any(str(tmp_path / "none") in warning for warning in raised.value.warnings)
    assert not InterleaveError("x").warnings
