"""`gen --as exllamav3`: exllamav3's `layer_map` runs the layers of the layout.

exllamav3 needs a GPU. The tests expand the string by its rules, and run the layers of the loaded
base in that order.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from harness import Cli
from hypothesis import given
from hypothesis import strategies as st
from random_layouts import layouts
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import mergekit_interleave as api
from mergekit_interleave.architectures import family
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.layout.layout import Layout, joined
from mergekit_interleave.planning import exllamav3_layer_map

TEXT = torch.arange(1, 21)[None] % 60
DEPTH = 8


def expanded(line: str) -> list[int]:
    """Return the layers of a `layer_map`: indices, and ranges that include their ends."""
    layers: list[int] = []
    for item in line.split(","):
        found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", item)
        assert found is not None, item
        first, last = int(found[1]), int(found[2] or found[1])
        layers += range(first, last + 1)
    return layers


@given(layouts())
def test_a_map_expands_to_the_layers(drawn: tuple[Layout, set[int]]) -> None:
    """A map of any layout expands to its source layers, and joins consecutive ranges."""
    layout, _ = drawn
    line = exllamav3_layer_map.written(joined(layout.slices))
    assert expanded(line) == [layer.source for layer in layout.layers]
    assert len(line.split(",")) <= len(layout.slices)


@given(
    st.lists(
        st.tuples(st.integers(0, DEPTH - 1), st.integers(1, DEPTH)).filter(lambda x: x[0] < x[1]),
        min_size=1,
        max_size=5,
    )
)
def test_a_stack_is_written_or_refused(tiny: Path, ranges: list[tuple[int, int]]) -> None:
    """A stack is written if it has every layer of the base and ends with its last one."""
    layers = [layer for start, stop in ranges for layer in range(start, stop)]
    if layers == [*range(DEPTH)]:
        return
    missing = {*range(DEPTH)} - {*layers}
    words: dict[str, Any] = {
        "stack": [[*bounds] for bounds in ranges],
        "model": tiny,
        "tool": "exllamav3",
    }
    if missing or layers[-1] != DEPTH - 1:
        named = min(missing) if missing else layers[-1]
        with pytest.raises(RefusedError, match=f"layer {named}"):
            api.gen(**words)
    else:
        assert expanded(api.gen(**words).removesuffix("\n")) == layers


def logits(model: Any) -> Any:
    """Return the logits of a short text."""
    with torch.no_grad():
        return model.eval()(TEXT, use_cache=False).logits


def in_order(base: Path, layers: list[int]) -> Any:
    """Load a model and let its layers run in an order, each with its own kind."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
    config = model.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    config.num_hidden_layers = len(layers)
    return model


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gemma3_text", "smollm3", "cohere2", "qwen3_moe"]
)
@pytest.mark.parametrize(
    "directive",
    ["stack: [[0, 6], [2, 8]]", "repeat: {layers: [2, 4], times: 3, as: block}", "repeat: [6, 8]"],
)
def test_the_same_model(directive: str, name: str, mk: Cli, tmp_path: Path) -> None:
    """The base with its layers run in the order of the map computes what `run` writes."""
    base, out = zoo.save(name, tmp_path / name), tmp_path / "out"
    assert mk("run", directive, out, "--model", base, "--engine", "stream").status == 0
    written = mk("gen", directive, "--model", base, "--as", "exllamav3")
    assert (written.status, written.err) == (0, "")
    found = logits(in_order(base, expanded(written.out.strip())))
    assert torch.equal(found, logits(AutoModelForCausalLM.from_pretrained(out)))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--stack", "0:6,2:8"], "0..5,2..7"),
        (["--repeat", "2:4x2"], "0..2,2..3,3..7"),
        (["--append", "2", "--zero", "none"], "0..7,7,7"),
    ],
)
def test_one_line(words: list[str], expected: str, mk: Cli, tiny: Path) -> None:
    """The command prints the map as one line, and nothing else."""
    result = mk("gen", *words, "--model", tiny, "--as", "exllamav3")
    assert (result.status, result.out, result.err) == (0, f"{expected}\n", "")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--every", "4"], "layer 4"),
        (["--stack", "0:6,2:8", "--scale", "q_proj=0.5"], "layer 6"),
        (["repeat: [2, 4], tokenizer_source: base"], "tokenizer"),
        (["--drop", "3:5"], "layer 3"),
        (["--stack", "0:8,0:2"], "layer 1"),
    ],
)
def test_what_it_cannot_do(words: list[str], named: str, mk: Cli, tiny: Path) -> None:
    """A layout that `layer_map` cannot state, or would run wrongly, is refused with the reason."""
    result = mk("gen", *words, "--model", tiny, "--as", "exllamav3")
    assert (result.status, result.out) == (1, "")
    assert named in result.err


def test_unchecked_classes(mk: Cli, tmp_path: Path) -> None:
    """A class that was not checked in the source of exllamav3 is refused, as is an unknown one."""
    for name, named in (("nanochat", "NanoChatForCausalLM"), ("gpt2", "GPT2LMHeadModel")):
        result = mk("gen", "--repeat", "2:4", "--model", zoo.save(name, tmp_path / name),
                    "--as", "exllamav3")  # fmt: skip
        assert (result.status, result.out) == (1, "")
        assert named in result.err
    words = ("--repeat", "2:4", "--model", "org/one", "--layers", "8")
    assert "config.json" in mk("gen", *words, "--as", "exllamav3").err


def test_the_classes_are_of_known_types() -> None:
    """Each class is the class of a model type that can be grown, in the spelling of config.json."""
    types = {name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    assert {types[name] for name in exllamav3_layer_map.CLASSES} <= {*family.known_types()}
