"""Read and write YAML.

Reading is PyYAML's safe loading with two changes: a duplicate key is an error, and `8:24` is text,
although YAML 1.1 reads it as the base-60 number 504. A document may also be one line without
braces, `key: value, key: value`, where a value may be a word and a list, `after [3, 9]`. Writing
keeps lists of numbers on one line.
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
    """A resolver that reads `8:24` as text."""

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
    """Read one document, in any YAML style or as `key: value, key: value` on one line.

    Args:
        text: YAML.
        where: The name of the text in error messages.
        known: The top-level keys that must not be repeated; None means all keys.

    Raises:
        DirectiveError: The text is not exactly one YAML document, or is not safe to load.
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
            return _load_line(lines[0], known)
        except _UNREADABLE as unreadable:
            error = unreadable
    if error is not None:
        raise DirectiveError(f"{where}: {_explain(error)}") from error
    return document


def _load_line(line: str, known: Collection[str] | None) -> object:
    """Read `key: value, key: value`; a value may be a word and a list, which braces forbid."""
    try:
        return _load("{" + line + "\n}", known)
    except _UNREADABLE:
        quoted = re.sub(
            rf"{_QUOTED}|(?<=:\s)({_WORD_AND_LIST})(?=\s*(?:[,#]|$))",
            lambda match: f"'{match[1]}'" if match[1] else match[0],
            line,
        )
        if quoted == line:
            raise
        return _load("{" + quoted + "\n}", known)


_QUOTED = r"""(?<![^\s,:\[{])(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')"""
_WORD_AND_LIST = r"""[a-z]+\s*\[[^\[\]{}"']*\]"""
_WORD_AND_NUMBERS = r"[a-z]+ \[\d+(?:, \d+)*\]"


def documents(text: str, where: str) -> list[str]:
    """Split a stream into its documents, each unchanged and with its `---`.

    Raises:
        DirectiveError: The text is not valid YAML.
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
    """Return the keys of one document with their scalar values, without constructing objects.

    The value of a key is None if it is not a scalar. The result is empty if the text is not valid.
    """
    try:
        _check_nesting(text)
        node = yaml.compose(text, Loader=SafeLoader)
    except _UNREADABLE:
        return {}
    return _keys(node, set())


def _keys(node: yaml.Node | None, seen: set[int]) -> dict[str, str | None]:
    """Return the keys of a mapping and of the mappings that `<<` merges into it."""
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
    """Whether a text is a YAML list or mapping in brackets."""
    return text.lstrip().startswith(("[", "{"))


def write(document: dict[str, object]) -> str:
    """Write YAML that every loader reads back as `document`, with the keys in order."""
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
    """Write a document on one line without braces, which `read` reads: `key: value, key: value`."""
    return _flow(document, width=_NO_LIMIT, one_line=True)[1:-1]


def write_lines(document: Mapping[str, object]) -> str:
    """Write each key on its own line, `key: [value, ...]`, and break long lines.

    A long value that occurs again is written as an alias.
    """
    return _flow(_with_shared(document, {}), width=_WIDTH, one_line=False) + "\n"


_WIDTH = 88  # PyYAML breaks a line after the entry that exceeds it
_NO_LIMIT = 10**9
_LONG = 24  # characters; a shorter value is easier to read than an alias


def _with_shared(value: Any, seen: dict[str, Any]) -> Any:
    """Return a copy of the value in which equal long parts are the same object."""
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
    dumper.top_level = int(one_line)
    node = dumper.represent_mapping("tag:yaml.org,2002:map", document, flow_style=one_line)
    dumper.open()
    dumper.serialize(node)
    dumper.close()
    return stream.getvalue().rstrip("\n")


class _FlowDumper(_Resolver, yaml.SafeDumper):
    """A dumper that uses brackets, and neither quotes nor breaks words such as `8:24`.

    Attributes:
        top_level: The number of brackets around the values of the document.
    """

    top_level = 0

    def generate_anchor(self, node: yaml.Node) -> str:  # noqa: ARG002 - PyYAML's signature
        number, letter = divmod(self.last_anchor_id, len(ascii_lowercase))
        self.last_anchor_id += 1
        return f"{ascii_lowercase[letter]}{number or ''}"

    def analyze_scalar(self, text: str) -> Any:
        analysis = super().analyze_scalar(text)
        if re.fullmatch(r"[^:](:?[^:])*", text) and ": " not in text:
            # Inside brackets PyYAML quotes every text with a colon, even if it does not end a key.
            plain = super().analyze_scalar(text.replace(":", "."))
            analysis.allow_flow_plain = plain.allow_flow_plain
        analysis.allow_block_plain = analysis.allow_flow_plain
        analysis.allow_single_quoted &= not analysis.multiline
        return analysis

    def choose_scalar_style(self) -> str:
        is_value = self.mapping_context and not self.simple_key_context
        at_top = is_value and self.flow_level == self.top_level
        if at_top and re.fullmatch(_WORD_AND_NUMBERS, getattr(self.event, "value", "")):
            return ""
        return str(super().choose_scalar_style())

    def process_scalar(self) -> None:
        width, self.best_width = self.best_width, _NO_LIMIT
        super().process_scalar()
        self.best_width = width

    def write_indent(self) -> None:
        if not (self.flow_level and getattr(self.event, "tag", "").endswith((":int", ":float"))):
            super().write_indent()


# PyYAML also raises RecursionError if the nesting is too deep, and ValueError for an invalid date
# or number.
_UNREADABLE = (yaml.YAMLError, RecursionError, ValueError)


_MAX_VALUES = 400_000
"""The maximum number of values in a document after its aliases are expanded.

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
            raise yaml.YAMLError(f"more than {_MAX_VALUES:,} values after its aliases are expanded")
        if known is not None and isinstance(node, yaml.MappingNode):
            # People define several anchors under the same ignored key.
            node.value = _without_repeated(node.value, known)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _without_repeated(
    pairs: list[tuple[yaml.Node, yaml.Node]], known: Collection[str]
) -> list[tuple[yaml.Node, yaml.Node]]:
    """Return the pairs of a mapping; if an unknown key is repeated, keep only the last one."""
    last = {key.value: value for key, value in pairs if isinstance(key, yaml.ScalarNode)}
    return [
        (key, value)
        for key, value in pairs
        if not isinstance(key, yaml.ScalarNode) or key.value in known or last[key.value] is value
    ]


def _check_nesting(text: str) -> None:
    """Raise an error for deep nesting, because libyaml's recursion would crash the process."""
    depth = 0
    for event in yaml.parse(text, Loader=SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {_MAX_DEPTH} levels deep")


_MAX_DEPTH = 100


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values in a node after its aliases are expanded."""
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
        return "contains several documents; only `gen` accepts a stream for mergekit-multi"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return f"not valid YAML: {place}{error.problem}"
    if isinstance(error, RecursionError):
        return "not valid YAML: nested too deeply"
    return f"not valid YAML: {' '.join(str(error).split())}"
