"""Build the JSON Schema of a directive, which editors use to complete and describe its keys."""

from __future__ import annotations

from itertools import combinations

from mergekit_interleave.directive.directive import DTYPES, FROM, NAME, NEIGHBOURS
from mergekit_interleave.directive.growth.base import COUNT, Schema, any_of, ref
from mergekit_interleave.directive.growth.registry import LINES
from mergekit_interleave.directive.layer_range import BOUND, RANGE
from mergekit_interleave.directive.scale import APPLY_TO, AUTO, GAINS, NONE, NORMS

_DEFINITIONS: Schema = {
    "bound": {
        "description": "A layer index from 0, a count from the end (-4), a fraction of the depth "
        "(50%), or end.",
        **any_of({"type": "integer"}, {"type": "string", "pattern": rf"^\s*({BOUND})\s*$"}),
    },
    "range": {
        "description": "A half-open range: [8, 24] is layers 8 to 23.",
        **any_of(
            {"type": "array", "items": ref("bound"), "minItems": 2, "maxItems": 2},
            {"type": "string", "pattern": rf"^\s*{RANGE}\s*$"},
        ),
    },
    "model": {
        "description": "A directory or a Hub id, org/name or org/name@revision; model+lora; or "
        "mergekit's mapping form.",
        **any_of({"type": "string", "minLength": 1}, {"type": "object", "required": ["model"]}),
    },
    "revision": {"description": "A branch, a tag or a commit.", "type": ["string", "integer"]},
    "zero": {
        "description": "auto: all weights that write to the residual stream; norms or gains: the "
        "norms after them; none: plain copies; or parts of tensor names.",
        **any_of(
            {"enum": [AUTO, NONE, NORMS, GAINS]},
            {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
            {"type": "string", "pattern": r"[^\s\[\],]"},
        ),
        "examples": [["o_proj", "down_proj"], AUTO, NONE, NORMS, GAINS],
    },
    "factor": {
        "description": "A number, a fraction such as 1/3, or a root such as sqrt(1/2).",
        **any_of({"type": "number"}, {"type": "string", "pattern": r"^[-+\d.eE/\s()sqrt]+$"}),
    },
    "scale": {
        "description": "The factors of tensors: one for all, or one for each part of a name. All "
        "other tensors are unchanged, or take the factor of `*`. A list is mergekit's own form.",
        **any_of(
            ref("factor"),
            {"type": "object", "additionalProperties": ref("factor"), "minProperties": 1},
            {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "properties": {"filter": {"type": "string"}, "value": ref("factor")},
                    "required": ["value"],
                    "additionalProperties": False,
                },
            },
        ),
        "examples": [{"q_proj": 0.84, "k_proj": "sqrt(1/2)"}, 0.5],
    },
}

_DTYPE = {"enum": [*DTYPES, *(f"torch.{dtype}" for dtype in DTYPES)]}

_OTHERS: Schema = {
    "model": {**ref("model"), "description": "The source model."},
    "revision": {
        **ref("revision"),
        "description": "The revision of `model`, the same as `model: org/name@revision`.",
    },
    "models": {
        "description": "Several source models for `layout`, by short names; the models of a list "
        "are named a, b, c, ... (In a mergekit config: the models to merge whole.)",
        **any_of(
            {"type": "object", "additionalProperties": ref("model"), "minProperties": 1},
            {"type": "array", "minItems": 1},
        ),
    },
    "layers": {
        **COUNT,
        "description": "The depth of the model, if its config cannot be read.",
    },
    "zero": {**ref("zero"), "description": "What to zero in the new layers."},
    "scale": {**ref("scale"), "description": "The factors of the tensors of the new layers."},
    "apply_to": {
        "enum": list(APPLY_TO),
        "description": "Which of several equal layers `zero` and `scale` apply to: every copy, the "
        "first copy, the last copy, or all copies and their original.",
    },
    FROM: {
        "enum": [NEIGHBOURS, "neighbors"],
        "description": "What the weights of the new layers of `interleave` are: the means of the "
        "layers before and behind. Without it, they are copies of the layer before.",
    },
    NAME: {
        "type": "string",
        "description": "The name of the result in a stream for mergekit-multi.",
    },
    "merge_method": {
        "enum": ["passthrough", "linear"],
        "description": "mergekit's; may be left out. `linear` only as `gen` writes it.",
    },
    "base_model": {
        **ref("model"),
        "description": "The model that config and tokenizer are taken from.",
    },
    "dtype": {**_DTYPE, "description": "Convert the weights to this dtype."},
    "out_dtype": {
        **_DTYPE,
        "description": "Convert the weights to this dtype after all arithmetic.",
    },
    "tokenizer_source": {"description": "mergekit's: union, base or a model."},
    "tokenizer": {"type": "object", "description": "mergekit's tokenizer settings."},
    "chat_template": {"type": "string", "description": "mergekit's: auto, a name or a template."},
    "parameters": {"type": "object", "description": "mergekit's: scales for all slices."},
    "slices": {"type": "array", "description": "mergekit's slices, instead of a growth line."},
    "modules": {"type": "object", "description": "mergekit's modules, instead of a growth line."},
}


def schema() -> Schema:
    """Return the schema, which follows draft 2020-12."""
    lines = (*LINES, "slices", "modules")
    definitions = [line.definitions() for line in LINES.values()]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mergekit-interleave directive",
        "description": "A mergekit config in which one growth line replaces `slices:`.",
        "type": "object",
        "properties": {**{key: line.schema() for key, line in LINES.items()}, **_OTHERS},
        "additionalProperties": False,
        "not": {"anyOf": [{"required": list(pair)} for pair in combinations(lines, 2)]},
        "$defs": {**_DEFINITIONS, **{k: v for part in definitions for k, v in part.items()}},
    }
