"""Test `explain`: it writes the shortest directive that expands to the same slices."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import published
import pytest
import yaml
import zoo
from harness import Cli, fuzz, make_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.commands.explain import explain
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive.growth import After, Append, Every, Growth, Repeat, Spread
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import InterleaveError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import expand
from mergekit_interleave.planning.resolve import Expansion, resolve

ZERO = [
    {"filter": "o_proj", "value": 0.0},
    {"filter": "down_proj", "value": 0.0},
    {"value": 1.0},
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def explained(document: dict[str, Any] | str) -> str:
    """Return the directive of a mergekit config."""
    text = document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
    return str(explain("-", io.StringIO(text)))  # yaml's C loader needs exactly a str


def generated(text: str) -> Expansion:
    """Resolve a directive as `gen` does."""
    return resolve(directives.parse(text, "x"), Models(cached_only=True))


def slices(document: dict[str, Any]) -> list[Any]:
    """Return the slices of a mergekit config as YAML has them."""
    sources = [part["sources"][0] for part in document["slices"]]
    return [
        (source["model"], source["layer_range"], source.get("parameters", {}).get("scale"))
        for source in sources
    ]


def spelled(*parts: Any, **keys: Any) -> dict[str, Any]:
    """Create a mergekit config of `(start, stop)` or `(model, start, stop, scale)`."""
    whole = [("org/m", *part) if isinstance(part[0], int) else part for part in parts]
    merge = {
        "models": list(dict.fromkeys(part[0] for part in whole)),
        "dtype": None,
    }
    numbered = [[merge["models"].index(part[0]), *part[1:]] for part in whole]
    return {**published.document({**merge, "slices": numbered}), **keys}


class TestPublished:
    """`explain` shortens the merges that people have published."""

    @pytest.mark.parametrize("merge", published.MERGES, ids=[m["name"] for m in published.MERGES])
    def test_the_same_slices_and_never_longer(self, merge: dict[str, Any]) -> None:
        """The directive of each merge gives the same slices and dtype, and is not longer."""
        written = yaml.safe_dump(published.document(merge), sort_keys=False)
        text = explained(written)
        expanded = yaml.safe_load(generated(text).recipe)
        assert slices(expanded) == slices(published.document(merge))
        assert expanded.get("dtype") == merge["dtype"]
        assert len(text) <= len(written)
        assert text.startswith("# ")

    def test_a_third_of_the_lines(self) -> None:
        """All directives together have at most a third of the lines of the YAML.

        Lines are wrapped at 100 columns; the YAML has scales on one line.
        """
        before = after = 0
        for merge in published.MERGES:
            text = yaml.safe_dump(
                published.document(merge), sort_keys=False, default_flow_style=None
            )
            before += published.lines(text)
            after += published.lines(explained(text))
        assert after * 3 <= before


CASES: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "block expansion",
        spelled((0, 4), ("org/m", 3, 4, ZERO), (4, 8), ("org/m", 7, 8, ZERO)),
        "layers: 8\ninterleave: every 4\nzero: [o_proj, down_proj]\n",
        "2 new layers, zeroed, one after every 4th of 8: block expansion",
    ),
    (
        "evenly spread, not zeroed",
        spelled((0, 2), (1, 2), (2, 5), (4, 5), (5, 7), (6, 7), (7, 10), (9, 10)),
        "layers: 10\ninterleave: 4 layers\nzero: none\n",
        "4 new layers, evenly spread among 10: depth up-scaling",
    ),
    (
        "after some layers",
        spelled((0, 4), ("org/m", 3, 4, ZERO), (4, 5), ("org/m", 4, 5, ZERO),
                (5, 7), ("org/m", 6, 7, ZERO), (7, 8)),
        "layers: 8\ninterleave: after [3, 4, 6]\nzero: [o_proj, down_proj]\n",
        "3 new layers, zeroed, after layers 3, 4 and 6 of 8: block expansion",
    ),
    (
        "after many layers",
        spelled((0, 1), ("org/m", 0, 1, ZERO),
                *(part for i, j in pairwise((0, 1, 2, 4, 5, 8, 9, 13, 16))
                  for part in ((i + 1, j + 1), ("org/m", j, j + 1, ZERO))), (17, 20)),
        ("layers: 20\ninterleave: after [0, 1, 2, 4, 5, 8, 9, 13, 16]\n"
         "zero: [o_proj, down_proj]\n"),
        "9 new layers, zeroed, after 9 of 20 layers: block expansion",
    ),
    (
        "appended",
        spelled((0, 8), ("org/m", 7, 8, ZERO), ("org/m", 7, 8, ZERO)),
        "layers: 8\nappend: 2\nzero: [o_proj, down_proj]\n",
        "2 copies of the last of 8 layers, zeroed: block expansion",
    ),
    (
        "interwoven",
        spelled((0, 2), (2, 3), (2, 3), (3, 4), (3, 4), (4, 5), (4, 5), (5, 6), (5, 6), (6, 8)),
        "layers: 8\nrepeat: [2, 6]\n",
        "4 of 8 layers twice, side by side: interwoven depth up-scaling",
    ),
    (
        "depth up-scaling",
        spelled((0, 24), (8, 32)),
        "stack: [[0, 24], [8, 32]]\n",
        "32 → 48 layers in 2 slices: depth up-scaling",
    ),
    (
        "windows",
        spelled(*((i, i + 20) for i in range(0, 61, 10))),
        "layers: 80\nwindows: {size: 20, stride: 10}\n",
        "7 windows of 20 layers, each starting 10 layers after the previous one: a self-merge",
    ),
    (
        "windows among other ranges",
        spelled((0, 16), (8, 24), *((i, i + 15) for i in range(17, 66, 8))),
        "stack: [[0, 16], [8, 24], windows 15:8@17:80]\n",
        "80 → 137 layers in 9 slices: a self-merge",
    ),
    (
        "pruning",
        spelled((0, 23), (28, 32)),
        "layers: 32\ndrop: [23, 28]\n",
        "5 of 32 layers left out: pruning",
    ),
    (
        "a block again, the copies zeroed",
        spelled((0, 24), ("org/m", 8, 24, ZERO), ("org/m", 8, 24, ZERO), (24, 32)),
        "layers: 32\nrepeat: 8:24x3@block\nzero: [o_proj, down_proj]\n",
        "16 of 32 layers three times, as a block, the copies zeroed: block expansion",
    ),
    (
        "the original scaled, too",
        spelled(
            (0, 1),
            *[("org/m", i, i + 1, [{"filter": "q_proj", "value": 0.5}, {"value": 1.0}])
              for i in (1, 1, 2, 2)],
            (3, 4),
        ),
        "layers: 4\nrepeat: [1, 3]\nscale: {q_proj: 0.5}\napply_to: all\n",
        "2 of 4 layers twice, side by side, some scaled: interwoven depth up-scaling",
    ),
    (
        "each update divided",
        spelled(
            (0, 1),
            *[("org/m", i, i + 1, [{"filter": "o_proj", "value": 0.5},
                                   {"filter": "down_proj", "value": 0.5}, {"value": 1.0}])
              for i in (1, 1, 2, 2)],
            (3, 4),
        ),
        "layers: 4\nrepeat: {layers: [1, 3], damped: true}\n",
        "2 of 4 layers twice, side by side, each time with 1/2 of the update: damped repetition",
    ),
    (
        "two models",
        spelled(("org/a", 0, 24), ("org/b", 8, 32)),
        "models: {a: org/a, b: org/b}\nlayout: [a 0:24, b 8:32]\n",
        "48 layers in 2 slices of 2 models: a frankenmerge",
    ),
    (
        "two revisions of a model",
        spelled(("org/m@v1", 0, 4), ("org/m@v2", 2, 6)),
        "models: {a: org/m@v1, b: org/m@v2}\nlayout: [a 0:4, b 2:6]\n",
        "8 layers in 2 slices of 2 models: a frankenmerge",
    ),
    (
        "a layer swap",
        spelled(("org/a", 0, 2), ("org/b", 2, 3), ("org/a", 3, 4)),
        "models: {a: org/a, b: org/b}\nlayout: [a 0:2, b 2:3, a 3:4]\n",
        "4 layers, each of one of 2 models: a layer swap",
    ),
    (
        "end to end",
        spelled(("org/a", 0, 28), ("org/b", 0, 28)),
        "models: {a: org/a, b: org/b}\nlayout: [a 0:28, b 0:28]\n",
        "2 models end to end, 28 + 28 layers: a frankenmerge",
    ),
    (
        "a root",
        spelled((0, 4), ("org/m", 3, 8, [{"filter": "o_proj", "value": 0.5**0.5}, {"value": 1.0}])),
        "layout: [[0, 4], {layers: [3, 8], scale: {o_proj: sqrt(1/2)}}]\n",
        "8 → 9 layers in 2 slices, some scaled: a self-merge",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("document", "directive", "sentence"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_patterns(document: dict[str, Any], directive: str, sentence: str) -> None:
    """`explain` finds the directive and the sentence of each kind of merge."""
    comment, *lines = explained(document).splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith("model: "))
    assert text == directive
    assert slices(yaml.safe_load(generated("".join(lines)).recipe)) == slices(document)
    assert comment == f"# {sentence}\n"


NAMES = ["org/a", "org/b@v1", "org/b@v2", "../x y", "G:\\miqu-70b", "end", "null", "1", "windows",
         "windows 3:4", "a 0:4", "org/c+org/l", "Ünï/cödé", "x, y", "{z}", "- q", "it's", "0:14",
         "#h", "a: b", "tab\there", "nl\nx"]  # fmt: skip
FILTERS = ["o_proj", "down_proj", "a b", "*", "1", "null", "x,y", "é"]
VALUES = st.sampled_from([0.0, 1.0, 0.5**0.5, 1 / 3, -0.0, 1e-7, 3]) | st.floats(
    allow_nan=False, allow_infinity=False
)


@st.composite
def merges(draw: Any) -> dict[str, Any]:
    """Draw any list of slices, with few models and scales so that patterns occur."""
    conditions = st.builds(
        lambda name, value: {"value": value} if name is None else {"filter": name, "value": value},
        st.none() | st.sampled_from(FILTERS),
        VALUES,
    )
    scale = st.none() | st.just(ZERO) | st.lists(conditions, min_size=1, max_size=3) | VALUES
    models = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3))
    scales = draw(st.lists(scale, min_size=1, max_size=2))
    starts = st.integers(0, 9)
    parts = st.tuples(
        st.sampled_from(models), starts, st.integers(1, 6), st.sampled_from(scales)
    ).map(lambda part: [models.index(part[0]), part[1], part[1] + part[2], *[part[3]]])
    drawn = draw(st.lists(parts, min_size=1, max_size=12))
    trimmed = [part if part[3] is not None else part[:3] for part in drawn]
    return published.document({"models": models, "dtype": "bfloat16", "slices": trimmed})


@fuzz(150)
@given(merges())
def test_any_slices(document: dict[str, Any]) -> None:
    """Any slices survive `explain` unchanged, and the directive is never longer than the YAML."""
    logging.getLogger("mergekit_interleave").setLevel(logging.CRITICAL)
    for flow in (None, False):
        text = yaml.safe_dump(document, sort_keys=False, default_flow_style=flow)
        try:
            wanted = mergekit_yaml.from_document({"slices": document["slices"]}, lambda _: None)
        except InterleaveError:  # for example, two scales in the first slice
            return
        written = explained(text)
        assert generated(written).layout == wanted
        assert len(written) <= len(text)


@fuzz(100)
@given(st.sets(st.integers(0, 7), min_size=1))
def test_new_layers_directly_after_others(tiny: Path, after: set[int]) -> None:
    """`explain` finds `after` for copies directly after any layers, unless a shorter line fits."""
    model, growth = ModelRef(ModelPath(str(tiny))), After(tuple(sorted(after)))
    layout = expand(growth, model, 8)

    def fitting(*lines: Growth) -> list[Growth]:
        return [line for line in lines if expand(line, model, 8) == layout]

    recipe = generated(f"model: {tiny}\ninterleave: after {list(after)}").recipe
    found = directives.parse(explained(recipe), "x").growth
    evenly = fitting(Append(1), *map(Every, range(1, 9)), *map(Spread, range(1, 9)))
    assert found in (evenly or [growth, *fitting(*(Repeat((0, i)) for i in range(1, 9)))])
    assert generated(explained(recipe)).recipe == recipe


def test_500_slices_take_less_than_a_second() -> None:
    """`explain` takes less than a second for 500 slices without a pattern."""
    chance = random.Random(1)  # noqa: S311 - no secret
    parts = []
    for _ in range(500):
        start, count = chance.randrange(60), chance.randrange(1, 20)
        parts.append(("org/m", start, start + count, *([ZERO] if chance.random() < 0.5 else [])))
    text = yaml.safe_dump(spelled(*parts))

    def taken() -> float:
        began = time.process_time()
        explained(text)
        return time.process_time() - began

    assert min(taken() for _ in range(3)) < 1  # another process may share the core


class TestInputs:
    """`explain` reads YAML, a card, a directory, a stream of documents and standard input."""

    def test_a_card(self, mk: Cli) -> None:
        """`explain` reads the first passthrough merge on a card, in any kind of code fence."""
        config = yaml.safe_dump(spelled((0, 24), (8, 32), dtype="float16"))
        quoted = "".join(f"> {line}\n" for line in config.splitlines())
        for fenced in (
            f"```yaml\n{config}```\n",
            f"```\nmerge_method: slerp\n```\n\n~~~~yml\n{config}~~~~\n",
            f"> ```yaml\n{quoted}> ```\n",
            f"```yaml\r\n{config}```\r\n",
        ):
            Path("README.md").write_text(f"---\nlicense: mit\n---\n\n# Model\n\n{fenced}\nEnd\n")
            result = mk("explain", "README.md")
            assert result.status == 0, result.err
            assert yaml.safe_load(result.out)["stack"] == [[0, 24], [8, 32]]
            assert yaml.safe_load(result.out)["dtype"] == "float16"

    def test_the_directory_of_a_model(self, mk: Cli, tiny: Path, tmp_path: Path) -> None:
        """`explain` reads the recipe of a model, or its card if there is no recipe."""
        out = tmp_path / "out"
        mk("run", "interleave: every 4", out, "--model", tiny, "--base-model", "org/tiny")
        text = mk("explain", out).out
        assert yaml.safe_load(text) == {
            "model": "org/tiny",
            "layers": 8,
            "interleave": "every 4",
            "zero": ["o_proj", "down_proj"],
        }
        (out / "mergekit_config.yml").unlink()
        (out / "interleave.json").unlink()
        assert mk("explain", out).out == text
        (out / "README.md").unlink()
        result = mk("explain", out)
        assert result.status == 1
        assert result.err.startswith(f"error: {out}: ")
        assert "mergekit_config.yml" in result.err

    def test_what_only_the_stored_directive_says(self, mk: Cli, tmp_path: Path) -> None:
        """If the base is not available, `explain` prints the stored directive."""
        zoo.quiet()
        base = zoo.save("gemma2", tmp_path / "gemma2")
        words = ("--model", base, "--base-model", "org/gemma2")
        mk("run", "interleave: every 4, zero: gains", "out", *words)
        text = mk("explain", "out").out
        assert "block expansion" in text.splitlines()[0]
        assert yaml.safe_load(text) == {
            "model": "org/gemma2",
            "interleave": "every 4",
            "zero": "norms",
        }

    def test_a_readable_model_needs_fewer_words(self, mk: Cli, tiny: Path) -> None:
        """A readable model makes `layers` and `zero` redundant."""
        config = mk("gen", "--every", "4", "--model", tiny).out
        text = mk("explain", "-", stdin=config).out
        assert yaml.safe_load(text) == {"model": str(tiny), "interleave": "every 4"}
        assert mk("gen", "-", stdin=text).out == config

    @pytest.mark.parametrize(("name", "zero"), [("mistral3", "auto"), ("olmo2", "norms")])
    def test_what_only_the_type_tells(self, mk: Cli, tmp_path: Path, name: str, zero: str) -> None:
        """`explain` knows the modules and the output norms of a model type."""
        zoo.quiet()
        base = zoo.save(name, tmp_path / name)
        config = mk("gen", "--every", "2", "--zero", zero, "--model", base).out
        assert ("modules" in config) == (name == "mistral3")
        text = mk("explain", "-", stdin=config).out
        stated = {} if zero == "auto" else {"zero": zero}
        assert yaml.safe_load(text) == {"model": str(base), "interleave": "every 2", **stated}
        assert mk("gen", "-", stdin=text).out == config

    def test_a_stream(self, mk: Cli) -> None:
        """`explain` keeps other documents of a stream byte for byte."""
        linear = "# a blend\nname:   one\nmerge_method: linear\nmodels: [{model: a/b}]\n"
        config = yaml.safe_dump({"name": "two", **spelled((0, 24), (8, 32))}, sort_keys=False)
        result = mk("explain", "-", stdin=f"{linear}---\n{config}---\n{linear}")
        first, second, third = result.out.split("---\n")
        assert (first, third) == (linear, linear)
        assert yaml.safe_load(second) == {
            "model": "org/m",
            "stack": [[0, 24], [8, 32]],
            "name": "two",
        }

    def test_a_directive_stays_as_it_is(self, mk: Cli) -> None:
        """`explain` prints a directive unchanged."""
        text = "interleave: every 4, model: org/m\n"
        assert mk("explain", "-", stdin=text).out == text

    def test_what_no_directive_says(self, mk: Cli) -> None:
        """`explain` refuses a gradient that no directive has, and keeps an unchanged model."""
        edge = {"sources": [{"model": "m", "layer_range": [0, 4], "parameters": {"scale": [1, 2]}}]}
        result = mk("explain", "-", stdin=yaml.safe_dump({"slices": [edge]}))
        assert (result.status, "gradient" in result.err) == (1, True)
        base = make_llama(Path("base"))
        same = spelled((str(base), 0, 8), dtype="float16")
        text = mk("explain", "-", stdin=yaml.safe_dump(same)).out
        assert slices(yaml.safe_load(text)) == slices(same)
        assert text.startswith("# the 8 layers unchanged\n")

    @pytest.mark.parametrize(
        "text",
        ["", "just words", "merge_method: slerp\nslices: []", "a: [", "[1]", "```\nno yaml: [\n```",
         "slices: 5", "# Card\n\n```yaml\nmerge_method: slerp\n```\n", "slices: [{sources: []}]"],
    )  # fmt: skip
    def test_what_is_no_merge(self, mk: Cli, text: str) -> None:
        """Text without a merge gives one error and no output."""
        result = mk("explain", "-", stdin=text)
        assert result.status in (1, 2)
        assert result.out == ""
        assert result.err.startswith("error: ")

    def test_a_scale_at_the_edge_stays_with_its_step(self, mk: Cli, tiny: Path) -> None:
        """A scale on the last slice stays in a layout, since mergekit scales the head as well."""
        text = "layout: [0:8, {layers: 7:8, scale: 0.5}]"
        config = mk("gen", text, "--model", tiny).out
        explained = mk("explain", "-", stdin=config).out
        assert "layout" in yaml.safe_load(explained)
        assert mk("gen", "-", stdin=explained).out == config

    def test_zero_and_scale_at_once(self, mk: Cli, tiny: Path) -> None:
        """`explain` separates what is zeroed from what is scaled."""
        text = "interleave: every 4, scale: {q_proj: 0.5}"
        config = mk("gen", text, "--model", tiny).out
        assert yaml.safe_load(mk("explain", "-", stdin=config).out) == {
            "model": str(tiny),
            "interleave": "every 4",
            "scale": {"q_proj": 0.5},
        }

    def test_what_mergekit_multi_writes(self, mk: Cli) -> None:
        """`explain` reads slices in a module called default."""
        whole = spelled((0, 24), (8, 32))
        document = {
            "modules": {"default": {"slices": whole["slices"]}},
            "merge_method": "passthrough",
        }
        text = mk("explain", "-", stdin=yaml.safe_dump(document)).out
        assert yaml.safe_load(text)["stack"] == [[0, 24], [8, 32]]

    def test_a_gradient(self, mk: Cli) -> None:
        """`explain` writes a gradient as one step for each layer.

        The last slice may have one if no filter matches tensors outside the layers.
        """
        scale = [{"filter": "o_proj", "value": [0, 1]}, {"value": 1}]
        document = spelled((0, 6), ("org/m", 4, 8, scale))
        text = mk("explain", "-", stdin=yaml.safe_dump(document)).out
        steps = yaml.safe_load(text)["layout"][1:]
        assert [step["scale"]["o_proj"] for step in steps] == [0, "1/3", "2/3", 1]

    def test_two_merges_on_a_card(self, mk: Cli) -> None:
        """`explain` uses the first merge on a card, and notes that there is another."""
        blocks = [yaml.safe_dump(spelled((0, 24), (start, 32))) for start in (8, 16)]
        Path("README.md").write_text("".join(f"```yaml\n{block}```\n" for block in blocks))
        result = mk("explain", "README.md")
        assert yaml.safe_load(result.out)["stack"] == [[0, 24], [8, 32]]
        (warning,) = result.err.splitlines()
        assert warning.startswith("warning: README.md: ")
        assert "2 passthrough merges" in warning

    def test_ranges_past_the_end(self, mk: Cli, tiny: Path) -> None:
        """`explain` accepts ranges past the end of a readable model, and `gen` refuses them."""
        for parts in ([(0, 10)], [(1, 10)], [(0, 4), (4, 12)]):
            document = spelled(*((str(tiny), *part) for part in parts))
            result = mk("explain", "-", stdin=yaml.safe_dump(document))
            assert result.status == 0, result.err
            refused = mk("gen", "-", stdin=result.out)
            assert refused.status == 1
            assert f"[{parts[-1][0]}, {parts[-1][1]}] " in refused.err
            assert str(tiny) in refused.err

    def test_a_fence_inside_a_config(self, mk: Cli) -> None:
        """A code fence in a chat template does not make a config a card."""
        document = spelled((0, 24), (8, 32), chat_template="a\n```\nb\n```\n")
        result = mk("explain", "-", stdin=yaml.safe_dump(document, default_style="|"))
        assert result.status == 0, result.err
        assert yaml.safe_load(result.out)["chat_template"] == document["chat_template"]

    def test_a_whole_model_needs_its_depth(self, mk: Cli, tiny: Path) -> None:
        """`explain` needs a readable config.json for a merge of a whole model."""
        whole = {"models": [{"model": "org/m"}], "merge_method": "passthrough"}
        result = mk("explain", "-", stdin=yaml.safe_dump(whole))
        assert (result.status, "org/m: " in result.err) == (1, True)
        whole["models"] = [{"model": str(tiny), "parameters": {"scale": 0.5}}]
        text = mk("explain", "-", stdin=yaml.safe_dump(whole)).out
        assert yaml.safe_load(text)["layout"] == [{"layers": [0, 8], "scale": 0.5}]

    @pytest.mark.slow
    def test_as_many_layers_as_there_may_be(self, mk: Cli) -> None:
        """`explain` reads the largest config that `gen` writes."""
        config = mk("gen", "interleave: every 1, model: o/x, layers: 3000").out
        text = mk("explain", "-", stdin=config).out
        assert len(text) < 200
        assert generated(text).layout == generated(config).layout

    def test_many_open_fences(self) -> None:
        """`explain` takes linear time for many unclosed code fences."""
        began = time.process_time()
        with pytest.raises(InterleaveError):
            explained("```x\n" * 50_000)
        assert time.process_time() - began < 5


@settings(max_examples=50)
@given(st.text(max_size=80))
def test_any_text(text: str) -> None:
    """Any text gives a directive or an InterleaveError."""
    with contextlib.suppress(InterleaveError):
        assert isinstance(explained(text), str)


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: mit\n---\n\n# Hello\n\nplain text\n",
        "---\nlicense: mit\nmerge_method: linear\n---\n\n# Hello\n",
        "---\nlicense: mit\n---\nappend: 4\n",
        "---\nlicense: mit\n---\n\n| a | b |\n|---|---|\n",
        "# Hello\n\nmodel: it is good\n",
    ],
)
def test_a_card_without_a_merge(text: str, mk: Cli, tmp_path: Path) -> None:
    """The card of a base model gives an error that names it, whatever its prose looks like."""
    card = tmp_path / "README.md"
    card.write_text(text)
    for source in (card, tmp_path):
        result = mk("explain", source)
        assert (result.status, result.out) == (2, "")
        assert f"error: {card}: " in result.err
