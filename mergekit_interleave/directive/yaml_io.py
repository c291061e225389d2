"""YAML as this project reads and writes it.

Reading is PyYAML's safe loading with two changes: a repeated key is an error, and `8:24` is text,
which YAML 1.1 reads as 504 in base 60. A document may also be one line without braces,
`key: value, key: value`. Writing keeps lists of numbers on one line.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping
from itertools import pairwise
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


class _Resolver:
    """Resolves `8:24` as text."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and value and _BASE_60.fullmatch(value):
            return "tag:yaml.org,2002:str"
        return str(super().resolve(kind, value, implicit))  # type: ignore[misc]


class _Loader(_Resolver, SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001 - PyYAML's signature
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key `{key.value}` is given twice", key.start_mark
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
        known: The only top-level keys that must not be repeated; None means all keys.

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
    """Split a stream into its documents, each unchanged, with its `---`.

    Raises:
        DirectiveError: The text is not YAML.
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
    """The keys of one document, and the values that are scalars, without constructing objects."""
    try:
        _check_nesting(text)
        node = yaml.compose(text, Loader=SafeLoader)
    except _UNREADABLE:
        return {}
    return _keys(node, set())


def _keys(node: yaml.Node | None, seen: set[int]) -> dict[str, str | None]:
    """The keys of a mapping and of the mappings that `<<` merges into it."""
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
    """Whether an argument of the command line is a YAML list or mapping."""
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
    """Like `write`, on one line without braces: `key: value, key: value`."""
    return _flow(document, width=_NO_LIMIT, one_line=True)[1:-1]


def write_lines(document: Mapping[str, object]) -> str:
    """Like `write`, with one line for each key, `key: [value, ...]`; long lines are broken.

    A long value that occurs again is written as an alias.
    """
    return _flow(_with_shared(document, {}), width=_WIDTH, one_line=False) + "\n"


_WIDTH = 88  # PyYAML breaks a line after the entry that exceeds it
_NO_LIMIT = 10**9
_LONG = 24  # characters; a shorter value is easier to read than an alias


def _with_shared(value: Any, seen: dict[str, Any]) -> Any:
    """A copy of the value in which equal long parts are the same object."""
    if isinstance(value, Mapping):
        value = {key: _with_shared(entry, seen) for key, entry in value.items()}
    elif isinstance(value, list):
        value = [_with_shared(entry, seen) for entry in value]
    else:
        return value
    text = repr(value)
    return seen.setdefault(text, value) if len(text) > _LONG else value


def _flow(document: Mapping[str, object], *, width: int, one_line: bool) -> str:
    stream = io.StringIO()
    dumper = _FlowDumper(
        stream, default_flow_style=True, allow_unicode=True, sort_keys=False, width=width
    )
    node = dumper.represent_mapping("tag:yaml.org,2002:map", document, flow_style=one_line)
    dumper.open()
    dumper.serialize(node)
    dumper.close()
    return stream.getvalue().rstrip("\n")


class _FlowDumper(_Resolver, yaml.SafeDumper):
    """Writes values in brackets, with words such as `8:24` unquoted and whole on one line."""

    def generate_anchor(self, node: yaml.Node) -> str:  # noqa: ARG002 - PyYAML's signature
        number, letter = divmod(self.last_anchor_id, len(ascii_lowercase))
        self.last_anchor_id += 1
        return f"{ascii_lowercase[letter]}{number or ''}"

    def analyze_scalar(self, text: str) -> Any:
        analysis = super().analyze_scalar(text)
        if re.fullmatch(r"[^:](:?[^:])*", text) and ": " not in text:
            # A colon that ends no key is harmless, and PyYAML puts quotes around it in brackets.
            plain = super().analyze_scalar(text.replace(":", "."))
            analysis.allow_flow_plain = plain.allow_flow_plain
        analysis.allow_block_plain = analysis.allow_flow_plain
        analysis.allow_single_quoted &= not analysis.multiline
        return analysis

    def process_scalar(self) -> None:
        width, self.best_width = self.best_width, _NO_LIMIT
        super().process_scalar()
        self.best_width = width

    def write_indent(self) -> None:
        if not (self.flow_level and getattr(self.event, "tag", "").endswith((":int", ":float"))):
            super().write_indent()


# Besides YAML's own errors: RecursionError where the nesting is too deep, and ValueError where a
# value only looks like a date or a number.
_UNREADABLE = (yaml.YAMLError, RecursionError, ValueError)


_MAX_VALUES = 400_000
"""The maximum number of values in a document with its aliases expanded.

A merge of 10,000 layers has 300,000.
"""


def _load(text: str, known: Collection[str] | None = None) -> object:
    _check_nesting(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > _MAX_VALUES:
            raise yaml.YAMLError(f"more than {_MAX_VALUES:,} values with its aliases expanded")
        if known is not None and isinstance(node, yaml.MappingNode):
            # People keep anchors under a key that is ignored, and repeat that key.
            node.value = _without_repeated(node.value, known)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _without_repeated(
    pairs: list[tuple[yaml.Node, yaml.Node]], known: Collection[str]
) -> list[tuple[yaml.Node, yaml.Node]]:
    """The pairs of a mapping; of repeated keys that are not known, only the last."""
    last = {key.value: value for key, value in pairs if isinstance(key, yaml.ScalarNode)}
    return [
        (key, value)
        for key, value in pairs
        if not isinstance(key, yaml.ScalarNode) or key.value in known or last[key.value] is value
    ]


def _check_nesting(text: str) -> None:
    """Raise an error for deep nesting, for which libyaml's recursion would crash the process."""
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
    """The number of values in a node, with its aliases expanded."""
    if id(node) not in known:
        known[id(node)] = _MAX_VALUES + 1  # for a node that contains itself
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
