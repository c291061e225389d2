"""The growth line `layout: [a 0:24, {layers: b 8:32, zero: [o_proj]}]`: a list of steps.

Each step may have its own model and edits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from mergekit_interleave.directive.growth import windows
from mergekit_interleave.directive.growth.base import (
    Growth,
    Line,
    Named,
    Schema,
    any_of,
    positive,
    ref,
)
from mergekit_interleave.directive.growth.part import (
    Part,
    definitions,
    is_block,
    parse_part,
    parse_parts,
    parts_of,
)
from mergekit_interleave.directive.growth.stack import Stack, Step
from mergekit_interleave.directive.growth.windows import Windows, parse_windows
from mergekit_interleave.directive.layer_range import END
from mergekit_interleave.directive.model_ref import with_revision
from mergekit_interleave.directive.scale import check_disjoint, parse_scale, parse_zero
from mergekit_interleave.errors import DirectiveError, check_keys

if TYPE_CHECKING:
    from mergekit_interleave.directive.growth.explained import Pattern

KEY = "layout"


def _read(value: object, where: str, named: Named) -> Growth:
    if not isinstance(value, list) or not value:
        raise DirectiveError(
            f"{where}: expected a list of steps, found {value!r:.200}",
            hint="for example `layout: [0:24, {layers: [8, 32], zero: [o_proj, down_proj]}]`",
        )
    return Stack(tuple(_step(entry, f"{where}[{i}]", named) for i, entry in enumerate(value)))


_STEP_KEYS = ("model", "revision", "layers", windows.KEY, "times", "as", "zero", "scale")


def _step(value: object, where: str, named: Named) -> Step:
    if not isinstance(value, Mapping):
        return Step((parse_part(value, where, named),))
    if "layer_range" in value:
        raise DirectiveError(f"{where}: unknown key 'layer_range'", hint="did you mean `layers`?")
    check_keys(value, _STEP_KEYS, where)
    parts = tuple(_parts(value, where, named))
    zero = parse_zero(value["zero"], f"{where}.zero") if "zero" in value else None
    scale = parse_scale(value["scale"], f"{where}.scale") if "scale" in value else ()
    check_disjoint(zero, scale, f"{where}: ")
    return Step(parts, zero, scale)


def _parts(step: Mapping[object, object], where: str, named: Named) -> Iterator[Part]:
    """Yield the parts of a step, with the settings of the step applied to each."""
    model = named(step["model"], f"{where}.model") if "model" in step else None
    if "revision" in step:
        if model is None:
            raise DirectiveError(
                f"{where}.revision: the step has no `model`",
                hint="write the revision with the model: `model: org/name@revision`",
            )
        model = with_revision(model, step["revision"], f"{where}.revision")
    times = positive(step.get("times", 1), f"{where}.times")
    as_block = is_block(step.get("as", "layers"), where)
    if windows.KEY in step:
        if "layers" in step:
            raise DirectiveError(
                f"{where}: `layers` and `windows` cannot be combined",
                hint="set the layers in the windows: `windows: {size: ..., layers: [...]}`",
            )
        parts = [Part(parse_windows(step[windows.KEY], f"{where}.windows"))]
    else:
        parts = parse_parts(step.get("layers", [0, END]), f"{where}.layers", named)
    if any(part.model is not None for part in parts) and model is not None:
        raise DirectiveError(
            f"{where}: both `model` and `layers` name a model", hint="name it only once"
        )
    if "times" in step or "as" in step:
        if "times" in step and any(part.times > 1 for part in parts):
            raise DirectiveError(f"{where}: `times` is given twice", hint="keep one of them")
        if any(isinstance(part.layers, Windows) for part in parts):
            raise DirectiveError(
                f"{where}: windows cannot be repeated", hint="write the step several times"
            )
    for part in parts:
        yield Part(
            part.layers,
            part.model or model,
            times if "times" in step else part.times,
            as_block if "as" in step else part.as_block,
        )


def _propose(pattern: Pattern) -> Iterator[Growth]:
    """Propose steps that edit their layers or name models; `stack` proposes all others."""
    several = len({model for step in pattern.edited for model, _, _ in step.slices}) > 1
    steps: list[Step] = []
    for edited in pattern.edited:
        parts: list[Part] = []
        for model, slices in groupby(edited.slices, key=lambda part: part[0]):
            part_model = model if several else None
            ranges = tuple((start, stop) for _, start, stop in slices)
            parts += [replace(part, model=part_model) for part in parts_of(ranges)]
        step = Step(tuple(parts), edited.zero, edited.scale)
        steps += [Step((part,)) for part in parts] if step.is_plain else [step]
    stack = Stack(tuple(steps))
    if not stack.is_plain:
        yield stack


def _schema() -> Schema:
    return {
        "description": "Steps one after another, with layers of one or more models.",
        "type": "array",
        "items": any_of(ref("part"), ref("step")),
        "minItems": 1,
        "examples": [["a 0:24", {"layers": "b 8:32", "zero": ["o_proj", "down_proj"]}]],
    }


def _definitions() -> Schema:
    step: Schema = {
        "description": "Some layers, and the edit that applies to all of them.",
        "type": "object",
        "properties": {
            "model": {**ref("model"), "description": "A short name from `models`, or a model."},
            "revision": ref("revision"),
            "layers": any_of(ref("part"), {"type": "array", "items": ref("part")}),
            **{key: ref(key) for key in (windows.KEY, "times", "as", "zero", "scale")},
        },
        "additionalProperties": False,
    }
    return {**definitions(), "step": step}


LINE = Line(
    KEY,
    _read,
    _schema,
    definitions=_definitions,
    propose=_propose,
    proposes_several_models=True,
)
