"""Any content of a file gives a valid layout or one of this project's errors.

Headers and indexes are in `test_safetensors_header.py`. `make faults` runs many more examples.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import toys
from harness import fuzz
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.checkpoint.checkpoint import config_errors
from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import InterleaveError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.output import recorded_layout
from mergekit_interleave.planning import grown_config
from mergekit_interleave.planning.expansion_plan import plan_expansion
from mergekit_interleave.planning.resolve import Expansion, resolve
from mergekit_interleave.verification import expected as expectations

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 20)
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(
        ["auto", "every 2", "after [1, 3]", "o_proj", "8:24", "full_attention", "1e999"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)

DIRECTIVES: list[dict[str, Any]] = [
    {"interleave": "every 2", "zero": ["o_proj", "down_proj"], "dtype": "bfloat16"},
    {"interleave": "after [3, 0]", "zero": "none", "scale": {"q_proj": 0.5}},
    {"repeat": {"layers": [1, 3], "times": 3, "as": "block"}, "base_model": "x"},
    {"stack": [[0, 2], [1, 4]], "zero": "auto", "tokenizer": {"source": "base"}},
    {"append": 2, "layers": 4, "out_dtype": "float16", "parameters": {"scale": 0.5}},
    {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "x", "layer_range": [0, 4]}]},
            {
                "sources": [
                    {
                        "model": "x",
                        "layer_range": [2, 3],
                        "parameters": {
                            "scale": [{"filter": "o_proj", "value": 0.0}, {"value": [1, 0.5]}],
                            "fill": [{"filter": "q_proj", "value": 1, "after": 3}],
                        },
                    }
                ]
            },
        ],
    },
    {"modules": {"text_decoder": {"models": [{"model": "x", "parameters": {"scale": 1}}]}}},
]


def places(document: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value in a document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (key,)
        if isinstance(value, dict | list):
            yield from ((key, *rest) for rest in places(value))


@st.composite
def spoiled(draw: st.DrawFn, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Draw a document in which a few values are replaced, removed or renamed."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 3))):
        found = sorted(places(document), key=repr)
        if not found:
            break
        path = draw(st.sampled_from(found))
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        match draw(st.sampled_from(["value", "gone", "name"])):
            case "value":
                holder[path[-1]] = draw(JSON)
            case "gone":
                del holder[path[-1]]
            case _ if isinstance(holder, dict):
                holder[draw(st.text(max_size=3))] = holder.pop(path[-1])
    return document


@cache
def toy(name: str) -> Path:
    """Return a toy checkpoint, which is made once."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-"), name)
    toys.build(name).save_pretrained(path)
    return path


TYPES = ("llama", "qwen3_moe", "gemma3_text", "gpt_neo", "lfm2", "deepseek_v3", "doge")


@pytest.fixture(scope="module", autouse=True)
def _clean() -> Iterator[None]:
    yield
    for name in TYPES:
        shutil.rmtree(toy(name).parent, ignore_errors=True)
    toy.cache_clear()


def expanded(words: Directive, model: Path) -> None:
    """Resolve a directive, write its recipe, and do all that `run` does before it writes."""
    models = Models()
    own = ModelRef(ModelPath(str(model)))
    if words.layers is None:
        words = words.replaced_by(Directive(model=own))
    expansion = resolve(words, models, strict=True)
    document = mergekit_yaml.to_document(expansion.layout, expansion.directive.mergekit)
    again = mergekit_yaml.from_document({"slices": document["slices"]}, lambda _: None)
    assert again.layers == expansion.layout.layers
    plan = plan_expansion(Expansion(expansion.directive, expansion.layout), models, None)
    assert len(plan.layout) == len(expansion.layout)
    json.dumps(plan.config())


class TestDirectives:
    """Directives as a user writes them."""

    @fuzz(500)
    @given(spoiled(DIRECTIVES))
    def test_documents(self, document: dict[str, Any]) -> None:
        """A directive with replaced, removed or renamed keys gives a layout or an error."""
        with suppress(InterleaveError):
            expanded(directives.from_document(document), toy("llama"))

    @fuzz(500)
    @given(
        st.sampled_from(DIRECTIVES).map(json.dumps),
        st.lists(st.tuples(st.integers(0, 400), st.text(max_size=3)), max_size=4),
    )
    def test_text(self, text: str, edits: list[tuple[int, str]]) -> None:
        """A directive with a few other letters gives a layout or an error."""
        for at, new in edits:
            text = text[:at] + new + text[at + 1 :]
        with suppress(InterleaveError):
            expanded(directives.parse(text, "x"), toy("llama"))


class TestConfigs:
    """The config.json of a checkpoint."""

    @pytest.mark.parametrize("name", TYPES)
    @fuzz(100)
    @given(st.data())
    def test_documents(self, name: str, data: st.DataObject) -> None:
        """A config.json with replaced, removed or renamed keys gives a plan or an error."""
        config = json.loads((toy(name) / "config.json").read_text())
        self.expand(name, json.dumps(data.draw(spoiled([config]))))

    @fuzz(400)
    @given(st.lists(st.tuples(st.integers(0, 900), st.binary(max_size=3)), max_size=4))
    def test_bytes(self, edits: list[tuple[int, bytes]]) -> None:
        """A config.json with a few other bytes gives a plan or an error."""
        content = (toy("llama") / "config.json").read_bytes()
        for at, new in edits:
            content = content[:at] + new + content[at + 1 :]
        self.expand("llama", content)

    def expand(self, name: str, config: str | bytes) -> None:
        """Expand the model with this config.json."""
        with tempfile.TemporaryDirectory() as folder:
            for file in toy(name).glob("*.safetensors"):
                Path(folder, file.name).symlink_to(file)
            content = config.encode() if isinstance(config, str) else config
            Path(folder, "config.json").write_bytes(content)
            with suppress(InterleaveError):
                expanded(directives.parse("interleave: every 2", "x"), Path(folder))


class TestSmallFiles:
    """Other files that may name layers or directories."""

    @pytest.mark.parametrize("name", ["generation_config.json", "quantize_config.json"])
    @fuzz(100)
    @given(
        JSON
        | st.fixed_dictionaries(
            {},
            optional={
                "assistant_early_exit": JSON,
                "dola_layers": JSON,
                "name_or_path": JSON,
                "modules_in_block_to_quantize": JSON,
                "modules_to_not_convert": JSON,
                "dynamic": JSON,
            },
        )
    )
    def test_documents(self, name: str, content: Any) -> None:
        """Any content is adapted, copied or refused."""
        models = Models()
        base = models.open(ModelRef(ModelPath(str(toy("llama")))))
        words = directives.parse("interleave: every 2", "x")
        layout = resolve(words.replaced_by(Directive(model=base.ref)), models).layout
        with suppress(InterleaveError), config_errors(base.path, name):
            grown_config.moved_file(name, json.dumps(content).encode(), base, layout)


class TestManifests:
    """The interleave.json of a result."""

    @fuzz(300)
    @given(st.data())
    def test_documents(self, data: st.DataObject) -> None:
        """An interleave.json with replaced, removed or renamed keys gives a layout or an error."""
        layer = {"model": 0, "layer": 1, "new": True, "zeroed": [], "set": {}}
        manifest = {
            "version": 1,
            "fingerprint": "0" * 16,
            "directive": {"interleave": "every 2", "dtype": "float32"},
            "models": [{"model": "llama", "layers": 8}],
            "layers": [
                {**layer, "scale": [{"filter": "o_proj", "value": 0.0}]},
                {**layer, "scale": [], "fill": [{"filter": "x", "value": 1.0, "after": 1}]},
            ],
        }
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "interleave.json")
            file.write_text(json.dumps(data.draw(spoiled([manifest]))))
            with suppress(InterleaveError):
                assert len(recorded_layout.read(Path(folder)).layout) > 0
            for name in toy("llama").iterdir():
                Path(folder, name.name).symlink_to(name)
            with suppress(InterleaveError):
                expectations.of_itself(recorded_layout.read(Path(folder)), Path(folder), Models())
