"""Write docs/python.md, the page of the Python API, from its docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import mergekit_interleave as api
from mergekit_interleave.cli.app import COMMANDS
from mergekit_interleave.commands.inputs import Words

PAGE = Path(__file__).parent.parent / "docs" / "python.md"

_HEAD = """\
<!-- Written by tools/reference.py: `make docs`. -->

# Python

Every command is a function of `mergekit_interleave`, and its options are keyword arguments:

```python
import mergekit_interleave as mk

print(mk.gen("interleave: every 4", model="org/name"))  # mergekit YAML
plan = mk.plan(every=4, model="org/name")  # shown as a layer map in a notebook
report = mk.run("interleave: every 4", "deeper", model="org/name", engine="stream")
mk.verify("deeper", against="org/name").check()
print(mk.train("deeper", trainer="axolotl").text)
```

The functions print nothing, never exit, and do not change logging or signal handlers. They return
frozen objects. `as_dict()` returns what `--json` prints, and `warnings` contains the lines that
`mk-interleave` prints as `warning:`. Every error about your input is an `InterleaveError`; its
`hint` says what to do, with the flags of the command line: `--allow-pickle` stands for
`allow_pickle=True`. An argument of the wrong Python type may also raise a `TypeError`.

Importing the package does not import torch or transformers. Two notebooks show the functions:
[examples/python-api.ipynb](../examples/python-api.ipynb) grows a model that it creates, and
[examples/layouts.ipynb](../examples/layouts.ipynb) tries layouts in memory and keeps one.
"""

_DIRECTIVE = """\
## Directives and keywords

A directive is text (`"interleave: every 4"`), a mapping with the keys of the YAML form
(`{"interleave": "every 4"}`), a path, an open file, or a `Directive`. If the text is the name of an
existing file, that file is read. The following keywords replace keys of the directive; without a
directive, they form the whole directive:
"""

_KEYWORDS = "[Directives and keywords](#directives-and-keywords)"


def page() -> str:
    """Return the whole page: functions, keywords, results, errors."""
    names = [name.replace("-", "_") for name in COMMANDS]
    functions = [*names, *(name for name in _public(FunctionType) if name not in names)]
    classes = [name for name in _public(type) if not _is_error(name)]
    parts = [
        _HEAD.rstrip(),
        "## Functions",
        *(part for name in functions for part in _function(name)),
        _DIRECTIVE.rstrip(),
        _table(("Keyword", ""), _sections(Words)["Attributes"]),
        "## Results",
        *(part for name in classes for part in _class(name)),
        "## Errors",
        _table(
            ("Error", "Exit code", ""),
            [
                (name, str(getattr(api, name).exit_code), _summary(getattr(api, name)))
                for name in _public(type)
                if _is_error(name)
            ],
        ),
    ]
    return "\n\n".join(parts).replace("see `Words`", f"see {_KEYWORDS}") + "\n"


def _public(kind: type) -> list[str]:
    return [name for name in sorted(api.__all__) if isinstance(getattr(api, name), kind)]


def _is_error(name: str) -> bool:
    return issubclass(getattr(api, name), Exception)


def _function(name: str) -> Iterator[str]:
    """Describe a function: its signature, purpose, arguments, result and errors."""
    function = getattr(api, name)
    yield f"### {name}"
    yield f"```python\n{name}{_signature(function)}\n```"
    yield _text(function)
    sections = _sections(function)
    if "Args" in sections:
        yield _table(("Argument", ""), sections["Args"])
    if "Returns" in sections:
        yield f"Returns: {sections['Returns'][0][1]}"
    if "Raises" in sections:
        yield _table(("Raises", ""), sections["Raises"])


def _class(name: str) -> Iterator[str]:
    """Describe a class: its purpose, attributes, properties and methods."""
    described = getattr(api, name)
    yield f"### {name}"
    yield _text(described)
    rows = list(_sections(described).get("Attributes", []))
    members = [(key, value) for key, value in vars(described).items() if not key.startswith("_")]
    rows += [(key, _summary(value)) for key, value in members if _is_property(value)]
    if rows:
        yield _table(("Attribute", ""), rows)
    methods = [
        (f"{key}{_call(value)}", _summary(value))
        for key, value in members
        if isinstance(value, FunctionType)
    ]
    if methods:
        yield _table(("Method", ""), methods)


def _is_property(value: object) -> bool:
    return isinstance(value, property) or type(value).__name__ == "cached_property"


def _signature(function: FunctionType) -> str:
    """Return the signature; if it is long, with one argument per line."""
    shown = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))
    shown = shown.replace("**words: Unpack[Words]", "**words")
    if len(function.__name__) + len(shown) <= _WIDTH:
        return shown
    inner, _, result = shown[1:].rpartition(") -> ")
    arguments = re.split(r", (?![^\[]*\])", inner)
    return "(\n" + "".join(f"    {argument},\n" for argument in arguments) + f") -> {result}"


_WIDTH = 88


def _call(function: FunctionType) -> str:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    plain = [inspect.Parameter(p.name, p.kind) for p in parameters]
    return str(inspect.Signature(plain))


def _text(thing: Any) -> str:
    """Return a docstring up to its first section."""
    return re.split(r"\n\n\w+:\n", inspect.getdoc(thing) or "")[0]


def _summary(thing: Any) -> str:
    return " ".join(_text(thing).split("\n\n")[0].split())


def _sections(thing: Any) -> dict[str, list[tuple[str, str]]]:
    """Return the sections of a docstring, each with its names and their descriptions."""
    parts = re.split(r"\n\n(\w+):\n", "\n\n" + (inspect.getdoc(thing) or ""))
    return {
        title: list(_entries(inspect.cleandoc(text)))
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def _entries(text: str) -> Iterator[tuple[str, str]]:
    for entry in re.split(r"\n(?! )", text):
        name, colon, text = entry.partition(": ")
        named = bool(colon) and name.replace(".", "").isidentifier()
        yield (name, " ".join(text.split())) if named else ("", " ".join(entry.split()))


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [_row(head), "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(_row((f"`{name}`", *more)) for name, *more in rows)])


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
