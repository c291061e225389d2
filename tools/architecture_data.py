"""Check the files in `architectures/data`, and write the reference of their keys.

Usage: architecture_data.py
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mergekit_interleave.architectures import family as families
from mergekit_interleave.architectures import gguf, transformers4
from mergekit_interleave.architectures import task as tasks

SET_BY_CODE = frozenset(
    {"model_type", "facts", "is_unknown", "composite", "mergekit_modules", "deepstack"}
)
"""The attributes of a family that its entry does not state."""

PAGE = families.DATA.parent / "README.md"
_START = "<!-- Below: written from the docstrings by tools/architecture_data.py. -->\n"

_SECTIONS: Mapping[str, type] = {
    "The sections of architectures.json": families.ArchitectureData,
    "An entry of `families`: tensors": families.Family,
    "An entry of `families`: keys of config.json": families.ConfigFacts,
    "`output_norms`": families.OutputNorms,
    "`identity_constants`": families.IdentityConstant,
    "`indexer_sharing`": families.IndexerSharing,
    "`kv_sharing`": families.KVSharing,
    "An entry of `composites`": families.Composite,
    "An entry of `quantized`": families.QuantizationRule,
    "An entry of tasks.json": tasks.TaskEntry,
    "The sections of transformers4.json": transformers4.Transformers4Data,
    "The sections of gguf.json": gguf.GgufData,
    "An entry of `architectures`": gguf.Architecture,
    "`periods`": gguf.Period,
}


def problems(data: Mapping[str, Any]) -> list[str]:
    """List the faults of `architectures.json`, one line for each entry and key."""
    unchecked_families = {"families": dict[str, Any]}
    hints = {**typing.get_type_hints(families.ArchitectureData), **unchecked_families}
    faults = [*_wrong_keys(data, hints, hints, "architectures.json")]
    if faults:
        return faults
    hints = entry_hints()
    for name, entry in data["families"].items():
        faults += _wrong_keys(entry, hints, (), f"families.{name}")
    return faults or [*_wrong_references(data)]


def task_problems(data: Mapping[str, Any]) -> list[str]:
    """List the faults of `tasks.json`, one line for each entry and key."""
    return [*_wrong(data, dict[str, tasks.TaskEntry], "tasks.json")]


def transformers4_problems(data: Mapping[str, Any]) -> list[str]:
    """List the faults of `transformers4.json`, one line for each entry and key."""
    return [*_wrong(data, transformers4.Transformers4Data, "transformers4.json")]


def entry_hints() -> dict[str, Any]:
    """Return the keys of a family's entry, with their types."""
    hints = {
        **typing.get_type_hints(families.Family),
        **typing.get_type_hints(families.ConfigFacts),
    }
    return {key: kind for key, kind in hints.items() if key not in SET_BY_CODE}


def _wrong_references(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield names of missing entries, unused reasons, and sections that are not sorted."""
    used = set()
    for name, entry in data["families"].items():
        reasons = [
            *([entry["refused"]] if "refused" in entry else []),
            *entry.get("refused_if", {}).values(),
            *(reason for _, reason in entry.get("refused_unless", {}).values()),
        ]
        used |= {*reasons}
        where = f"families.{name}"
        yield from _missing(reasons, data["reasons"], where, "reason")
        lists = {*entry.get("per_layer_lists", ()), *entry.get("optional_per_layer_lists", ())}
        rules = (entry.get(key, {}) for key in ("output_norms", "indexer_sharing", "kv_sharing"))
        named = [rule["types_key"] for rule in rules if "types_key" in rule]
        named += entry.get("run_length_lists", {}).values()
        named += [entry["depth_list"]] if "depth_list" in entry else []
        yield from _missing(named, lists, where, "per-layer list")
        kinds = lists | {*entry.get("layer_indices", ())}
        yield from _missing(entry.get("llama_cpp_periods", ()), kinds, where, "list of layers")
    for reason in sorted({*data["reasons"]} - used):
        yield f"reasons.{reason}: no family uses it"
    for name, entry in data["composites"].items():
        if "family" not in entry:
            yield f"composites.{name}: it has no family"
        yield from _missing(
            [entry[key] for key in ("family",) if key in entry],
            data["families"],
            f"composites.{name}",
            "family",
        )
    yield from _missing([data["assumed_family"]], data["families"], "assumed_family", "family")
    for section in ("composites", "quantized", "families"):
        if [*data[section]] != sorted(data[section]):
            yield f"{section}: the entries are not sorted by name"


def _missing(names: Iterable[str], known: Iterable[str], where: str, noun: str) -> Iterator[str]:
    known = {*known}
    return (f"{where}: there is no {noun} {name!r}" for name in names if name not in known)


def _wrong_keys(
    value: object, hints: Mapping[str, Any], required: Iterable[str], where: str
) -> Iterator[str]:
    """Yield unknown and missing keys of a mapping, and values of the wrong type."""
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is not a mapping"
        return
    for key in (key for key in required if key not in value):
        yield f"{where}: {key} is missing"
    for key, item in value.items():
        if key in hints:
            yield from _wrong(item, hints[key], f"{where}.{key}")
        else:
            yield f"{where}: unknown key {key!r}"


def _wrong(value: object, kind: Any, where: str) -> Iterator[str]:
    """Yield a line for each place at which a value does not match a type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        yield from _wrong_keys(value, typing.get_type_hints(kind), kind.__required_keys__, where)
    elif dataclasses.is_dataclass(kind):
        required = [
            item.name
            for item in dataclasses.fields(kind)
            if item.default is item.default_factory is dataclasses.MISSING
        ]
        yield from _wrong_keys(value, typing.get_type_hints(kind), required, where)
    elif origin in (typing.Union, types.UnionType):
        faults = {option: [*_wrong(value, option, where)] for option in arguments}
        if all(faults.values()):
            inner = [lines for option, lines in faults.items() if dataclasses.is_dataclass(option)]
            yield from inner[0] if inner else [f"{where}: {value!r} is not {_name(kind)}"]
    elif origin in (tuple, list):
        yield from _wrong_items(value, arguments, where)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        hints = dict.fromkeys(value, arguments[1]) if isinstance(value, dict) else {}
        yield from _wrong_keys(value, hints, (), where)
    elif not _is_instance(value, kind):
        yield f"{where}: {value!r} is not {_name(kind)}"


def _name(kind: Any) -> str:
    """Return the name of a plain type for a message."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if arguments:
        return " or ".join(map(_name, arguments))
    return "null" if kind is types.NoneType else str(getattr(kind, "__name__", kind))


def _wrong_items(value: object, arguments: tuple[Any, ...], where: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{where}: {value!r} is not a list"
        return
    kinds = arguments
    if len(arguments) == 1 or arguments[-1] is Ellipsis:
        kinds = arguments[:1] * len(value)
    if len(value) != len(kinds):
        yield f"{where}: {value!r} does not hold {len(kinds)} items"
        return
    for index, (item, kind) in enumerate(zip(value, kinds, strict=True)):
        yield from _wrong(item, kind, f"{where}[{index}]")


def _is_instance(value: object, kind: Any) -> bool:
    """Whether a value is of a plain type.

    JSON's true is not a number, and 1 is also a float.
    """
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind in (Any, object):
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def reference() -> str:
    """Return the reference of all keys as Markdown."""
    parts = []
    for title, described in _SECTIONS.items():
        skipped = SET_BY_CODE if described is families.Family else ()
        defaults = _defaults(described)
        lines = [
            f"- `{key}`: {text}{defaults.get(key, '')}"
            for key, text in documented(described)
            if key not in skipped
        ]
        wrapped = (textwrap.fill(line, 100, **_WRAPPING) for line in lines)
        parts.append(f"## {title}\n\n{_summary(described)}\n\n" + "\n".join(wrapped) + "\n")
    return "\n".join(parts)


_WRAPPING: dict[str, Any] = {
    "subsequent_indent": "  ",
    "break_long_words": False,
    "break_on_hyphens": False,
}


def _defaults(described: Any) -> dict[str, str]:
    """Return the nonempty defaults of a class's keys, as sentences with JSON values."""
    fields = dataclasses.fields(described) if dataclasses.is_dataclass(described) else ()
    values = {item.name: item.default for item in fields if isinstance(item.default, str | tuple)}
    return {key: f" Default: `{json.dumps(value)}`." for key, value in values.items() if value}


def documented(described: type) -> list[tuple[str, str]]:
    """Return the keys of a class, each with its description in the docstring."""
    _, _, attributes = (inspect.getdoc(described) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", attributes, flags=re.MULTILINE)
    return [(key, " ".join(text.split())) for key, text in entries]


def _summary(described: type) -> str:
    text, _, _ = (inspect.getdoc(described) or "").partition("\n\nAttributes:")
    return text


def page() -> str:
    """Return the README beside the data: its handwritten text, then the reference."""
    return PAGE.read_text(encoding="utf-8").partition(_START)[0] + _START + "\n" + reference()


def main() -> int:
    """Write the page; return 1 if the data has faults."""
    data = json.loads(families.DATA.read_text(encoding="utf-8"))
    faults = problems(data) + task_problems(json.loads(tasks.DATA.read_text(encoding="utf-8")))
    print(*faults, sep="\n", end="\n" if faults else "")
    PAGE.write_text(page(), encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
