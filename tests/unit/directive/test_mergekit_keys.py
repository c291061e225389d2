"""Keys that mergekit ignores are left out of a config, with one warning."""

from __future__ import annotations

from collections.abc import Iterator

import dialect
import pytest
import yaml
from harness import fuzz
from hypothesis import given
from hypothesis import strategies as st

from mergekit_interleave.directive import mergekit_keys
from mergekit_interleave.directive.directive import Directive, known_keys, parse
from mergekit_interleave.directive.model_ref import ModelPath, ModelRef
from mergekit_interleave.errors import DirectiveError
from mergekit_interleave.layout import mergekit_yaml

BODY = dialect.BODY.replace("MODEL", "org/name")
PLAIN = parse(BODY, "x")


def read(line: str) -> Directive:
    """Parse the config with a line added to it."""
    stated = line.partition(":")[0]
    kept = [known for known in BODY.splitlines() if not known.startswith(f"{stated}:")]
    return parse("\n".join([*kept, line]), "x")


def keys_within(value: object) -> Iterator[object]:
    """Yield the keys of a mapping, and of all mappings inside it."""
    if isinstance(value, dict):
        yield from value
        value = [*value.values()]
    if isinstance(value, list):
        for inner in value:
            yield from keys_within(inner)


@pytest.mark.parametrize(("line", "named"), dialect.IGNORED.items())
def test_ignored_keys(line: str, named: str) -> None:
    """All ignored keys of a config are named in one warning, and the layers stay the same."""
    directive = read(line)
    (warning,) = directive.warnings
    assert warning.startswith(f"{named}: ")
    assert directive.growth == PLAIN.growth
    ignored = {"int8_mask", "weight", "density", "padding", "filtr"}
    assert not ignored & {*keys_within(directive.mergekit)}


@pytest.mark.parametrize(("keys", "named"), dialect.INSIDE.items())
def test_keys_of_a_slice(keys: str, named: str) -> None:
    """A key without effect in every slice is named once."""
    first, _, last = keys.rpartition("sources:")
    entry = f"- {{{first}{last}sources: [{{model: org/name, layer_range: [0, 8]}}]}}\n"
    directive = parse(f"slices:\n{entry}{entry}merge_method: passthrough\n", "x")
    (warning,) = directive.warnings
    assert warning.startswith(f"{named}: ")


@pytest.mark.parametrize("line", dialect.EMPTY)
def test_empty_keys(line: str) -> None:
    """A key without a value is the same as no key."""
    assert (read(line).growth, read(line).warnings) == (PLAIN.growth, ())


@pytest.mark.parametrize("line", dialect.REFUSED)
def test_what_mergekit_refuses(line: str) -> None:
    """A value that mergekit refuses is refused, even under a key without effect."""
    with pytest.raises(DirectiveError, match=line.partition(":")[0]):
        mergekit_yaml.check_keys_of_mergekit(read(line).mergekit)


def test_a_directive_has_no_unknown_keys() -> None:
    """Beside a growth line an unknown key is an error, but mergekit's parameters are a warning."""
    directive = parse("append: 1, parameters: {int8_mask: true, scale: 2}", "x")
    assert directive.mergekit == {"parameters": {"scale": 2}}
    assert directive.warnings[0].startswith("parameters.int8_mask: ")
    with pytest.raises(DirectiveError, match="dtpye"):
        parse("append: 1, dtpye: float16", "x")


def test_one_of_our_keys_without_a_merge_method() -> None:
    """Without `merge_method` a config is a directive, whose keys must not contradict each other."""
    body = BODY.replace("merge_method: passthrough\n", "")
    for line in ("zero: [o_proj]", "interleave: every 4"):
        with pytest.raises(DirectiveError, match=line.partition(":")[0]):
            parse(body + line, "x")


class TestRevision:
    """`revision:` beside `model:` is `model@revision`."""

    MODEL = ModelRef(ModelPath("org/name", "v1"))

    @pytest.mark.parametrize(
        "text",
        [
            "model: org/name, revision: v1, append: 1",
            "model: {model: org/name, revision: v1}, append: 1",
            "layout: [{model: org/name, revision: v1, layers: [0, 4]}]",
        ],
    )
    def test_in_a_directive(self, text: str) -> None:
        """A directive accepts it wherever it names a model."""
        directive = parse(text, "x")
        used = directive.growth.models if directive.growth else ()
        assert (directive.model or used[0]) == self.MODEL

    @pytest.mark.parametrize("source", ["slices", "models"])
    def test_in_a_mergekit_config(self, source: str) -> None:
        """A config accepts it with a warning, because mergekit-yaml itself ignores it."""
        entry = {"model": "org/name", "revision": "v1"}
        slices = [{"sources": [{**entry, "layer_range": [0, 4]}]}]
        document = {source: slices if source == "slices" else [entry]}
        directive = parse(yaml.safe_dump({**document, "merge_method": "passthrough"}), "x")
        assert directive.growth is not None
        assert directive.growth.models == (self.MODEL,)
        assert "revision" in directive.warnings[0]

    @pytest.mark.parametrize(
        "text",
        [
            "model: org/name@v2, revision: v1, append: 1",
            "model: org/name, revision: [v1], append: 1",
            "revision: v1, append: 1",
            "layout: [{revision: v1, layers: [0, 4]}]",
        ],
    )
    def test_mistakes(self, text: str) -> None:
        """A revision without a model, or a second one, is refused."""
        with pytest.raises(DirectiveError, match="revision"):
            parse(text, "x")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@fuzz(100)
@given(st.dictionaries(st.text("abcxyz_", min_size=1, max_size=9), VALUES, max_size=4))
def test_any_unknown_keys(keys: dict[str, object]) -> None:
    """Any unknown keys beside `slices` leave the layers as they are."""
    unknown = {key: value for key, value in keys.items() if key not in known_keys()}
    document = {**yaml.safe_load(BODY), **unknown}
    kept, warnings = mergekit_keys.effective(document)
    assert kept == yaml.safe_load(BODY)
    assert len(warnings) == bool(unknown)
