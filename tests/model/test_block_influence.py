"""`block_influence`: how much each layer turns the states that pass it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM

from mergekit_interleave.scanning.batches import batches
from mergekit_interleave.scanning.block_influence import block_influence
from mergekit_interleave.scanning.layer_major import NotLayerMajorError
from mergekit_interleave.scanning.sequences import ScoredTokens

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
SEQUENCES = [ScoredTokens(tuple(range(3, 3 + count)), 1, "text") for count in (9, 20, 14)]


@pytest.fixture
def model(tiny: Path) -> Any:
    """Return a Llama of 8 layers."""
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.mark.parametrize("most_tokens", [20, 40, 1000])
def test_it_is_that_of_the_hidden_states(model: Any, most_tokens: int) -> None:
    """Batches and padding change nothing: it is 1 minus the mean cosine over all tokens."""
    found = block_influence(model, 8, batches(SEQUENCES, most_tokens))
    model.model.norm = torch.nn.Identity()  # it is applied to the last of `hidden_states`
    cosines = []
    for each in SEQUENCES:
        with torch.no_grad():
            states = model(torch.tensor([each.tokens]), output_hidden_states=True).hidden_states
        stacked = torch.stack(states)[:, 0].double()
        cosines.append(torch.cosine_similarity(stacked[:-1], stacked[1:], dim=-1))
    expected = 1 - torch.cat(cosines, dim=1).mean(dim=1)
    assert len(found) == 8
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    assert min(found) > 1e-3


def test_layers_may_overwrite_their_input(model: Any) -> None:
    """The state before a layer is that which it was given: a layer that turns it round has 2."""
    layer = model.model.layers[3]
    layer.forward = lambda state, **_: state.neg_()
    assert block_influence(model, 8, batches(SEQUENCES, 100))[3] == 2


def test_the_model_stays_as_it_was(model: Any) -> None:
    """No hook is left in the model, after an error either."""
    expected = block_influence(model, 8, batches(SEQUENCES, 100))
    with pytest.raises(IndexError):
        block_influence(model, 8, batches([ScoredTokens((3, 64), 1, "text")], 100))
    hooks = [getattr(layer, name) for layer in model.model.layers for name in HOOKS]
    assert not any(hooks)
    assert block_influence(model, 8, batches(SEQUENCES, 100)) == expected


@pytest.mark.parametrize("name", ["openai-gpt", "gpt2", "gemma3_text", "mixtral", "llava"])
def test_other_types(name: str) -> None:
    """Layers that return a tuple or a list, and those of a composite model, are measured, too."""
    model = zoo.build(name)
    depth = model.config.get_text_config().num_hidden_layers
    found = block_influence(model, depth, batches(SEQUENCES[:1], 100))
    assert len(found) == depth
    assert min(found) > 0


@pytest.mark.parametrize("name", ["gemma3n_text", "xlnet"])
def test_states_of_another_shape(name: str) -> None:
    """A type whose states are not one vector for each token has no Block Influence."""
    with pytest.raises(NotLayerMajorError, match="shape"):
        block_influence(zoo.build(name), 8, batches(SEQUENCES, 100))


def test_a_layer_that_is_skipped_has_none(model: Any) -> None:
    """Where a layer is not applied once per pass, there is no Block Influence."""
    forward = model.model.layers[2].forward
    layer = model.model.layers[3]
    model.model.layers[2].forward = lambda state, **how: layer(forward(state, **how), **how)
    with pytest.raises(NotLayerMajorError, match="layer 3"):
        block_influence(model, 8, batches(SEQUENCES, 100))
