"""Scores of layouts of many model types, compared with the models that `run` writes."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
import zoo
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import mergekit_interleave as api
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands import inputs
from mergekit_interleave.commands.load import built, planned
from mergekit_interleave.planning.expansion_plan import ExpansionPlan
from mergekit_interleave.scanning import spaces
from mergekit_interleave.scanning.batches import Batch
from mergekit_interleave.scanning.layer_major import LayerMajor, NotLayerMajorError
from mergekit_interleave.scanning.measure import TOLERANCE, Measure, to_compare
from mergekit_interleave.scanning.sequences import ScoredTokens, default_text, of_text
from mergekit_interleave.virtual import sources

PLANS = ("repeat: 1:4", "drop: 2:4")

FAST = {
    "llama": PLANS,  # plain
    "gemma2": PLANS[:1],  # softcapped logits, a tied head, windows in every second layer
    "gpt2": ("repeat: 2:5@block",),  # learned positions
    "gemma3_text": ("stack: [[0, 3], [0, 8]]",),  # masks and positions by layer type
    "qwen3_next": PLANS[1:],  # linear attention and sparse layers
    "mamba": ("repeat: 3:4x4",),
    "mixtral": PLANS[:1],
    "gemma4_text:k_eq_v": PLANS[:1],  # packed per-layer embeddings
    "falcon_h1": ("drop: 2:4",),
}
"""Types that are measured layer by layer, one for each rule, and their layouts."""

SLOW = {
    "gemma4_text": "state changes",  # shared keys and values
    "beam": "scores of a layout",  # a layer that computes with its index
    "glm_moe_dsa": "more than a state",  # an indexer that several layers use
    "hrm_text:once": "spread over",  # two stacks
    "inkling2_text": "scores of the base",  # a head that reads the states between layers
    "mllama": "not applied to text",  # cross-attention
    "reformer": "returns a ReformerOutput",
    "rwkv": "state changes",  # a state that is halved between layers, and weights with it
    "zamba": "share their weights",
}
"""Types whose layers cannot be applied one by one, and a part of the reason."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    zoo.quiet()


def sequences(lengths: Sequence[int] = (toys.TOKENS + 5, toys.TOKENS, 17, 6)) -> Batch:
    """Return a batch of random tokens, of which some are scored."""
    random = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, 120, (length,), generator=random).tolist() for length in lengths]
    starts = (1, 30, 9, 3)
    found = (ScoredTokens(tuple(t), s, "text") for t, s in zip(tokens, starts, strict=False))
    return Batch(tuple(range(len(lengths))), tuple(found))


def scores(model: Any, batch: Batch) -> list[float]:
    """Return the score of each sequence by itself, from all logits of a model."""
    found = []
    for each in batch.sequences:
        given = torch.tensor([each.tokens])
        with torch.no_grad():
            known = model(input_ids=given).logits[0, :-1].float().log_softmax(-1)
        scored = known.gather(1, given[0, 1:, None])[each.start - 1 :]
        found.append(float(scored.double().sum()))  # a float32 near 2000 has steps of 1.2e-4
    return found


def model_of(plan: str, base: Path) -> inputs.Words:
    """Return the option that a plan needs to name its model."""
    return {} if plan.startswith("models:") else {"model": base}


def measure(base: Path, plans: Sequence[str]) -> Measure:
    """Return what `scan` measures layouts of a checkpoint with, after its check."""
    models = Models()
    found = {
        plan: planned(
            inputs.parse(inputs.Text(plan, plan), model_of(plan, base)), models, warn=lambda _: None
        )
        for plan in plans
    }
    first = found[plans[0]].first
    model = sources.load_source(first, "float32", "cpu").eval()
    shared = not first.require_family().facts.changes_weights

    def build(plan: ExpansionPlan) -> Any:
        known = {plan.first.ref: model} if shared else {}
        return built(plan, known, dtype="float32", warn=lambda _: None)

    measure = Measure(model, first.depth, found.__getitem__, build)
    measure.check(sequences(), to_compare(found))
    return measure


def assert_as_written(base: Path, measured: Measure, plans: Sequence[str], out: Path) -> None:
    """Assert that the scores of layouts are those of the models that `run` writes."""
    batch = sequences()
    np.testing.assert_allclose(
        measured.base_scores(batch)[0], scores(zoo.load(base), batch), atol=TOLERANCE, rtol=0
    )
    found = measured.scores(plans, batch)
    for row, plan in enumerate(plans):
        api.run(plan, out / str(row), **model_of(plan, base))
        written = AutoModelForCausalLM.from_pretrained(out / str(row), dtype=torch.float32)
        np.testing.assert_allclose(found[row], scores(written, batch), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FAST)
def test_layer_by_layer(name: str, tmp_path: Path) -> None:
    """A type whose layers pass on a state alone is measured layer by layer, and right."""
    base = zoo.save(name, tmp_path / "base")
    measured = measure(base, FAST[name])
    assert measured.reason is None
    assert_as_written(base, measured, FAST[name], tmp_path)


@pytest.mark.parametrize("name", SLOW)
def test_model_by_model(name: str, tmp_path: Path) -> None:
    """A type whose layers depend on more than a state is found out, and measured right."""
    base = zoo.save(name, tmp_path / "base")
    plans = ("repeat: 3:4x4",) if name != "rwkv" else ("interleave: every 2",)
    measured = measure(base, plans)
    assert SLOW[name] in str(measured.reason)
    if name in {"gemma4_text", "beam", "rwkv"}:
        assert_as_written(base, measured, plans[:1], tmp_path)


@pytest.mark.parametrize("name", ["cpmant", "doge:moe"])
def test_padding_that_changes_scores(name: str, tmp_path: Path) -> None:
    """A type that does not read from left to right alone is measured without padding."""
    base = zoo.save(name, tmp_path / "base")
    measured = measure(base, PLANS[1:])
    assert (measured.reason, measured.pads) == (None, False)
    assert_as_written(base, measured, PLANS[1:], tmp_path)


def test_a_layout_that_shows_more_than_others(tmp_path: Path) -> None:
    """If only one of the layouts shows that layers compute with their index, it is checked."""
    base = zoo.save("qwen4_exp_text", tmp_path / "base")
    plans = ("repeat: 3:4x4", "repeat: 1:2", "repeat: 7:8")
    assert "scores of a layout" in str(measure(base, plans).reason)


def _in_place(own: Any) -> Any:
    """Return a forward pass that overwrites the state that it is given, after its use."""

    def forward(layer: Any, state: Any, **keywords: Any) -> Any:
        result = own(layer, state.clone(), **keywords)
        state.zero_()
        return result

    return forward


def _with_memory(own: Any) -> Any:
    """Return a forward pass that adds what the layer before left behind."""
    seen: dict[int, Any] = {}

    def forward(layer: Any, state: Any, **keywords: Any) -> Any:
        index = layer.self_attn.layer_idx
        seen[index] = state.mean()
        return own(layer, state, **keywords) + seen.get(index - 1, 0)

    return forward


@pytest.mark.parametrize(
    ("change", "reason"),
    [(_in_place, "changes the state"), (_with_memory, "depends on more than its state")],
)
def test_layers_that_do_more_than_return(
    change: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that changes its state in place or reads what another left behind is found out."""
    kind = LlamaDecoderLayer
    monkeypatch.setattr(kind, "forward", change(kind.forward))
    assert reason in str(measure(zoo.save("llama", tmp_path / "base"), PLANS).reason)


def test_a_fault_after_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If layers cannot be applied one by one after all, models are built, and a warning says so."""
    base = zoo.save("llama", tmp_path / "base")
    measured = measure(base, PLANS)
    expected, warnings = measured.scores(PLANS[:2], sequences()), list[str]()
    measured.warn = warnings.append

    def fails(*_: Any) -> Any:
        raise NotLayerMajorError("the layers were changed")

    monkeypatch.setattr(LayerMajor, "scores", fails)
    found = measured.scores(PLANS[:2], sequences())
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    (warning,) = warnings
    assert "the layers were changed" in warning


@pytest.mark.parametrize("name", ["zamba", "gemma4:e2b"])
def test_a_layout_that_cannot_be_built(name: str, tmp_path: Path) -> None:
    """The score of a layout that `run` refuses when it builds it is no finite number."""
    base = zoo.save(name, tmp_path / "base")
    assert zoo.mk("run", "drop: 2:4", str(tmp_path / "out"), "--model", str(base))[0]
    plans = ("repeat: 3:4", "drop: 2:4")
    found = measure(base, plans).scores(plans, sequences())
    assert np.isfinite(found).tolist() == [[True] * 4, [False] * 4]


def test_edited_layers_and_two_models(tmp_path: Path) -> None:
    """Zeroed and scaled layers are measured layer by layer, and a stack of two models whole."""
    base = zoo.save("llama", tmp_path / "base")
    other = zoo.finetune(base, tmp_path / "other")
    plans = (
        "repeat: 1:4, zero: auto",
        "interleave: every 2, zero: none, scale: {o_proj: 0.5}",
        "repeat: 2:5@block, zero: none, apply_to: all, scale: {mlp: 0.7}",
        "repeat: {layers: [2, 5], as: block, damped: true}",
        f"models: {{a: {base}, b: {other}}}, layout: [a 0:5, b 3:8]",
    )
    measured = measure(base, plans)
    assert measured.reason is None
    assert_as_written(base, measured, plans, tmp_path)


def test_the_base_is_unharmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error in a forward pass, the base computes the same, also with an own forward."""
    measured = measure(zoo.save("llama", tmp_path / "base"), PLANS)
    layers = measured.base.model.layers
    before = logits(measured.base)
    own = partial(type(layers[3]).forward, layers[3])
    layers[3].forward = own
    for module in (measured.base.lm_head, layers[5].mlp):
        with monkeypatch.context() as patched:
            patched.setattr(module, "forward", _fails)
            with pytest.raises(ZeroDivisionError):
                measured.scores(PLANS[:2], sequences())
    assert [vars(layer).get("forward") for layer in layers] == [None] * 3 + [own] + [None] * 4
    assert torch.equal(logits(measured.base), before)


@pytest.mark.parametrize("name", ["gemma4_text", "glm_moe_dsa", "reformer"])
def test_the_base_is_unharmed_by_the_check(name: str, tmp_path: Path) -> None:
    """After the check finds that layers cannot be applied one by one, the base is as before."""
    base = zoo.save(name, tmp_path / "base")
    measured = measure(base, PLANS[1:])
    assert measured.reason is not None
    assert not any("forward" in vars(module) for module in measured.base.modules())
    assert torch.equal(logits(measured.base), logits(zoo.load(base)))


def logits(model: Any) -> torch.Tensor:
    """Return the logits of the text of the toys."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=toys.tokens(), use_cache=False).logits
    return found


def _fails(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError


@pytest.mark.slow
@pytest.mark.skipif("MK_INTERLEAVE_SMOLLM2" not in os.environ, reason="needs SmolLM2")
@pytest.mark.parametrize("space", spaces.SPACES)
def test_sampled_layouts_of_a_trained_model(space: str, tmp_path: Path) -> None:
    """20 layouts of each space have the scores of the models that `run` writes."""
    base = Path(os.environ["MK_INTERLEAVE_SMOLLM2"])
    sample = random.Random(space).sample(spaces.candidates([space], 30), 20)  # noqa: S311 - a test
    plans = [each.directive for each in sample]
    measured = measure(base, plans)
    assert measured.reason is None
    tokenizer = AutoTokenizer.from_pretrained(base)
    windows = of_text(tokenizer, *default_text(), most_tokens=96, length=33)
    batch = Batch((0, 1, 2), tuple(windows))
    found = measured.scores(plans, batch)
    for row, plan in enumerate(plans):
        api.run(plan, tmp_path / "grown", model=base, engine="stream", verify=False)
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float32)
        np.testing.assert_allclose(found[row], scores(written, batch), atol=TOLERANCE, rtol=0)
        shutil.rmtree(tmp_path / "grown")
