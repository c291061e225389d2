"""Growth lines as people write them: in YAML, as text, and as flags."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.growth import (
    Append,
    Drop,
    Every,
    ExplicitSlices,
    Growth,
    Part,
    Repeat,
    Spread,
    Stack,
    Step,
    Windows,
)
from mergekit_interleave.directive.layer_range import BOUND, END, Range, parse_range
from mergekit_interleave.directive.model_ref import ModelRef
from mergekit_interleave.directive.scale import (
    check_apart,
    parse_scale,
    parse_zero,
    scale_document,
    zero_document,
)
from mergekit_interleave.errors import DirectiveError, check_keys

Named: TypeAlias = Callable[[object, str], ModelRef]
"""Which model is meant by a name or short name, and what to blame in an error."""

KEYS = ("interleave", "append", "repeat", "stack", "windows", "drop", "layout")
FLAGS = ("every", "add", "append", "repeat", "stack", "windows", "drop")


def has_line(keys: Collection[object]) -> bool:
    """Whether there is a growth line among the keys of a document."""
    return any(key in keys for key in KEYS)


def read(key: str, value: object, named: Named) -> Growth:
    """Read the value of a growth line.

    Args:
        key: One of `KEYS`.
        value: What YAML has for it.
        named: Which model is meant by a name.

    Raises:
        DirectiveError: It says nothing that the key can mean.
    """
    match key:
        case "interleave":
            return _interleave(value, key)
        case "append":
            return Append(positive(value, key))
        case "repeat":
            return _repeat(value, key)
        case "stack":
            return _stack(value, key)
        case "windows":
            return _windows(value, key)
        case "drop":
            return _drop(value, key)
    return _layout(value, key, named)


def from_flag(name: str, value: str) -> Growth:
    """Read a growth flag.

    Args:
        name: One of `FLAGS`.
        value: As it was typed.

    Raises:
        DirectiveError: It says nothing that the flag can mean.
    """
    where = f"--{name}"
    match name:
        case "every":
            return Every(positive(value, where))
        case "add":
            return Spread(positive(value, where))
        case "append":
            return Append(positive(value, where))
    written = yaml_io.read(value, where) if yaml_io.is_structured(value) else value
    match name:
        case "repeat":
            return _repeat(written, where)
        case "windows":
            return _windows(written, where)
        case "drop":
            return _drop(written, where)
    return _stack(written, where)


def _interleave(value: object, where: str) -> Growth:
    match str(value).split() if isinstance(value, str) else None:
        case ["every", n] | ["every", n, "layers" | "layer"]:
            return Every(positive(re.sub(r"(?<=\d)(st|nd|rd|th)$", "", n), f"{where}: every {n}"))
        case [count, "layers" | "layer"]:
            return Spread(positive(count, f"{where}: {count} layers"))
    raise DirectiveError(
        f"{where}: expected `every N` or `K layers`, found {value!r:.200}",
        hint="`interleave: every 4` adds a layer after every 4th, `interleave: 8 layers` adds 8",
    )


_RANGE = rf"(?:{BOUND}):(?:{BOUND})"
_LAYERS = re.compile(rf"(?P<range>{_RANGE})(?:x(?P<times>\d+))?(?:@(?P<form>layers|block))?")
_WINDOWS = re.compile(rf"(?P<size>\d+):(?P<stride>\d+)(?:@(?P<over>{_RANGE}))?")

WINDOWS = "windows"
"""The word that stands before windows as text."""


def _part(text: str, where: str) -> tuple[str | None, Part]:
    """Read a part as text, its model apart: `a 8:24x3@block`, `windows 20:10@0:80`."""
    before, _, last = text.strip().rpartition(" ")
    model, _, word = before.strip().rpartition(" ")
    if word == WINDOWS:
        return model.strip() or None, Part(_windows(last, where))
    match = _LAYERS.fullmatch(last)
    if match is None or before.rstrip().endswith(","):
        if re.fullmatch(r"[^:]+:[^:]+", last):
            parse_range(last, where)  # which says what is wrong with it
        raise DirectiveError(
            f"{where}: expected START:STOP, found {text!r:.200}",
            hint="for example 8:24, 8:24x3, 8:24x3@block or -8:end",
        )
    times = positive(match["times"] or 1, f"{where}.times")
    layers = parse_range(match["range"], where)
    return before.strip() or None, Part(layers, times=times, as_block=match["form"] == "block")


def _repeat(value: object, where: str) -> Repeat:
    times: object = 2
    form: object = "layers"
    if isinstance(value, str):
        model, part = _part(value.replace(" ", ""), where)
        if model is not None or isinstance(part.layers, Windows):
            raise DirectiveError(f"{where}: expected START:STOP, found {value!r:.200}")
        layers = part.layers
        times = part.times if "x" in value else times
        form = "block" if part.as_block else form
    elif isinstance(value, Mapping):
        check_keys(value, ("layers", "times", "as"), where)
        layers = parse_range(value.get("layers"), where)
        times = value.get("times", times)
        form = value.get("as", form)
    else:
        layers = parse_range(value, where)
    count = positive(times, f"{where}.times")
    if count < 2:  # noqa: PLR2004 - once is no repetition
        raise DirectiveError(f"{where}.times: {count} adds nothing; the total is at least 2")
    return Repeat(layers, count, _is_block(form, where))


def _is_block(form: object, where: str) -> bool:
    if form not in ("layers", "block"):
        raise DirectiveError(f"{where}.as: expected `layers` or `block`, found {form!r:.80}")
    return form == "block"


def _windows(value: object, where: str) -> Windows:
    if isinstance(value, str):
        match = _WINDOWS.fullmatch(value.replace(" ", ""))
        if match is not None:
            over = parse_range(match["over"], where) if match["over"] else (0, END)
            return _checked(match["size"], match["stride"], over, where)
    if not isinstance(value, Mapping):
        raise DirectiveError(
            f"{where}: expected a size and a stride, found {value!r:.200}",
            hint="for example `windows: {size: 20, stride: 10}` or `--windows 20:10`",
        )
    check_keys(value, ("size", "stride", "layers"), where)
    for key in ("size", "stride"):
        if key not in value:
            raise DirectiveError(
                f"{where}: the {key} is missing", hint="`windows: {size: 20, stride: 10}`"
            )
    over = parse_range(value["layers"], f"{where}.layers") if "layers" in value else (0, END)
    return _checked(value.get("size"), value.get("stride"), over, where)


def _checked(size: object, stride: object, layers: Range, where: str) -> Windows:
    windows = Windows(positive(size, f"{where}.size"), positive(stride, f"{where}.stride"), layers)
    if windows.stride > windows.size:
        raise DirectiveError(
            f"{where}: a stride of {windows.stride} leaves out layers between windows of "
            f"{windows.size}",
            hint="`drop:` leaves layers out",
        )
    return windows


def _drop(value: object, where: str) -> Drop:
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, list) and value and all(isinstance(v, list) or _is_text(v) for v in value):
        return Drop(tuple(parse_range(part, f"{where}[{i}]") for i, part in enumerate(value)))
    return Drop((parse_range(value, where),))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and ":" in value


def _stack(value: object, where: str) -> Stack:
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list) or not value:
        raise DirectiveError(
            f"{where}: expected a list of ranges, found {value!r:.200}",
            hint="for example `stack: [[0, 24], [8, 32]]` or `--stack 0:24,8:32`",
        )

    def refuse(*_: object) -> ModelRef:
        raise DirectiveError(
            f"{where}: its ranges are of one model", hint="`layout:` takes several models"
        )

    steps = tuple(
        Step((_plain_part(entry, f"{where}[{i}]", refuse),)) for i, entry in enumerate(value)
    )
    return Stack(steps)


def _plain_part(value: object, where: str, named: Named) -> Part:
    if isinstance(value, str):
        model, part = _part(value, where)
        return part if model is None else _of(part, named(model, where))
    if isinstance(value, Mapping) and "windows" in value:
        check_keys(value, ("windows",), where)
        return Part(_windows(value["windows"], where))
    return Part(parse_range(value, where))


def _of(part: Part, model: ModelRef) -> Part:
    return Part(part.layers, model, part.times, part.as_block)


def _layout(value: object, where: str, named: Named) -> Stack:
    if not isinstance(value, list) or not value:
        raise DirectiveError(
            f"{where}: expected a list of steps, found {value!r:.200}",
            hint="for example `layout: [0:24, {layers: [8, 32], zero: [o_proj, down_proj]}]`",
        )
    return Stack(tuple(_step(entry, f"{where}[{i}]", named) for i, entry in enumerate(value)))


_STEP_KEYS = ("model", "layers", "windows", "times", "as", "zero", "scale")


def _step(value: object, where: str, named: Named) -> Step:
    if not isinstance(value, Mapping):
        return Step((_plain_part(value, where, named),))
    if "layer_range" in value:
        raise DirectiveError(f"{where}: unknown key 'layer_range'", hint="did you mean `layers`?")
    check_keys(value, _STEP_KEYS, where)
    model = named(value["model"], f"{where}.model") if "model" in value else None
    times = positive(value.get("times", 1), f"{where}.times")
    as_block = _is_block(value.get("as", "layers"), where)
    if "windows" in value:
        if "layers" in value:
            raise DirectiveError(
                f"{where}: `layers` and `windows`: write `windows: {{size: ..., layers: [...]}}`"
            )
        parts = [Part(_windows(value["windows"], f"{where}.windows"))]
    else:
        parts = _parts(value.get("layers", [0, END]), f"{where}.layers", named)
    if any(part.model is not None for part in parts) and model is not None:
        raise DirectiveError(f"{where}: the model is named twice")
    if "times" in value or "as" in value:
        if "times" in value and any(part.times > 1 for part in parts):
            raise DirectiveError(f"{where}: `times` is said twice")
        if any(isinstance(part.layers, Windows) for part in parts):
            raise DirectiveError(f"{where}: windows are not repeated", hint="write them twice")
    parts = [
        Part(
            part.layers,
            part.model or model,
            times if "times" in value else part.times,
            as_block if "as" in value else part.as_block,
        )
        for part in parts
    ]
    zero = parse_zero(value["zero"], f"{where}.zero") if "zero" in value else None
    scale = parse_scale(value["scale"], f"{where}.scale") if "scale" in value else ()
    check_apart(zero, scale, f"{where}: ")
    return Step(tuple(parts), zero, scale)


def _parts(value: object, where: str, named: Named) -> list[Part]:
    """One range, or a list of parts."""
    if isinstance(value, list) and any(isinstance(v, list) or _is_text(v) for v in value):
        return [_plain_part(entry, f"{where}[{i}]", named) for i, entry in enumerate(value)]
    return [_plain_part(value, where, named)]


def positive(value: object, where: str) -> int:
    """Read a whole number from 1 on.

    Raises:
        DirectiveError: It is none.
    """
    number = _whole(value, where)
    if number < 1:
        raise DirectiveError(f"{where}: must be at least 1, found {number}")
    return number


def _whole(value: object, where: str) -> int:
    digits = 18  # beyond it Python would spend long on the conversion, and nobody means it
    if isinstance(value, str) and re.fullmatch(rf"\s*[+-]?\d{{1,{digits}}}\s*", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**digits:
        return value
    raise DirectiveError(f"{where}: expected a whole number, found {value!r:.200}")


def document(growth: Growth, called: Callable[[ModelRef], object]) -> dict[str, object]:
    """The growth line as YAML.

    Args:
        growth: What it says.
        called: The name or short name of a model.
    """
    match growth:
        case Every(n):
            return {"interleave": f"every {n}"}
        case Spread(count):
            return {"interleave": f"{count} layers"}
        case Append(count):
            return {"append": count}
        case Repeat(layers, times, as_block):
            plain = (times, as_block) == (2, False)
            return {"repeat": list(layers) if plain else _text(layers, times, 2, as_block=as_block)}
        case Windows():
            return {"windows": _windows_document(growth)}
        case Drop(ranges):
            alone = len(ranges) == 1
            return {"drop": list(ranges[0]) if alone else [list(part) for part in ranges]}
        case Stack(steps):
            key = "stack" if growth.is_plain else "layout"
            entries = [_step_documents(step, called) for step in steps]
            return {key: [entry for group in entries for entry in group]}
        case ExplicitSlices(written):
            return dict(written)


def _windows_document(windows: Windows) -> dict[str, object]:
    written: dict[str, object] = {"size": windows.size, "stride": windows.stride}
    return written if windows.layers == (0, END) else {**written, "layers": list(windows.layers)}


def _part_document(part: Part, called: Callable[[ModelRef], object]) -> object:
    name = None if part.model is None else called(part.model)
    alone = name is None and part.times == 1
    if isinstance(part.layers, Windows):
        bounds = part.layers.layers
        over = "" if bounds == (0, END) else f"@{bounds[0]}:{bounds[1]}"
        text = f"{WINDOWS} {part.layers.size}:{part.layers.stride}{over}"
    elif alone:
        return list(part.layers)
    else:
        text = _text(part.layers, part.times, 1, as_block=part.as_block)
    if name is None:
        return text
    if isinstance(name, str) and _says_again(f"{name} {text}", name):
        return f"{name} {text}"
    return None


def _text(layers: Range, times: int, usual: int, *, as_block: bool) -> str:
    """A range as text, with how often where that is not the usual."""
    again = f"x{times}" if times != usual else ""
    return f"{layers[0]}:{layers[1]}{again}{'@block' if as_block else ''}"


def _says_again(text: str, name: str) -> bool:
    """Whether a model's name survives as text before its layers."""
    try:
        return _part(text, "")[0] == name
    except DirectiveError:
        return False


def _step_documents(step: Step, called: Callable[[ModelRef], object]) -> list[object]:
    """A step as an entry; several where nothing is done to its parts."""
    written = [_part_document(part, called) for part in step.parts]
    rule: dict[str, object] = {}
    if step.zero is not None:
        rule["zero"] = zero_document(step.zero)
    if step.scale:
        rule["scale"] = scale_document(step.scale)
    if not rule and all(text is not None for text in written):
        return written
    if all(text is not None for text in written):
        return [{"layers": written if len(written) > 1 else written[0], **rule}]
    return [{**_mapping(part, called), **rule} for part in step.parts]


def _mapping(part: Part, called: Callable[[ModelRef], object]) -> dict[str, object]:
    entry: dict[str, object] = {} if part.model is None else {"model": called(part.model)}
    if isinstance(part.layers, Windows):
        entry["windows"] = _windows_document(part.layers)
    else:
        entry["layers"] = list(part.layers)
    if part.times > 1:
        entry["times"] = part.times
    if part.as_block:
        entry["as"] = "block"
    return entry
