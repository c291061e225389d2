"""The recipe: the mergekit YAML of a layout, both ways.

Reading follows mergekit's own rules: a condition's filter is a substring of the tensor's name,
the first condition that matches counts, a source's conditions come before those of its slice and
module, and a list of numbers is a gradient over the layers of the slice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from mergekit_interleave import yamltext
from mergekit_interleave.errors import DirectiveError, LayoutError, RefusedError
from mergekit_interleave.layout import MAX_LAYERS, Layout, Scale, Scales, Slice
from mergekit_interleave.reference import ModelRef, parse_model


def to_document(
    layout: Layout,
    mergekit: Mapping[str, object],
    name: Callable[[ModelRef], object] = ModelRef.to_yaml,
) -> dict[str, object]:
    """The mergekit config of a layout.

    Args:
        layout: What to write.
        mergekit: mergekit's own keys to carry along, such as dtype.
        name: What to call each model, wherever it is named.
    """

    def named(value: object) -> object:
        """A model's name within the tokenizer's settings, which also hold other text."""
        if isinstance(value, Mapping):
            return {key: named(entry) for key, entry in value.items()}
        return name(models[value]) if isinstance(value, str) and value in models else value

    models = {str(model): model for model in layout.models}
    keys = dict(mergekit)
    if "base_model" in keys:
        base = parse_model(keys["base_model"], "base_model")
        models[str(base)] = base
        keys["base_model"] = name(base)
    source = keys.get("tokenizer_source")
    if isinstance(source, str) and source not in ("base", "union"):
        models[source] = parse_model(source, "tokenizer_source")
    for key in ("tokenizer", "tokenizer_source"):
        if key in keys:
            keys[key] = named(keys[key])
    return {
        "slices": [{"sources": [_source(part, name(part.model))]} for part in layout.slices],
        "merge_method": "passthrough",
        **keys,
    }


def to_yaml(
    layout: Layout,
    mergekit: Mapping[str, object],
    name: Callable[[ModelRef], object] = ModelRef.to_yaml,
) -> str:
    """The mergekit config of a layout as YAML text; see `to_document`."""
    return yamltext.write(to_document(layout, mergekit, name))


def _source(part: Slice, model: object) -> dict[str, object]:
    source: dict[str, object] = {"model": model, "layer_range": [part.start, part.stop]}
    if part.scales:
        source["parameters"] = {"scale": [_condition(scale) for scale in part.scales]}
    return source


def _condition(scale: Scale) -> dict[str, object]:
    value: dict[str, object] = {"value": scale.value}
    return value if scale.filter is None else {"filter": scale.filter, **value}


def from_document(
    document: Mapping[str, object], depth_of: Callable[[ModelRef], int | None]
) -> Layout:
    """Read the `slices:`, `models:` or `modules:` of a mergekit passthrough config.

    Args:
        document: One of these keys with its value.
        depth_of: The number of layers of a model, None where it cannot be known.

    Raises:
        DirectiveError: mergekit would not accept it, or passthrough cannot mean it.
        RefusedError: It grows more than one module.
        LayoutError: The depth of a model is needed and not known, or there are too many layers.
    """
    module_scales: Scales = ()
    if "modules" in document:
        document, module_scales = _only_module(document["modules"])
    if "models" in document:
        return _whole_model(document["models"], module_scales, depth_of)
    slices: list[Slice] = []
    total = 0
    for i, entry in enumerate(_list(document.get("slices"), "slices")):
        where = f"slices[{i}]"
        sources = _list(_mapping(entry, where).get("sources"), f"{where}.sources")
        source = _mapping(_one(sources, f"{where}.sources"), f"{where}.sources[0]")
        model, start, stop = _model_and_range(source, f"{where}.sources[0]")
        total += stop - start
        if total > MAX_LAYERS:
            raise LayoutError(f"more than {MAX_LAYERS} layers would come of this")
        settings = [
            (_parameters(source, f"{where}.sources[0]"), f"{where}.sources[0].parameters.scale"),
            (_parameters(_mapping(entry, where), where), f"{where}.parameters.scale"),
        ]
        slices += _slices(Slice(model, start, stop), settings, module_scales)
    return Layout(tuple(slices))


@dataclass(frozen=True)
class _Condition:
    """A scale as mergekit writes it: one value, or a gradient over the slice."""

    filter: str | None
    values: tuple[float, ...]

    def at(self, t: float) -> Scale:
        """The scale at a place in the slice, 0 at its first layer and 1 at its last."""
        place = t * (len(self.values) - 1)
        low = int(place)
        high = min(len(self.values) - 1, low + 1)
        share = place - low
        value = (1 - share) * self.values[low] + share * self.values[high]
        return Scale(self.values[0] if len(self.values) == 1 else value, self.filter)


def _slices(whole: Slice, settings: list[tuple[object, str]], module_scales: Scales) -> list[Slice]:
    """One slice, or one a layer where a gradient makes its layers differ."""
    conditions = [
        condition
        for setting, where in settings
        if setting is not None
        for condition in _conditions(setting, where)
    ]

    def scales_at(t: float) -> Scales:
        return (*(condition.at(t) for condition in conditions), *module_scales)

    count = len(whole)
    if count == 1 or all(len(condition.values) == 1 for condition in conditions):
        return [Slice(whole.model, whole.start, whole.stop, scales_at(1))]
    return [
        Slice(whole.model, whole.start + i, whole.start + i + 1, scales_at(i / (count - 1)))
        for i in range(count)
    ]


def _conditions(setting: object, where: str) -> list[_Condition]:
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list) or not any(isinstance(entry, Mapping) for entry in setting):
        return [_Condition(None, _values(setting, where))]
    conditions = []
    for i, entry in enumerate(setting):
        condition = _mapping(entry, f"{where}[{i}]")
        name = condition.get("filter")
        if name is not None and not isinstance(name, str):
            raise DirectiveError(f"{where}[{i}].filter: expected a name, found {name!r}")
        values = _values(condition.get("value"), f"{where}[{i}].value")
        conditions.append(_Condition(None if name == "*" else name, values))
    return conditions


def _values(value: object, where: str) -> tuple[float, ...]:
    entries = value if isinstance(value, list) and value else [value]
    return tuple(_number(entry, where) for entry in entries)


def _number(value: object, where: str) -> float:
    if isinstance(value, str | float | int) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)
    raise DirectiveError(f"{where}: expected a number, found {value!r}")


def _parameters(owner: Mapping[str, object], where: str) -> object:
    """The scale setting among an owner's parameters; passthrough knows no other parameter."""
    parameters = owner.get("parameters")
    if parameters is None:
        return None
    return _mapping(parameters, f"{where}.parameters").get("scale")


def _only_module(modules: object) -> tuple[Mapping[str, object], Scales]:
    entries = _mapping(modules, "modules")
    if len(entries) != 1:
        raise RefusedError(f"modules: expected one module, found {', '.join(entries) or 'none'}")
    name, value = next(iter(entries.items()))
    module = _mapping(value, f"modules.{name}")
    setting = _parameters(module, f"modules.{name}")
    where = f"modules.{name}.parameters.scale"
    conditions = [] if setting is None else _conditions(setting, where)
    # mergekit reads a module's gradient over each slice; nobody has been seen to write one.
    if any(len(condition.values) > 1 for condition in conditions):
        raise RefusedError(f"{where}: a gradient belongs to a slice")
    return module, tuple(condition.at(0) for condition in conditions)


def _whole_model(
    models: object, module_scales: Scales, depth_of: Callable[[ModelRef], int | None]
) -> Layout:
    entry = _mapping(_one(_list(models, "models"), "models"), "models[0]")
    model = parse_model(entry.get("model"), "models[0].model")
    depth = depth_of(model)
    if depth is None:
        raise LayoutError(
            f"the number of layers of {model} is not known", hint="state it: --layers N"
        )
    settings = [(_parameters(entry, "models[0]"), "models[0].parameters.scale")]
    return Layout(tuple(_slices(Slice(model, 0, depth), settings, module_scales)))


def _model_and_range(source: Mapping[str, object], where: str) -> tuple[ModelRef, int, int]:
    model = parse_model(source.get("model"), f"{where}.model")
    bounds = source.get("layer_range")
    match bounds:
        case [int(start), int(stop)] if 0 <= start < stop:
            return model, start, stop
    raise DirectiveError(
        f"{where}.layer_range: expected [START, STOP] with START below STOP, found {bounds!r}"
    )


def _one(items: list[object], where: str) -> object:
    if len(items) != 1:
        raise DirectiveError(f"{where}: passthrough takes one source, found {len(items)}")
    return items[0]


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise DirectiveError(f"{where}: expected a list, found {value!r}")
    return value


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise DirectiveError(f"{where}: expected a mapping, found {value!r}")
    return value
