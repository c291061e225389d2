"""YAML as this project reads and writes it.

Reading is safe loading with two changes: a key given twice is an error, and `8:24` is text, not
the number 504 that YAML 1.1 sees in base 60. Besides, a document may be written on one line
without braces, `key: value, key: value`. Writing keeps short lists of numbers on one line.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from itertools import count, pairwise
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any

import yaml

from mergekit_interleave.errors import DirectiveError

if TYPE_CHECKING or not yaml.__with_libyaml__:
    from yaml import SafeDumper, SafeLoader
else:  # ten times faster, and not in every build of PyYAML
    from yaml import CSafeDumper as SafeDumper
    from yaml import CSafeLoader as SafeLoader

_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class _Loader(SafeLoader):
    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and value and _BASE_60.fullmatch(value):
            return "tag:yaml.org,2002:str"
        return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001 - PyYAML's signature
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key `{key.value}` stands there twice", key.start_mark
                    )
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


class _Dumper(SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


def _represent_list(dumper: yaml.SafeDumper, items: list[object]) -> yaml.Node:
    flow = bool(items) and all(isinstance(item, int | float) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(list, _represent_list)


def read(text: str, where: str, known: Collection[str] | None = None) -> object:
    """The one document in `text`, block style or `key: value, key: value` on one line.

    Args:
        text: YAML.
        where: What to call the text in errors.
        known: The only keys that must not stand there twice at the top, if any may.

    Raises:
        DirectiveError: The text is not one safe YAML document.
    """
    try:
        document = _load(text, known)
        if isinstance(document, dict):
            return document
        error = None
    except _UNREADABLE as unreadable:
        document, error = None, unreadable
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) == 1 and ":" in lines[0]:
        try:
            return _load("{" + lines[0] + "\n}", known)
        except _UNREADABLE as unreadable:
            error = unreadable
    if error is not None:
        raise DirectiveError(f"{where}: {_explain(error)}") from error
    return document


def documents(text: str, where: str) -> list[str]:
    """The documents of a stream, each as it is written, `---` included.

    Raises:
        DirectiveError: The text is no YAML.
    """
    try:
        starts = [
            event.start_mark.index
            for event in yaml.parse(text, Loader=SafeLoader)
            if isinstance(event, yaml.DocumentStartEvent) and event.start_mark is not None
        ]
    except _UNREADABLE as error:
        raise DirectiveError(f"{where}: {_explain(error)}") from error
    return [text[start:stop] for start, stop in pairwise([0, *starts[1:], len(text)])]


def keys(text: str) -> Mapping[str, str | None]:
    """The keys of one document, and their values where those are words; nothing is built."""
    try:
        _check_nesting(text)
        node = yaml.compose(text, Loader=SafeLoader)
    except _UNREADABLE:
        return {}
    return _keys(node, set())


def _keys(node: yaml.Node | None, seen: set[int]) -> dict[str, str | None]:
    """The keys of a mapping, and of those that it is merged with."""
    found: dict[str, str | None] = {}
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            found |= _keys(part, seen)
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return found
    seen.add(id(node))
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            found[key.value] = value.value if isinstance(value, yaml.ScalarNode) else None
            if key.value == "<<":
                found |= _keys(value, seen)
    return found


def is_structured(text: str) -> bool:
    """Whether a word of the command line is a list or a mapping."""
    return text.lstrip().startswith(("[", "{"))


def write(document: dict[str, object]) -> str:
    """YAML that every loader reads back as `document`, keys in their order."""
    text: str = yaml.dump(
        document,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=False,
        allow_unicode=True,
        width=4096,
    )
    return text


def write_inline(document: dict[str, object]) -> str:
    """The same on one line, without the braces: `key: value, key: value`."""
    return " ".join(_flow(document, {}, set()))[1:-1]


def write_lines(document: Mapping[str, object]) -> str:
    """The same with one line for each key, `key: [value, ...]`, broken where it gets long.

    What is long and stands there again is an alias.
    """
    times: dict[str, int] = {}
    _count_equal(list(document.values()), times)
    names = (f"{letter}{number or ''}" for number in count() for letter in ascii_lowercase)
    often = (text for text, number in times.items() if number > 1 and len(text) > _LONG)
    anchors = dict(zip(often, names, strict=False))
    written: set[str] = set()
    return "".join(_line(key, value, anchors, written) for key, value in document.items())


_WIDTH = 100
_LONG = 24  # characters; less is quicker read than looked up


def _count_equal(value: object, times: dict[str, int]) -> None:
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, str) or not isinstance(inner, Iterable):
        return
    text = repr(value)
    times[text] = times.get(text, 0) + 1
    if times[text] == 1:  # or what is within counts as often as what holds it
        for entry in inner:
            _count_equal(entry, times)


def _line(key: str, value: object, anchors: Mapping[str, str], written: set[str]) -> str:
    text = f"{_scalar(key)}:"
    length = len(text)
    for piece in _pieces(value, anchors, written):
        fits = length + 1 + len(piece) <= _WIDTH
        text += f" {piece}" if fits else f"\n  {piece}"
        length = length + 1 + len(piece) if fits else 2 + len(piece)
    return text + "\n"


def _pieces(value: object, anchors: Mapping[str, str], written: set[str]) -> list[str]:
    """A value in flow style, in pieces between which a line may be broken."""
    anchor = anchors.get(repr(value)) if isinstance(value, Mapping | list) else None
    if anchor is None:
        return _flow(value, anchors, written)
    if anchor in written:
        return [f"*{anchor}"]
    written.add(anchor)
    first, *rest = _flow(value, anchors, written)
    return [f"&{anchor} {first}", *rest]


def _flow(value: object, anchors: Mapping[str, str], written: set[str]) -> list[str]:
    if isinstance(value, Mapping):
        named = [_pieces(entry, anchors, written) for entry in value.values()]
        entries = [
            [f"{_scalar(key)}: {first}", *rest]
            for key, (first, *rest) in zip(value, named, strict=True)
        ]
        brackets = "{}"
    elif isinstance(value, list):
        numbers = bool(value) and all(isinstance(entry, int | float) for entry in value)
        entries = [_pieces(entry, anchors, written) for entry in value]
        if numbers:  # which read as one
            entries = [[", ".join(piece for entry in entries for piece in entry)]]
        brackets = "[]"
    else:
        return [_scalar(value)]
    if not entries:
        return [brackets]
    pieces = [piece for entry in entries[:-1] for piece in (*entry[:-1], f"{entry[-1]},")]
    pieces += entries[-1]
    pieces[0] = brackets[0] + pieces[0]
    pieces[-1] += brackets[1]
    return pieces


def _scalar(value: object) -> str:
    """A value without collections, plain where it is read back as the same, within brackets too."""
    if isinstance(value, str):
        return _word(value)
    return _emitted(value)


@functools.cache
def _word(text: str) -> str:
    if _PLAIN.fullmatch(text):
        with suppress(*_UNREADABLE):
            if _load(f"[{text}, {{{text}: 0}}]") == [text, {text: 0}]:
                return text
    return _emitted(text)


def _emitted(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    quotes = '"' if isinstance(value, str) and "\n" in value else None  # or it takes several lines
    text: str = yaml.dump(
        [value],
        Dumper=SafeDumper,
        default_style=quotes,
        default_flow_style=True,
        allow_unicode=True,
        width=10**9,
    )
    return text.strip()[1:-1]


# The emitter puts quotes around what has a colon; these words need none.
_PLAIN = re.compile(r"[\w./][\w./:%@+-]*( [\w./:%@+-]+)*", re.ASCII)


# Besides YAML's own errors: a nesting too deep for the parser, and a value that looks like a
# date or a number and is none.
_UNREADABLE = (yaml.YAMLError, RecursionError, ValueError)


_MAX_VALUES = 400_000
"""The most values of a document, its aliases written out: a merge of 10,000 layers has 300,000."""


def _load(text: str, known: Collection[str] | None = None) -> object:
    _check_nesting(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > _MAX_VALUES:
            raise yaml.YAMLError(f"more than {_MAX_VALUES:,} values, its aliases written out")
        if known is not None and isinstance(node, yaml.MappingNode):
            # People keep anchors under a key that means nothing, again and again.
            node.value = _without_repeated(node.value, known)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _without_repeated(
    pairs: list[tuple[yaml.Node, yaml.Node]], known: Collection[str]
) -> list[tuple[yaml.Node, yaml.Node]]:
    """The pairs of a mapping without all but the last of those whose key is not known."""
    last = {key.value: value for key, value in pairs if isinstance(key, yaml.ScalarNode)}
    return [
        (key, value)
        for key, value in pairs
        if not isinstance(key, yaml.ScalarNode) or key.value in known or last[key.value] is value
    ]


def _check_nesting(text: str) -> None:
    """Libyaml composes by recursion, and a deep nest ends the process."""
    depth = 0
    for event in yaml.parse(text, Loader=SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {_MAX_DEPTH} deep")


_MAX_DEPTH = 100


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node holds, each alias counted as what it stands for."""
    if id(node) not in known:
        known[id(node)] = _MAX_VALUES + 1  # what holds itself has no end
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_count(part, known) for part in inner)
    return known[id(node)]


def _explain(error: Exception) -> str:
    if isinstance(error, yaml.composer.ComposerError) and "single document" in str(error):
        return "holds several documents; one is expected (`gen` takes a stream for mergekit-multi)"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return f"not valid YAML: {place}{error.problem}"
    if isinstance(error, RecursionError):
        return "not valid YAML: nested too deeply"
    return f"not valid YAML: {' '.join(str(error).split())}"
