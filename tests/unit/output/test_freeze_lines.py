"""The lines of plain PyTorch on a model card."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mergekit_interleave.architectures.family import Family, family_of
from mergekit_interleave.output.freeze_lines import freeze_lines

LLAMA = family_of("llama")
assert LLAMA is not None


class Named:
    """Stands for a model that consists of names only."""

    def __init__(self, *names: str) -> None:
        self.trains = dict.fromkeys(names, True)

    def named_parameters(self) -> Any:
        """Yield each name with an object that records `requires_grad_`."""
        for name in self.trains:
            record = type("Parameter", (), {})()
            record.requires_grad_ = lambda value, name=name: self.trains.update({name: value})
            yield name, record


@pytest.mark.parametrize(
    ("family", "wanted", "others"),
    [
        (
            LLAMA,
            ["model.layers.4.mlp.weight", "layers.30.mlp.experts.3.weight"],
            ["model.layers.40.mlp.weight", "model.layers.3.mlp.experts.4.weight", "norm.weight"],
        ),
        (replace(LLAMA, layer_prefix="transformer.h"), ["h.4.attn.bias"], ["transformer.wte.4.x"]),
        (
            replace(LLAMA, composite=True),
            ["model.language_model.layers.4.w", "language_model.model.layers.30.w"],
            ["model.vision_tower.layers.4.w", "vision_model.layers.4.w"],
        ),
    ],
    ids=["llama", "gpt2", "composite"],
)
def test_they_train_the_layers(family: Family, wanted: list[str], others: list[str]) -> None:
    """They select layers by their whole index, and no layers of a tower or experts."""
    model = Named(*wanted, *others)
    exec(freeze_lines([4, 30], family) or "", {"model": model})  # noqa: S102 - what users run
    assert [name for name, trains in model.trains.items() if trains] == wanted


def test_many_layers_fit_on_the_page() -> None:
    """The lines stay short however many layers there are."""
    lines = (freeze_lines(range(500), LLAMA) or "").splitlines()
    assert max(map(len, lines)) <= 88


@pytest.mark.parametrize(
    "family", [None, family_of("xlnet"), replace(LLAMA, parallel_prefixes={"model.more": 0})]
)
def test_types_whose_names_are_not_known(family: Family | None) -> None:
    """An unknown, refused or divided type gets no lines."""
    assert freeze_lines([4], family) is None
