"""The layer map."""

from __future__ import annotations

from mergekit_interleave import draw
from mergekit_interleave.growth import Every, Repeat
from mergekit_interleave.layout import Edit, Layout, Slice, expand
from mergekit_interleave.reference import ModelPath, ModelRef
from mergekit_interleave.scaling import zeroed_scales

MODEL = ModelRef(ModelPath("org/model"))


def test_brackets_hold_the_new_layers() -> None:
    """Indices are those of the new model."""
    layout = expand(Every(4), MODEL, 10, lambda _: Edit(zeroed_scales(["o_proj"])))
    assert draw.layer_map(layout) == "0-3 [4] 5-8 [9] 10-11"


def test_runs_say_where_each_layer_comes_from() -> None:
    """Neighbours that read as one stand together."""
    runs = list(draw.runs(expand(Repeat((1, 3)), MODEL, 4)))
    assert [(r.start, r.stop, r.source, r.role) for r in runs] == [
        (0, 2, 0, "original"),
        (2, 3, 1, "copy"),
        (3, 4, 2, "original"),
        (4, 5, 2, "copy"),
        (5, 6, 3, "original"),
    ]


def test_another_model_starts_another_run() -> None:
    """Even where the indices go on."""
    other = ModelRef(ModelPath("org/other"))
    runs = list(draw.runs(Layout((Slice(MODEL, 0, 2), Slice(other, 2, 4)))))
    assert [run.model for run in runs] == [MODEL, other]
