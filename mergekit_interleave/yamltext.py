"""YAML as this project reads and writes it.

Reading is safe loading with two changes: a key given twice is an error, and `8:24` is text, not
the number 504 that YAML 1.1 sees in base 60. Besides, a document may be written on one line
without braces, `key: value, key: value`. Writing keeps short lists of numbers on one line.
"""

from __future__ import annotations

import re
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


def read(text: str, where: str) -> object:
    """The one document in `text`, block style or `key: value, key: value` on one line.

    Args:
        text: YAML.
        where: What to call the text in errors.

    Raises:
        DirectiveError: The text is not one safe YAML document.
    """
    try:
        document = _load(text)
        if isinstance(document, dict):
            return document
        error = None
    except _UNREADABLE as unreadable:
        document, error = None, unreadable
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) == 1 and ":" in lines[0]:
        try:
            return _load("{" + lines[0] + "\n}")
        except _UNREADABLE as unreadable:
            error = unreadable
    if error is not None:
        raise DirectiveError(f"{where}: {_explain(error)}") from error
    return document


def write(document: dict[str, object]) -> str:
    """YAML that every loader reads back as `document`, keys in their order."""
    return _dump(document, flow=False, width=4096)


def write_inline(document: dict[str, object]) -> str:
    """The same on one line, without the braces: `key: value, key: value`."""
    return _dump(document, flow=True, width=10**9).strip()[1:-1]


def _dump(document: dict[str, object], *, flow: bool, width: int) -> str:
    text: str = yaml.dump(
        document,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=flow,
        allow_unicode=True,
        width=width,
    )
    return text


# Besides YAML's own errors: a nesting too deep for the parser, and a value that looks like a
# date or a number and is none.
_UNREADABLE = (yaml.YAMLError, RecursionError, ValueError)


_MAX_VALUES = 100_000
"""The most values of a document, its aliases written out: a merge has some thousands."""


def _load(text: str) -> object:
    _check_nesting(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > _MAX_VALUES:
            raise yaml.YAMLError(f"more than {_MAX_VALUES:,} values, its aliases written out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


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
        return "holds several documents; one is expected"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return f"not valid YAML: {place}{error.problem}"
    if isinstance(error, RecursionError):
        return "not valid YAML: nested too deeply"
    return f"not valid YAML: {' '.join(str(error).split())}"
