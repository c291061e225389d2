"""A layout as a picture."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import groupby

from mergekit_interleave.layout import Layer, Layout
from mergekit_interleave.reference import ModelRef

ORIGINAL, COPY, ZEROED = "original", "copy", "zeroed"


@dataclass(frozen=True)
class Run:
    """Neighbouring layers of the new model with one role, from neighbouring layers of a model.

    Ranges are half-open. The role is `original`, `zeroed` (a new layer that is an identity) or
    `copy` (any other new layer).
    """

    start: int
    stop: int
    model: ModelRef
    source: int
    role: str


def runs(layout: Layout, identities: Collection[int] = ()) -> Iterator[Run]:
    """The layers in the longest runs that read as one.

    Args:
        layout: The layers.
        identities: The indices of the new layers that pass their input on unchanged.
    """

    def role(layer: Layer) -> str:
        if not layer.new:
            return ORIGINAL
        return ZEROED if layer.index in identities else COPY

    for (model, what, shift), group in groupby(
        layout.layers, key=lambda layer: (layer.model, role(layer), layer.index - layer.source)
    ):
        layers = list(group)
        yield Run(layers[0].index, layers[-1].index + 1, model, layers[0].index - shift, what)


def layer_map(layout: Layout) -> str:
    """The new model's layers on one line: `0-3 [4] 5-8 [9]`; brackets hold the new layers."""

    def text(run: Run) -> str:
        last = run.stop - 1
        indices = str(last) if run.start == last else f"{run.start}-{last}"
        return indices if run.role == ORIGINAL else f"[{indices}]"

    return " ".join(text(run) for run in runs(layout))
