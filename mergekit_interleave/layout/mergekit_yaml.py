"""Convert a layout to mergekit YAML (the recipe) and back.

Parsing follows mergekit's rules: the filter of a condition is a substring of the tensor's name; the
first matching condition applies; the conditions of a source come before those of its slice and
its module; a list of numbers is a gradient over the layers of the slice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from mergekit_interleave import _out_files
from mergekit_interleave._limits import MAX_LAYERS
from mergekit_interleave.architectures import family as families
from mergekit_interleave.directive import linear, yaml_io
from mergekit_interleave.directive.layer_range import unknown_depth
from mergekit_interleave.directive.mergekit_keys import FILL, GAIN, MEAN
from mergekit_interleave.directive.model_ref import ModelRef, parse_model
from mergekit_interleave.directive.scale import Scale, Scales
from mergekit_interleave.errors import DirectiveError, LayoutError, RefusedError, check_keys
from mergekit_interleave.layout.layout import Constant, Layout, Slice

FILE = _out_files.RECIPE
"""The name of the recipe in the output of mergekit and of `run`."""


GROWN = "text_decoder"
"""mergekit's name for the language model within a multimodal model."""


def to_document(
    layout: Layout,
    mergekit: Mapping[str, object],
    name: Callable[[ModelRef], object] = ModelRef.to_yaml,
    modules: Mapping[str, int | None] | None = None,
    architectures: Mapping[ModelRef, str] | None = None,
) -> dict[str, object]:
    """Return the mergekit config of a layout.

    Args:
        layout: The layout.
        mergekit: mergekit's own keys to pass on, such as dtype.
        name: Returns the name to write for a model.
        modules: The modules of a multimodal model by mergekit's names, each with its number of
            layers, or None for the module that the layout describes.
        architectures: The class name of each model. Only layouts with means need it, whose config
            is that of a linear merge; without it, the config is one that only this project reads.
    """
    keys = dict(mergekit)
    if "base_model" in keys:
        keys["base_model"] = name(parse_model(keys["base_model"], "base_model"))
    if "tokenizer_source" in keys:
        keys["tokenizer_source"] = _named_source(keys["tokenizer_source"], name)
    tokenizer = keys.get("tokenizer")
    if isinstance(tokenizer, Mapping):
        keys["tokenizer"] = _named_tokenizer(tokenizer, name)
    slices = [{"sources": [_source(part, name(part.model))]} for part in layout.slices]
    model = layout.slices[0].model
    body: dict[str, object] = {"slices": slices}
    if modules:
        written = {
            module: slices
            if count is None
            else [{"sources": [_source(Slice(model, 0, count), name(model))]}]
            for module, count in modules.items()
        }
        body = {"modules": {module: {"slices": parts} for module, parts in written.items()}}
    document = {**body, "merge_method": "passthrough", **keys}
    means = {part.model for part in layout.slices if part.mean_with is not None}
    if not means or architectures is None:
        return document
    named = {linear.key_of(name(model)): architectures.get(model) for model in means}
    return linear.from_passthrough(document, named)


def _named_source(source: object, name: Callable[[ModelRef], object]) -> object:
    return source if source in ("union", "base") else name(parse_model(source, "tokenizer_source"))


def _named_tokenizer(
    tokenizer: Mapping[str, object], name: Callable[[ModelRef], object]
) -> dict[str, object]:
    """Return the tokenizer section with its models renamed."""
    named = dict(tokenizer)
    if "source" in named:
        named["source"] = _named_source(named["source"], name)
    tokens = named.get("tokens")
    if isinstance(tokens, Mapping):
        named["tokens"] = {token: _named_token(how, name) for token, how in tokens.items()}
    return named


def _named_token(how: object, name: Callable[[ModelRef], object]) -> object:
    if not isinstance(how, Mapping) or "source" not in how:
        return how
    source = how["source"]
    if isinstance(source, Mapping) and "kind" in source:
        renamed = dict(source)
        if "model" in renamed:
            renamed["model"] = name(parse_model(renamed["model"], "tokenizer.tokens"))
        return {**how, "source": renamed}
    return {**how, "source": name(parse_model(source, "tokenizer.tokens"))}


def check_keys_of_mergekit(mergekit: Mapping[str, object]) -> None:
    """Check mergekit's own keys as mergekit would, before anything is written.

    Raises:
        DirectiveError: mergekit would reject a key, or ignore a part of it.
    """
    if "base_model" in mergekit:
        parse_model(mergekit["base_model"], "base_model")
    if "tokenizer" in mergekit and "tokenizer_source" in mergekit:
        raise DirectiveError(
            "tokenizer, tokenizer_source: mergekit accepts only one of them",
            hint="remove one of them",
        )
    if "tokenizer_source" in mergekit:
        _named_source(mergekit["tokenizer_source"], str)
    if "tokenizer" in mergekit:
        tokenizer = _mapping(mergekit["tokenizer"], "tokenizer")
        check_keys(tokenizer, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
        multiple = tokenizer.get("pad_to_multiple_of", 1)
        if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
            raise DirectiveError(
                "tokenizer.pad_to_multiple_of: expected a positive whole number, "
                f"found {multiple!r}"
            )
        for token, how in _mapping(tokenizer.get("tokens", {}), "tokenizer.tokens").items():
            where = f"tokenizer.tokens.{token}"
            check_keys(_mapping(how, where), ("source", "force"), where)
            source = _mapping(how, where).get("source")
            kind = source.get("kind", "zero") if isinstance(source, Mapping) else "zero"
            if kind not in ("zero", "model_token"):
                raise DirectiveError(
                    f"{where}.source.kind: expected `zero` or `model_token`, found {kind!r}"
                )
        _named_tokenizer(tokenizer, str)
    if not isinstance(mergekit.get("chat_template", ""), str):
        raise DirectiveError("chat_template: expected `auto`, a name or a template")
    _global_scales(mergekit)


def effective(layout: Layout, mergekit: Mapping[str, object]) -> Layout:
    """Return the layout with the scales of mergekit's top-level `parameters` in every slice."""
    scales = _global_scales(mergekit)
    return Layout(tuple(replace(part, scales=(*part.scales, *scales)) for part in layout.slices))


def dtypes_of(mergekit: Mapping[str, object]) -> tuple[str | None, str | None]:
    """Return the dtypes that mergekit converts to on reading and writing; None keeps the dtype."""

    def stated(key: str) -> str | None:
        return str(mergekit[key]).removeprefix("torch.") if key in mergekit else None

    return stated("dtype"), stated("out_dtype")


def dtype_of(mergekit: Mapping[str, object]) -> str | None:
    """Return the dtype that mergekit writes, or None if each tensor keeps its own."""
    read, written = dtypes_of(mergekit)
    return written or read


def changes_tokenizer(mergekit: Mapping[str, object]) -> bool:
    """Whether mergekit writes a tokenizer that differs from that of the base."""
    return any(key in mergekit for key in ("tokenizer", "tokenizer_source", "chat_template"))


def changes_vocabulary(mergekit: Mapping[str, object]) -> bool:
    """Whether mergekit computes new embeddings and a new head for another tokenizer."""
    return any(key in mergekit for key in ("tokenizer", "tokenizer_source"))


def _global_scales(mergekit: Mapping[str, object]) -> Scales:
    setting = _parameters(mergekit, "")
    return () if setting is None else _level_scales(setting, "parameters.scale")


def _level_scales(setting: object, where: str) -> Scales:
    """Return the scales of a module or of the whole config, which must not be gradients."""
    conditions = _conditions(setting, where)
    if any(len(condition.values) > 1 for condition in conditions):
        raise RefusedError(f"{where}: a gradient is only possible in a slice")
    return tuple(condition.at(0) for condition in conditions)


def to_yaml(
    layout: Layout,
    mergekit: Mapping[str, object],
    name: Callable[[ModelRef], object] = ModelRef.to_yaml,
    modules: Mapping[str, int | None] | None = None,
    architectures: Mapping[ModelRef, str] | None = None,
) -> str:
    """Return the mergekit config of a layout as YAML text; see `to_document`.

    Comments list the edits that mergekit cannot represent.
    """
    comments = [f"# not supported by mergekit: {edit}\n" for edit in _unsupported_edits(layout)]
    document = to_document(layout, mergekit, name, modules, architectures)
    return "".join(comments) + yaml_io.write(document)


def check_representable(layout: Layout) -> None:
    """Check that a mergekit config can represent a layout.

    Raises:
        RefusedError: The layout has an edit that mergekit does not support.
    """
    for edit in _unsupported_edits(layout):
        raise RefusedError(
            f"a mergekit config cannot represent this edit: {edit}",
            hint="write the model from the same directive with `mk-interleave run`",
        )


def _unsupported_edits(layout: Layout) -> list[str]:
    constants = dict.fromkeys(c for layer in layout.new_layers for c in layer.constants)
    gains = dict.fromkeys(s for layer in layout.layers for s in layer.scales if s.fixed)
    return [
        *(
            f"in the new layers, {constant.filter.strip('.')} is filled with {constant.value:g}"
            for constant in constants
        ),
        *(
            f"{-gain.fixed:g} + {str(gain.filter).strip('.')} is multiplied by {gain.value:g}"
            for gain in gains
        ),
    ]


def _source(part: Slice, model: object) -> dict[str, object]:
    source: dict[str, object] = {"model": model, "layer_range": [part.start, part.stop]}
    parameters: dict[str, object] = {}
    plain = [_condition(scale) for scale in part.scales if not scale.fixed]
    gains = [{**_condition(scale), "fixed": scale.fixed} for scale in part.scales if scale.fixed]
    if plain:
        parameters["scale"] = plain
    if gains:
        parameters[GAIN] = gains
    if part.mean_with is not None:
        parameters[MEAN] = part.mean_with
    if part.constants:
        parameters[FILL] = [_fill(constant) for constant in part.constants]
    if parameters:
        source["parameters"] = parameters
    return source


def _fill(constant: Constant) -> dict[str, object]:
    rows = {"after": constant.after, "square": constant.square}
    stated = {name: count for name, count in rows.items() if count is not None}
    return {"filter": constant.filter, "value": constant.value, **stated}


def _constants(source: Mapping[str, object], where: str) -> tuple[Constant, ...]:
    """Parse the constants of a source; no other level has constants."""
    constants = []
    for entry, place in _entries(source, where, FILL, ("filter", "value", "after", "square")):
        name, after, square = entry.get("filter"), entry.get("after"), entry.get("square")
        if (
            not isinstance(name, str)
            or not isinstance(after, int | None)
            or not isinstance(square, int | None)
        ):
            raise DirectiveError(f"{place}: expected a filter and a value, found {entry!r}")
        constants.append(Constant(_number(entry.get("value"), place), name, after, square))
    return tuple(constants)


def _entries(
    source: Mapping[str, object], where: str, parameter: str, keys: Sequence[str]
) -> Iterator[tuple[Mapping[str, object], str]]:
    """Yield the entries of one of this project's own parameters, each with its place."""
    parameters = source.get("parameters")
    written = parameters.get(parameter) if isinstance(parameters, Mapping) else None
    place = f"{where}.parameters.{parameter}"
    for i, item in enumerate([] if written is None else _list(written, place)):
        entry = _mapping(item, f"{place}[{i}]")
        check_keys(entry, keys, f"{place}[{i}]")
        yield entry, f"{place}[{i}]"


def _gains(source: Mapping[str, object], where: str) -> Scales:
    """Parse the factors with a fixed number of a source; no other level has them."""
    gains = []
    for entry, place in _entries(source, where, GAIN, ("filter", "value", "fixed")):
        name = entry.get("filter")
        value, fixed = (_number(entry.get(key), f"{place}.{key}") for key in ("value", "fixed"))
        if not isinstance(name, str) or not value or not fixed:
            raise DirectiveError(
                f"{place}: expected a filter, a value and a fixed number, found {entry!r}"
            )
        gains.append(Scale(value, name, fixed))
    return tuple(gains)


def _mean_with(source: Mapping[str, object], where: str, length: int) -> int | None:
    """Parse the second source layer of a layer that is a mean."""
    parameters = source.get("parameters")
    value = parameters.get(MEAN) if isinstance(parameters, Mapping) else None
    if value is not None and (_index(value) < 0 or length > 1):
        raise DirectiveError(f"{where}.parameters.{MEAN}: expected the index of a layer")
    return None if value is None else _index(value)


def _condition(scale: Scale) -> dict[str, object]:
    value: dict[str, object] = {"value": scale.value}
    return value if scale.filter is None else {"filter": scale.filter, **value}


def from_document(
    document: Mapping[str, object], depth_of: Callable[[ModelRef], int | None]
) -> Layout:
    """Parse the `slices:`, `models:` or `modules:` of a mergekit passthrough config.

    Args:
        document: One of these keys with its value.
        depth_of: Returns the number of layers of a model, or None if it is unknown.

    Raises:
        DirectiveError: mergekit would reject the config, or it is not a passthrough merge.
        RefusedError: The config changes more than one module, or has a gradient that slices
            cannot represent.
        LayoutError: The depth of a model is needed but unknown, or there are too many layers.
    """
    module_scales: Scales = ()
    if "modules" in document:
        document, module_scales = _only_module(document["modules"])
    if "models" in document:
        return _whole_model(document["models"], module_scales, depth_of)
    entries = _list(document.get("slices"), "slices")
    known: dict[object, ModelRef] = {}
    slices: list[Slice] = []
    total = 0
    for i, entry in enumerate(entries):
        where, place = f"slices[{i}]", f"slices[{i}].sources[0]"
        written = _mapping(entry, where)
        check_keys(written, ("sources", "parameters", "base_model", "residual_weight"), where)
        source = _mapping(
            _one(_list(written.get("sources"), f"{where}.sources"), f"{where}.sources"), place
        )
        check_keys(source, ("model", "layer_range", "parameters"), place)
        model, start, stop = _model_and_range(source, place)
        # Different spellings of one directory are the same model.
        model = known.setdefault(model.identity, model)
        total += stop - start
        if total > MAX_LAYERS:
            raise LayoutError(f"the result would have more than {MAX_LAYERS} layers")
        settings = [
            (_parameters(source, place), f"{place}.parameters.scale"),
            (_parameters(written, where), f"{where}.parameters.scale"),
        ]
        edge = (i == 0 and stop - start == 1) or i == len(entries) - 1
        gains, constants = _gains(source, place), _constants(source, place)
        mean_with = _mean_with(source, place, stop - start)
        whole = Slice(model, start, stop, gains, constants, mean_with=mean_with)
        slices += _slices(whole, settings, module_scales, edge=edge)
    return Layout(tuple(slices))


@dataclass(frozen=True)
class _Condition:
    """A scale in mergekit's form: one value, or a gradient over the slice."""

    filter: str | None
    values: tuple[float, ...]

    def at(self, t: float) -> Scale:
        """Return the scale at a position in the slice, from 0 (first layer) to 1 (last layer)."""
        place = t * (len(self.values) - 1)
        low = int(place)
        high = min(len(self.values) - 1, low + 1)
        share = place - low
        value = (1 - share) * self.values[low] + share * self.values[high]
        return Scale(self.values[0] if len(self.values) == 1 else value, self.filter)


def _slices(
    whole: Slice, settings: list[tuple[object, str]], module_scales: Scales, *, edge: bool
) -> list[Slice]:
    """Return one slice, or one per layer if a gradient makes the layers differ.

    In the first and last slice, mergekit also applies the gradient to tensors outside the layers,
    which slices without a gradient cannot represent.
    """
    conditions = [
        condition
        for setting, where in settings
        if setting is not None
        for condition in _conditions(setting, where)
    ]

    if edge and any(
        len(set(condition.values)) > 1 and families.may_be_outside(condition.filter)
        for condition in conditions
    ):
        raise RefusedError(
            f"{settings[0][1]}: a gradient in the first or last slice also scales tensors "
            "outside the layers",
            hint="write one slice per layer, each with a single value",
        )

    def scales_at(t: float) -> Scales:
        return (*whole.scales, *(condition.at(t) for condition in conditions), *module_scales)

    count = len(whole)
    if count == 1 or all(len(condition.values) == 1 for condition in conditions):
        return [replace(whole, scales=scales_at(1))]
    layers = range(whole.start, whole.stop)
    return [
        replace(whole, start=layer, stop=layer + 1, scales=scales_at(i / (count - 1)))
        for i, layer in enumerate(layers)
    ]


def _conditions(setting: object, where: str) -> list[_Condition]:
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list) or not any(isinstance(entry, Mapping) for entry in setting):
        return [_Condition(None, _values(setting, where))]
    conditions = []
    for i, entry in enumerate(setting):
        condition = _mapping(entry, f"{where}[{i}]")
        check_keys(condition, ("filter", "value"), f"{where}[{i}]")
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
        with suppress(ValueError, OverflowError):
            return float(value)
    raise DirectiveError(f"{where}: expected a number, found {value!r}")


def _parameters(owner: Mapping[str, object], where: str) -> object:
    """Return the `scale` setting of an entry; passthrough has no other parameter."""
    parameters = owner.get("parameters")
    if parameters is None:
        return None
    place = f"{where}.parameters" if where else "parameters"
    known = ("scale", FILL, GAIN, MEAN) if where.endswith("sources[0]") else ("scale",)
    check_keys(_mapping(parameters, place), known, place)
    return _mapping(parameters, place).get("scale")


def _only_module(modules: object) -> tuple[Mapping[str, object], Scales]:
    """Return the only module that the config may change, and the scales of that module."""
    entries = _mapping(modules, "modules")
    name = GROWN if GROWN in entries else next(iter(entries), "none")
    for other, value in entries.items():
        if other != name and _whole(value) is None:
            raise RefusedError(f"modules.{other}: is changed, but only {name} may be changed")
    value = entries.get(name)
    where = f"modules.{name}"
    module = _mapping(value, where)
    check_keys(module, ("slices", "models", "parameters"), where)
    setting = _parameters(module, where)
    scales = () if setting is None else _level_scales(setting, f"{where}.parameters.scale")
    return module, scales


def other_modules(document: Mapping[str, object]) -> dict[str, int]:
    """Return the modules that are copied whole, except the grown one, with their layer counts."""
    entries = document.get("modules")
    counts = {n: _whole(m) for n, m in entries.items()} if isinstance(entries, Mapping) else {}
    return {name: count for name, count in counts.items() if count is not None and name != GROWN}


def _whole(module: object) -> int | None:
    """Return the layer count of a module that is one slice from layer 0 without parameters."""
    match module:
        case {"slices": [{"sources": [{"layer_range": [0, int(count)], **source}], **others}]}:
            return None if others or source.keys() - {"model"} else count
    return None


def _whole_model(
    models: object, module_scales: Scales, depth_of: Callable[[ModelRef], int | None]
) -> Layout:
    entry = _mapping(_one(_list(models, "models"), "models"), "models[0]")
    check_keys(entry, ("model", "parameters"), "models[0]")
    model = parse_model(entry.get("model"), "models[0].model")
    depth = depth_of(model)
    if depth is None:
        raise unknown_depth(model, "`models` without a range takes all of them")
    settings = [(_parameters(entry, "models[0]"), "models[0].parameters.scale")]
    return Layout(tuple(_slices(Slice(model, 0, depth), settings, module_scales, edge=True)))


def _model_and_range(source: Mapping[str, object], where: str) -> tuple[ModelRef, int, int]:
    model = parse_model(source.get("model"), f"{where}.model")
    bounds = source.get("layer_range")
    match bounds:
        case [start, stop] if 0 <= _index(start) < _index(stop):
            return model, _index(start), _index(stop)
    raise DirectiveError(
        f"{where}.layer_range: expected [START, STOP] with START less than STOP, found {bounds!r}"
    )


def _index(value: object) -> int:
    """Return a layer index, which mergekit also reads from `"8"` and `8.0`; -1 for all else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def _one(items: list[object], where: str) -> object:
    if len(items) != 1:
        raise DirectiveError(f"{where}: passthrough takes exactly one source, found {len(items)}")
    return items[0]


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise DirectiveError(f"{where}: expected a list, found {value!r}")
    return value


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise DirectiveError(f"{where}: expected a mapping, found {value!r}")
    return value
