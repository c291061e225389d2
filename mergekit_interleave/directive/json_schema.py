"""JSON Schema of a directive, for editors: what `directive` reads, with a word on each key."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from mergekit_interleave._limits import MAX_LAYERS
from mergekit_interleave.directive import notation
from mergekit_interleave.directive.directive import DTYPES, NAME
from mergekit_interleave.directive.scale import APPLY_TO, AUTO, GAINS, NONE

_BOUND = r"-?\d+|\d+(\.\d+)?%|end"
_RANGE = rf"({_BOUND}):({_BOUND})"
_COUNT = {"type": "integer", "minimum": 1, "maximum": MAX_LAYERS}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


def _one_of(*ways: object) -> dict[str, object]:
    return {"anyOf": list(ways)}


_DEFINITIONS: dict[str, Any] = {
    "bound": {
        "description": "A layer's index from 0, a count from the end (-4), a fraction of the depth "
        "(50%), or end.",
        **_one_of({"type": "integer"}, {"type": "string", "pattern": rf"^\s*({_BOUND})\s*$"}),
    },
    "range": {
        "description": "Half-open: [8, 24] is layers 8 to 23.",
        **_one_of(
            {"type": "array", "items": _ref("bound"), "minItems": 2, "maxItems": 2},
            {"type": "string", "pattern": rf"^\s*{_RANGE}\s*$"},
        ),
    },
    "model": {
        "description": "A directory or a Hub id, org/name or org/name@revision; model+lora; or "
        "mergekit's mapping form.",
        **_one_of({"type": "string", "minLength": 1}, {"type": "object", "required": ["model"]}),
    },
    "windows": {
        "description": "Ranges of `size` layers, each `stride` further than the one before; the "
        "last ends where the layers do.",
        **_one_of(
            {"type": "string", "pattern": rf"^\s*\d+:\d+(@{_RANGE})?\s*$"},
            {
                "type": "object",
                "properties": {
                    "size": {**_COUNT, "description": "Layers of a window."},
                    "stride": {**_COUNT, "description": "From one start to the next."},
                    "layers": {**_ref("range"), "description": "All of them unless stated."},
                },
                "required": ["size", "stride"],
                "additionalProperties": False,
            },
        ),
    },
    "zero": {
        "description": "auto: all that writes to the residual stream; gains: the norms after it; "
        "none: plain copies; or parts of tensor names.",
        **_one_of(
            {"enum": [AUTO, NONE, GAINS]},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
            {"type": "string", "pattern": r"[^\s\[\],]"},
        ),
        "examples": [["o_proj", "down_proj"], AUTO, NONE, GAINS],
    },
    "factor": {
        "description": "A number, 1/3 or sqrt(1/2).",
        **_one_of({"type": "number"}, {"type": "string", "pattern": r"^[-+\d.eE/\s()sqrt]+$"}),
    },
    "scale": {
        "description": "What tensors are multiplied by: one factor, or one for each part of a "
        "name, all other tensors staying as they are unless `*` says otherwise. A list is "
        "mergekit's own form.",
        **_one_of(
            _ref("factor"),
            {"type": "object", "additionalProperties": _ref("factor"), "minProperties": 1},
            {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "properties": {"filter": {"type": "string"}, "value": _ref("factor")},
                    "required": ["value"],
                    "additionalProperties": False,
                },
            },
        ),
        "examples": [{"q_proj": 0.84, "k_proj": "sqrt(1/2)"}, 0.5],
    },
    "part": {
        "description": "Layers of one model: [0, 24], or the text `a 0:24x2@block`, "
        "`windows 20:10@0:80`.",
        **_one_of(
            _ref("range"),
            {"type": "string", "pattern": rf"(^|\s)({_RANGE}(x\d+)?(@(layers|block))?)\s*$"},
            {"type": "string", "pattern": rf"(^|\s)windows\s+\d+:\d+(@{_RANGE})?\s*$"},
            {
                "type": "object",
                "properties": {"windows": _ref("windows")},
                "required": ["windows"],
                "additionalProperties": False,
            },
        ),
    },
    "times": {"type": "integer", "minimum": 1, "description": "How often in all."},
    "as": {
        "enum": ["layers", "block"],
        "description": "layers: each layer again beside itself; block: the range as a whole.",
    },
    "step": {
        "description": "Some layers, and what is done to all of them.",
        "type": "object",
        "properties": {
            "model": {**_ref("model"), "description": "A short name of `models`, or a model."},
            "layers": _one_of(_ref("part"), {"type": "array", "items": _ref("part")}),
            "windows": _ref("windows"),
            "times": _ref("times"),
            "as": _ref("as"),
            "zero": _ref("zero"),
            "scale": _ref("scale"),
        },
        "additionalProperties": False,
    },
}

_GROWTH: dict[str, Any] = {
    "interleave": {
        "description": "`every 4`: after every 4th layer a new copy of it; `8 layers`: 8 new "
        "layers, evenly spread. They are zeroed unless `zero` says otherwise.",
        "type": "string",
        "pattern": r"^\s*(every\s+[1-9]\d*(st|nd|rd|th)?(\s+layers?)?|[1-9]\d*\s+layers?)\s*$",
        "examples": ["every 4", "8 layers"],
    },
    "append": {**_COUNT, "description": "Copies of the last layer at the end, zeroed."},
    "repeat": {
        "description": "Each layer of a range twice, side by side; or `times` in all, or the "
        "range as a block.",
        **_one_of(
            _ref("range"),
            {"type": "string", "pattern": rf"^\s*{_RANGE}(x\d+)?(@(layers|block))?\s*$"},
            {
                "type": "object",
                "properties": {
                    "layers": _ref("range"),
                    "times": {**_ref("times"), "minimum": 2},
                    "as": _ref("as"),
                },
                "required": ["layers"],
                "additionalProperties": False,
            },
        ),
        "examples": [[8, 24], {"layers": [8, 24], "times": 3, "as": "block"}],
    },
    "stack": {
        "description": "Ranges of one model, one after another, and nothing else.",
        **_one_of({"type": "string"}, {"type": "array", "items": _ref("part"), "minItems": 1}),
        "examples": [[[0, 24], [8, 32]]],
    },
    "windows": {
        **_ref("windows"),
        "description": "Overlapping windows: {size: 20, stride: 10}, or the text 20:10.",
        "examples": [{"size": 20, "stride": 10}],
    },
    "drop": {
        "description": "Leave out the layers of a range, or of several.",
        **_one_of(_ref("range"), {"type": "array", "items": _ref("range"), "minItems": 1}),
        "examples": [[23, 28]],
    },
    "layout": {
        "description": "Steps one after another: anything, of several models too.",
        "type": "array",
        "items": _one_of(_ref("part"), _ref("step")),
        "minItems": 1,
        "examples": [["a 0:24", {"layers": "b 8:32", "zero": ["o_proj", "down_proj"]}]],
    },
}

_DTYPE = {"enum": [*DTYPES, *(f"torch.{dtype}" for dtype in DTYPES)]}

_OTHERS: dict[str, Any] = {
    "model": {**_ref("model"), "description": "The source model."},
    "models": {
        "description": "Several source models by short names for `layout`; in a list they are a, "
        "b, c, ... (In a mergekit config: its whole models.)",
        **_one_of(
            {"type": "object", "additionalProperties": _ref("model"), "minProperties": 1},
            {"type": "array", "minItems": 1},
        ),
    },
    "layers": {**_COUNT, "description": "Its depth, only where its config cannot be read."},
    "zero": {**_ref("zero"), "description": "What the new layers zero."},
    "scale": {**_ref("scale"), "description": "What the new layers are multiplied by."},
    "apply_to": {
        "enum": list(APPLY_TO),
        "description": "To which of equal layers `zero` and `scale` apply: every copy, the first "
        "copy, the last copy, or all of them and their original.",
    },
    NAME: {"type": "string", "description": "In a stream for mergekit-multi: the result's name."},
    "merge_method": {"const": "passthrough", "description": "mergekit's; needs no mention."},
    "base_model": {**_ref("model"), "description": "Which gives config and tokenizer."},
    "dtype": {**_DTYPE, "description": "Convert the weights."},
    "out_dtype": {**_DTYPE, "description": "Convert them after all arithmetic."},
    "tokenizer_source": {"description": "mergekit's: union, base or a model."},
    "tokenizer": {"type": "object", "description": "mergekit's."},
    "chat_template": {"type": "string", "description": "mergekit's."},
    "parameters": {"type": "object", "description": "mergekit's: scales of all slices."},
    "slices": {"type": "array", "description": "mergekit's, in place of a growth line."},
    "modules": {"type": "object", "description": "mergekit's, in place of a growth line."},
}


def schema() -> dict[str, Any]:
    """The schema, of draft 2020-12."""
    lines = (*notation.KEYS, "slices", "modules")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mergekit-interleave directive",
        "description": "A mergekit config in which one growth line stands for `slices:`.",
        "type": "object",
        "properties": {**_GROWTH, **_OTHERS},
        "additionalProperties": False,
        "not": {"anyOf": [{"required": list(pair)} for pair in combinations(lines, 2)]},
        "$defs": _DEFINITIONS,
    }
