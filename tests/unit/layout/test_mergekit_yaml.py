"""A layout is written as mergekit's YAML and read back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from random_layouts import MODEL, WRITTEN_LAYOUTS

from mergekit_interleave._limits import MAX_LAYERS
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.directive.scale import Scale, scale_of, zeroed_scales
from mergekit_interleave.errors import InterleaveError, RefusedError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Constant, Layout, Slice


def read(text: str) -> Layout:
    """Read a layout from YAML text, without any depth."""
    return mergekit_yaml.from_document({"slices": yaml.safe_load(text)["slices"]}, lambda _: None)


class TestBothWays:
    """Tests that a layout is the same in YAML."""

    @given(WRITTEN_LAYOUTS)
    def test_yaml_and_back_is_the_same_layout(self, layout: Layout) -> None:
        """Models, ranges, scales and slice boundaries are the same when plain PyYAML reads them."""
        assert read(mergekit_yaml.to_yaml(layout, {})) == layout


class TestWriting:
    """Tests that the text has the published form."""

    def test_a_zeroed_slice_has_the_published_shape(self) -> None:
        """Filters come first, everything else has scale 1.0, and a range is on one line."""
        layout = Layout((Slice(MODEL, 3, 4, zeroed_scales(["o_proj", "down_proj"])),))
        assert mergekit_yaml.to_yaml(layout, {"dtype": "bfloat16"}) == (
            "slices:\n"
            "- sources:\n"
            "  - model: org/model\n"
            "    layer_range: [3, 4]\n"
            "    parameters:\n"
            "      scale:\n"
            "      - filter: o_proj\n"
            "        value: 0.0\n"
            "      - filter: down_proj\n"
            "        value: 0.0\n"
            "      - value: 1.0\n"
            "merge_method: passthrough\n"
            "dtype: bfloat16\n"
        )

    def test_models_are_renamed_wherever_they_are_named(self) -> None:
        """Models are renamed in slices, base_model and the tokenizer's settings."""
        keys = {
            "base_model": "org/model",
            "tokenizer": {
                "source": "org/model",
                "tokens": {
                    "<a>": {"source": "org/model"},
                    "<b>": {"source": {"kind": "model_token", "model": "org/model", "token": "c"}},
                    "<c>": {"source": {"kind": "zero"}},
                },
            },
        }
        document = mergekit_yaml.to_document(
            Layout((Slice(MODEL, 0, 1),)), keys, lambda _: "renamed"
        )
        assert "org/model" not in str(document)
        assert document["tokenizer"] == {
            "source": "renamed",
            "tokens": {
                "<a>": {"source": "renamed"},
                "<b>": {"source": {"kind": "model_token", "model": "renamed", "token": "c"}},
                "<c>": {"source": {"kind": "zero"}},
            },
        }


KEYS = [
    ({"tokenizer": "banana"}, "tokenizer: .*'banana'"),
    ({"tokenizer": {"sorce": "union"}}, "tokenizer: .*'sorce'"),
    ({"tokenizer": {"tokens": {"<a>": {"source": 3}}}}, r"tokenizer\.tokens: .*3$"),
    ({"tokenizer": {"source": "union"}, "tokenizer_source": "base"}, "tokenizer, tokenizer_source"),
    ({"tokenizer": {"pad_to_multiple_of": "banana"}}, "tokenizer.pad_to_multiple_of: .*'banana'"),
    (
        {"tokenizer": {"tokens": {"<a>": {"source": {"kind": "nope"}}}}},
        "kind: .*`zero` or `model_token`",
    ),
    ({"tokenizer_source": 3}, "tokenizer_source: .*3$"),
    ({"parameters": "banana"}, "parameters: .*'banana'"),
    ({"parameters": {"scal": 1}}, "parameters: .*'scal'"),
    ({"parameters": {"scale": [1, 2]}}, "parameters.scale: .*gradient"),
    ({"chat_template": {"a": 1}}, "chat_template: .*`auto`"),
    ({"base_model": 3}, "base_model: .*3$"),
]


@pytest.mark.parametrize(("keys", "reason"), KEYS, ids=[str(keys) for keys, _ in KEYS])
def test_invalid_mergekit_keys(keys: dict[str, Any], reason: str) -> None:
    """A key that mergekit would refuse or ignore is refused and named."""
    with pytest.raises(InterleaveError, match=reason):
        mergekit_yaml.check_keys_of_mergekit(keys)


def test_constants_are_written_and_read() -> None:
    """A constant is written with a comment, read back, and not accepted as mergekit YAML."""
    constants = (Constant(1.0, "layer_scalar"), Constant(200.0, "hc_base", square=4))
    layout = Layout((Slice(MODEL, 0, 4), Slice(MODEL, 3, 4, zeroed_scales(["x"]), constants)))
    text = mergekit_yaml.to_yaml(layout, {})
    assert re.match("# .*mergekit.*layer_scalar", text)
    assert read(text) == layout
    with pytest.raises(RefusedError, match="layer_scalar"):
        mergekit_yaml.check_representable(layout)


class TestReading:
    """Tests that mergekit's notations are read as mergekit reads them."""

    def test_a_gradient_in_the_first_or_last_slice(self) -> None:
        """A gradient in the first or last slice is refused, because it scales other tensors too."""
        plain = {"model": "m", "layer_range": [0, 2]}
        scaled = {"model": "m", "layer_range": [1, 2], "parameters": {"scale": [0.5, 1]}}
        for order in ([plain, scaled], [scaled, plain]):
            with pytest.raises(InterleaveError, match=r"parameters\.scale: .*first or last slice"):
                mergekit_yaml.from_document(
                    {"slices": [{"sources": [part]} for part in order]}, lambda _: None
                )

    def test_one_directory_is_one_model(self, tmp_path: Path) -> None:
        """Two spellings of a path are one model, so the second occurrence is a new layer."""
        names = [str(tmp_path), f"{tmp_path}/"]
        slices = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in names]
        layout = mergekit_yaml.from_document({"slices": slices}, lambda _: None)
        assert [layer.new for layer in layout.layers] == [False, True]

    def test_top_level_scales_come_last(self) -> None:
        """Top-level scales apply to every tensor that no other scale matches."""
        layout = Layout((Slice(MODEL, 0, 1, (Scale(2.0, "a"),)), Slice(MODEL, 0, 1)))
        scaled = mergekit_yaml.effective(
            layout, {"parameters": {"scale": {"filter": "b", "value": 3}}}
        )
        assert [scale_of(n, scaled.slices[0].scales) for n in "abc"] == [2, 3, None]
        assert [layer.new for layer in scaled.layers] == [False, True]
        assert mergekit_yaml.effective(layout, {}) == layout

    def test_source_settings_come_before_those_of_slice_and_module(self) -> None:
        """The settings of slice and module apply if those of the source do not match."""
        source = {
            "model": "m",
            "layer_range": [0, 1],
            "parameters": {"scale": {"filter": "a", "value": 2}},
        }
        entry = {
            "sources": [source],
            "parameters": {"scale": [{"filter": "b", "value": 3}, {"filter": "a", "value": 9}]},
        }
        module = {"slices": [entry], "parameters": {"scale": 4}}
        layout = mergekit_yaml.from_document({"modules": {"text": module}}, lambda _: None)
        found = layout.slices[0].scales
        assert [scale_of(name, found) for name in "abc"] == [2, 3, 4]

    def test_a_star_filter_matches_everything(self) -> None:
        """The filter `*` matches every tensor."""
        setting = [{"filter": "*", "value": 2}]
        source = {"model": "m", "layer_range": [0, 1], "parameters": {"scale": setting}}
        layout = mergekit_yaml.from_document({"slices": [{"sources": [source]}]}, lambda _: None)
        assert layout.slices[0].scales == (Scale(2.0),)

    def test_models_is_one_model_whole(self) -> None:
        """`models:` with passthrough takes every layer of one model."""
        layout = mergekit_yaml.from_document({"models": [{"model": "m"}]}, lambda _: 5)
        assert layout.slices == (Slice(ModelRef(ModelPath("m")), 0, 5),)

    @pytest.mark.parametrize("bounds", [["0", "5"], [0.0, 5.0]])
    def test_a_range_in_other_types(self, bounds: list[Any]) -> None:
        """Bounds that mergekit converts to whole numbers are accepted."""
        source = {"model": "m", "layer_range": bounds}
        layout = mergekit_yaml.from_document({"slices": [{"sources": [source]}]}, lambda _: None)
        assert layout.slices == (Slice(ModelRef(ModelPath("m")), 0, 5),)

    @pytest.mark.parametrize(
        ("document", "reason"),
        [
            ({"slices": []}, r"^slices: .*\[\]"),
            ({"slices": ["x"]}, r"slices\[0\]: .*'x'"),
            ({"slices": [{"sources": []}]}, r"slices\[0\]\.sources: .*\[\]"),
            ({"slices": [{"sources": [{}, {}]}]}, r"slices\[0\]\.sources: .*one source.*\b2"),
            ({"slices": [{"sources": [{"layer_range": [0, 1]}]}]}, r"sources\[0\]\.model: "),
            (
                {"slices": [{"sources": [{"model": "m"}]}]},
                r"sources\[0\]\.layer_range: .*\[START, STOP\]",
            ),
            (
                {"slices": [{"sources": [{"model": "m", "layer_range": [4, 4]}]}]},
                r"layer_range: .*\[4, 4\]",
            ),
            (
                {"slices": [{"sources": [{"model": "m", "layer_range": [-1, 4]}]}]},
                r"layer_range: .*\[-1, 4\]",
            ),
            (
                {"slices": [{"sources": [{"model": "m", "layer_range": [0, 10**9]}]}]},
                str(MAX_LAYERS),
            ),
            ({"models": [{"model": "m"}, {"model": "n"}]}, r"models: .*one source.*\b2"),
            ({"models": [{"model": "m"}]}, r"layers of m\b"),
            ({"modules": {"a": {}, "b": {}}}, r"modules.b\b.* a\b"),
            ({"slices": [{"source": []}]}, r"slices\[0\]: .*'source'"),
            (
                {"slices": [{"sources": [{"model": "m", "layer_range": [0, 1], "paramters": {}}]}]},
                r"sources\[0\]: .*'paramters'",
            ),
            (
                {
                    "slices": [
                        {
                            "sources": [
                                {"model": "m", "layer_range": [0, 1], "parameters": {"scal": 0}}
                            ]
                        }
                    ]
                },
                "parameters: .*'scal'",
            ),
            (
                {
                    "slices": [
                        {
                            "sources": [
                                {
                                    "model": "m",
                                    "layer_range": [0, 1],
                                    "parameters": {"scale": [{"filtr": "a", "value": 0}]},
                                }
                            ]
                        }
                    ]
                },
                r"parameters\.scale\[0\]: .*'filtr'",
            ),
        ],
    )
    def test_invalid_documents(self, document: Any, reason: str) -> None:
        """The error names the place in the document."""
        with pytest.raises(InterleaveError, match=reason):
            mergekit_yaml.from_document(document, lambda _: None)

    @pytest.mark.parametrize("value", ["banana", None, True, {"value": []}, [{"value": "x"}]])
    def test_a_scale_that_is_no_number_is_an_error(self, value: Any) -> None:
        """The error for an invalid scale names its path."""
        parameters = {"scale": value} if value is not None else {"scale": {"value": None}}
        source = {"model": "m", "layer_range": [0, 1], "parameters": parameters}
        with pytest.raises(InterleaveError, match=r"parameters\.scale[^ ]*: .*number"):
            mergekit_yaml.from_document({"slices": [{"sources": [source]}]}, lambda _: None)
