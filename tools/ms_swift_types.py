"""Derive which model types and templates of ms-swift fit a model class, from its wheel.

Usage: ms_swift_types.py WHEEL, after `pip download --no-deps ms-swift==VERSION`

The wheel is read, not installed or run. The result is written to the package's data.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

DATA = Path(__file__).parent.parent / "mergekit_interleave/training/trainers/ms_swift.json"


def derive(wheel: Path) -> dict[str, object]:
    """Return the release, and for each class its types, each with its templates."""
    with zipfile.ZipFile(wheel) as files:
        sources = {name: files.read(name) for name in files.namelist() if name.endswith(".py")}
    types = _constants(sources["swift/model/constant.py"])
    templates = _constants(sources["swift/template/constant.py"])
    classes: dict[str, dict[str, list[str]]] = {}
    for name, source in sorted(sources.items()):
        if name.startswith("swift/model/models/"):
            for words in _calls(ast.parse(source), "ModelMeta"):
                each = [words, *_calls(words["model_groups"], "ModelGroup")]
                found = [_text(one.get("template"), templates) for one in each]
                kind = str(_text(words["model_type"], types))
                for item in ast.walk(words.get("architectures", ast.Pass())):
                    if isinstance(item, ast.Constant) and isinstance(item.value, str):
                        own = [*dict.fromkeys(filter(None, found))]
                        classes.setdefault(item.value, {})[kind] = own
    release = wheel.name.split("-")[1]
    return {"release": release, "classes": dict(sorted(classes.items()))}


_ORDER = {"ModelMeta": ("model_type", "model_groups"), "ModelGroup": ("models", "template")}
"""The names of the arguments that are passed by position."""


def _calls(tree: ast.AST, name: str) -> Iterator[Mapping[str, ast.AST]]:
    """Yield the arguments of each call of a function, by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name:
            by_place = dict(zip(_ORDER[name], node.args, strict=False))
            yield {**by_place, **{word.arg: word.value for word in node.keywords if word.arg}}


def _constants(source: bytes) -> dict[str, str]:
    """Return the strings that the classes of a module define."""
    bodies = [node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {
        target.id: line.value.value
        for body in bodies
        for line in body
        if isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
        for target in line.targets
        if isinstance(target, ast.Name) and isinstance(line.value.value, str)
    }


def _text(node: ast.AST | None, constants: Mapping[str, str]) -> str | None:
    """Return the string that an argument means: a literal, or a constant of a class."""
    if isinstance(node, ast.Attribute):
        return constants[node.attr]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def write(content: Mapping[str, object]) -> str:
    """Return the content of the data file, with one line per class."""
    classes = content["classes"]
    assert isinstance(classes, dict)  # noqa: S101 - for the type checker
    lines = [f"    {json.dumps(name)}: {json.dumps(types)}" for name, types in classes.items()]
    body = ",\n".join(lines)
    return (
        f'{{\n  "release": {json.dumps(content["release"])},\n  "classes": {{\n{body}\n  }}\n}}\n'
    )


if __name__ == "__main__":
    DATA.write_text(write(derive(Path(sys.argv[1]))), encoding="utf-8")
