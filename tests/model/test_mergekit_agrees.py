"""mergekit reads the written references, layouts and scales as this package does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dialect
import pytest
import yaml
from hypothesis import given
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration, evaluate_setting
from random_layouts import NAMES, SCALES, WRITTEN_LAYOUTS

from mergekit_interleave.directive.model_ref import parse_model
from mergekit_interleave.directive.scale import Scale, scale_of
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout


@pytest.mark.parametrize("text", ["org/name", "org/name@v1", "./models/x/", "org/a@v1+org/b@v2"])
def test_a_reference(text: str) -> None:
    """Mergekit and this package read the same model, revision and LoRA from a string."""
    ref, loaded = parse_model(text, "model"), ModelReference.model_validate(text)
    assert (loaded.model.path, loaded.model.revision) == (ref.path, ref.model.revision)
    assert (loaded.lora and loaded.lora.path) == (ref.lora and ref.lora.path)


def test_a_path_in_the_mapping_form(tmp_path: Path) -> None:
    """Mergekit reads the mapping form of a path with + and @ as that path."""
    path = tmp_path / "a+b@c"
    path.mkdir()
    loaded = ModelReference.model_validate(parse_model(str(path), "model").to_yaml())
    assert loaded.model.path == str(path)
    assert loaded.lora is None


def test_mergekit_misreads_such_a_path_as_a_string() -> None:
    """Mergekit misreads such a path as a string; if this fails, the mapping form can go."""
    assert ModelReference.model_validate("/models/a+b").lora is not None
    assert ModelReference.model_validate("/models/a@b").model.revision == "b"


@given(WRITTEN_LAYOUTS)
def test_a_written_layout(layout: Layout) -> None:
    """MergeConfiguration reads the same models and ranges."""
    config = MergeConfiguration.model_validate(yaml.safe_load(mergekit_yaml.to_yaml(layout, {})))
    assert config.slices is not None
    for read_slice, written in zip(config.slices, layout.slices, strict=True):
        source = read_slice.sources[0]
        assert source.layer_range == (written.start, written.stop)
        assert source.model.model.path == written.model.path
        assert source.model.model.revision == written.model.model.revision
        assert (source.model.lora is None) == (written.model.lora is None)


@given(SCALES, NAMES)
def test_scales_are_evaluated_as_mergekit_does(scales: tuple[Scale, ...], name: str) -> None:
    """A tensor's scale equals the result of mergekit's own function."""
    tensor = f"model.layers.1.{name}.weight"
    conditions: Any = [ConditionalParameter(value=s.value, filter=s.filter) for s in scales]
    expected = evaluate_setting(tensor, conditions, validate=float)
    assert scale_of(tensor, scales) == expected


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("gradient", [[0, 1], [0.5, 0.25, 1.0], ["1", "2"]])
def test_a_gradient_is_resolved_layer_by_layer(length: int, gradient: list[Any]) -> None:
    """Each layer gets the number of mergekit's interpolation."""
    source = {"model": "m", "layer_range": [0, length], "parameters": {"scale": gradient}}
    edge = {"model": "m", "layer_range": [0, 2]}
    slices = [{"sources": [part]} for part in (edge, source, edge)]
    layout = mergekit_yaml.from_document({"slices": slices}, lambda _: None)
    for layer in layout.layers[2:-2]:
        t = layer.source / (length - 1) if length > 1 else 1
        expected = evaluate_setting("any", gradient, t, validate=float)
        assert scale_of("any", layer.scales) == pytest.approx(expected)


class TestDialect:
    """mergekit's own parser ignores and refuses what this project ignores and refuses."""

    def parsed(self, line: str) -> MergeConfiguration:
        """Let mergekit parse the config with a line added to it."""
        document = yaml.safe_load(dialect.BODY) | yaml.safe_load(line)
        return MergeConfiguration.model_validate(document)

    @pytest.mark.parametrize("line", [*dialect.IGNORED, *dialect.EMPTY])
    def test_ignored(self, line: str) -> None:
        """Mergekit accepts the line, and its slices stay the same."""
        assert self.parsed(line).slices == self.parsed("{}").slices

    @pytest.mark.parametrize("line", dialect.REFUSED)
    def test_refused(self, line: str) -> None:
        """Mergekit refuses the line."""
        with pytest.raises((ValueError, RuntimeError)):
            self.parsed(line)

    def test_revision(self) -> None:
        """Mergekit ignores `revision` beside `model`; when it no longer does, drop the warning."""
        source = {"model": "org/name", "revision": "v1", "layer_range": [0, 4]}
        document = {"slices": [{"sources": [source]}], "merge_method": "passthrough"}
        (part,) = MergeConfiguration.model_validate(document).slices or ()
        assert part.sources[0].model.model.revision is None
