"""Layouts with means are written as linear merges of mergekit, and read back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.directive import linear
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.directive.scale import KEEP, Scale
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout, Slice

MODEL = ModelRef(ModelPath("org/model"))
AT_V1 = ModelRef(ModelPath("org/model", "v1"))
CLASSES = {MODEL: "LlamaForCausalLM"}


@st.composite
def layouts(draw: Any) -> Layout:
    """Draw a layout of one model with a mean."""
    factors = st.sampled_from([0.0, 0.5, 0.3, 3.0])
    scales = st.dictionaries(st.sampled_from(["o_proj", "mlp."]), factors).map(
        lambda found: (*(Scale(v, k) for k, v in found.items()), KEEP) if found else ()
    )
    parts = [Slice(MODEL, 0, 4)]
    for source in draw(st.lists(st.integers(0, 6), min_size=1, max_size=4)):
        mean = draw(st.sampled_from([source + 1, None]))
        parts.append(Slice(MODEL, source, source + 1, draw(scales), mean_with=mean))
    parts.append(Slice(MODEL, 1, 2, mean_with=2))
    return Layout(tuple(parts))


def read(document: Any) -> Layout:
    """Return the layout of a config."""
    return mergekit_yaml.from_document(
        {"slices": linear.as_passthrough(document)["slices"]}, lambda _: None
    )


@given(layouts())
def test_written_and_read_again(layout: Layout) -> None:
    """The linear merge of a layout has its layers, scales and means."""
    document = mergekit_yaml.to_document(layout, {"dtype": "float32"}, architectures=CLASSES)
    assert (document["merge_method"], document["dtype"]) == ("linear", "float32")
    assert read(document) == layout


@given(layouts())
def test_the_weights_add_up_to_the_scales(layout: Layout) -> None:
    """The weights of each slice sum to the scale of its layer, for every filter."""
    document: Any = mergekit_yaml.to_document(layout, {}, architectures=CLASSES)
    for part, written in zip(layout.slices, document["slices"], strict=True):
        for scale in part.scales or (KEEP,):
            weights = [
                next(
                    (
                        entry["value"]
                        for entry in source.get("parameters", {}).get("weight", [])
                        if entry.get("filter") == scale.filter
                    ),
                    1.0,
                )
                for source in written["sources"]
            ]
            assert sum(weights) == scale.value
            assert len(weights) == (1 if part.mean_with is None else 2)


def test_mergekit_gets_two_names_for_one_model() -> None:
    """The second source of a mean names its class, or else the default revision."""
    layout = Layout((Slice(MODEL, 0, 2), Slice(MODEL, 1, 2, mean_with=2), Slice(MODEL, 2, 4)))
    document: Any = mergekit_yaml.to_document(layout, {}, architectures=CLASSES)
    first, second = document["slices"][1]["sources"]
    assert first["model"] == "org/model"
    assert second["model"]["override_architecture"] == "LlamaForCausalLM"
    document = mergekit_yaml.to_document(layout, {}, architectures={})
    assert document["slices"][1]["sources"][1]["model"]["model"]["revision"] == "main"
    assert read(document) == layout
    pinned = Layout(tuple(replace(part, model=AT_V1) for part in layout.slices))
    with pytest.raises(DirectiveError, match=r"^from: "):
        mergekit_yaml.to_document(pinned, {}, architectures={})
    assert read(mergekit_yaml.to_document(pinned, {}, architectures={AT_V1: "Class"})) == pinned
    with pytest.raises(DirectiveError, match=r"^parameters: "):
        mergekit_yaml.to_document(layout, {"parameters": {"scale": 2}}, architectures=CLASSES)


@pytest.mark.parametrize(
    "change",
    [
        {"parameters": {"weight": 1}},
        {"parameters": {"weight": 2, "normalize": False}},
        {"merge_method": "passthrough"},
        {"slices": [{"sources": []}]},
        {"slices": 5},
        {"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}] * 2}]},
    ],
)
def test_other_merges_are_returned_as_they_are(change: dict[str, Any]) -> None:
    """A linear merge of another form is not taken for layers that are means."""
    document = {
        "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}],
        "merge_method": "linear",
        "parameters": {"weight": 1, "normalize": False},
        **change,
    }
    assert linear.as_passthrough(document) is document


def test_a_mean_of_two_models_is_another_merge() -> None:
    """Layers of two models, other weights and longer slices are no means of neighbours."""

    def sources(*given: tuple[str, list[int], float]) -> dict[str, Any]:
        written = [
            {"model": model, "layer_range": bounds, "parameters": {"weight": [{"value": weight}]}}
            for model, bounds, weight in given
        ]
        return {
            "slices": [{"sources": written}],
            "merge_method": "linear",
            "parameters": {"weight": 1, "normalize": False},
        }

    for given_sources in (
        (("a", [0, 1], 0.5), ("b", [1, 2], 0.5)),
        (("a", [0, 1], 0.5), ("a", [1, 2], 0.25)),
        (("a", [0, 2], 0.5), ("a", [1, 3], 0.5)),
    ):
        document = sources(*given_sources)
        assert linear.as_passthrough(document) is document
