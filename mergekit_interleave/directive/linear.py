"""Convert configs with means between the form of this project and mergekit's linear merges. Pure.

In this project's form, a layer that is the mean of two layers has one source, with the parameter
`mean_with`. mergekit's passthrough cannot compute a mean, so for mergekit the whole config becomes
a linear merge whose weights are not normalized: 1 for a plain copy, 1/2 for both layers of a mean,
and 0 for what is zeroed.

mergekit refuses two sources with the same model (`Duplicate merge inputs`), so the second source of
a mean names its class, `override_architecture`, or, if that is unknown, the Hub's default revision.
Neither changes anything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from mergekit_interleave.directive.mergekit_keys import MEAN, METHOD
from mergekit_interleave.directive.model_ref import ModelRef, parse_model
from mergekit_interleave.errors import DirectiveError

LINEAR = "linear"
_ARCHITECTURE, _DEFAULT_REVISION = "override_architecture", "main"
_PARAMETERS = {"weight": 1, "normalize": False}
"""The parameters of the whole config: the weight of all that no source sets."""

Document: TypeAlias = "Mapping[Any, Any]"


def key_of(model: object) -> str:
    """Return a key for a model as it is written, a string or a mapping."""
    return json.dumps(model, sort_keys=True)


def from_passthrough(document: Document, architectures: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the linear merge of a config in which some layers are means.

    Args:
        document: The config.
        architectures: The class name of each model whose layers are averaged, by `key_of`.

    Raises:
        DirectiveError: A class name is unknown, or the config scales all slices.
    """
    if "parameters" in document:
        raise DirectiveError(
            "parameters: cannot be combined with `from`", hint="use `scale` for the new layers"
        )

    def slices(parts: Sequence[Document]) -> list[dict[str, Any]]:
        return [{"sources": _linear(part["sources"][0], architectures)} for part in parts]

    body = {**document, METHOD: LINEAR, "parameters": dict(_PARAMETERS)}
    return _with_slices(body, slices)


def _with_slices(document: dict[str, Any], change: Any) -> dict[str, Any]:
    """Return a config with its slices changed, or those of each of its modules."""
    if "modules" in document:
        modules = {
            name: {**module, "slices": change(module["slices"])}
            for name, module in document["modules"].items()
        }
        return {**document, "modules": modules}
    return {**document, "slices": change(document["slices"])}


def _linear(source: Document, architectures: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Return the sources of a layer, or of several, in a linear merge."""
    parameters = dict(source.get("parameters", {}))
    other = parameters.pop(MEAN, None)
    scales = parameters.pop("scale", [])
    if other is None:
        weights = {"weight": scales} if scales else {}
        plain = {k: v for k, v in source.items() if k != "parameters"}
        return [{**plain, **_parameters({**weights, **parameters})}]
    scales = scales or [{"value": 1.0}]
    weights = {"weight": [{**scale, "value": scale["value"] / 2} for scale in scales]}
    alias = _alias(source["model"], architectures.get(key_of(source["model"])))
    first = {**source, **_parameters({**weights, **parameters})}
    second = {"model": alias, "layer_range": [other, other + 1], **_parameters(weights)}
    return [first, second]


def _parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"parameters": parameters} if parameters else {}


def _alias(model: object, architecture: str | None) -> dict[str, Any]:
    """Return a model under a name that mergekit takes for another model.

    Raises:
        DirectiveError: There is no such name.
    """
    if not isinstance(model, Mapping):
        model = {"model": parse_model(model, "model").model.to_mapping()}
    if architecture is not None:
        return {**model, _ARCHITECTURE: architecture}
    if "revision" in model["model"]:
        raise DirectiveError(
            f"from: mergekit needs the class name of {model['model']['path']}, which is unknown",
            hint="leave the revision out, or download the model",
        )
    return {**model, "model": {**model["model"], "revision": _DEFAULT_REVISION}}


def as_passthrough(document: Document) -> Document:
    """Return the config of a linear merge in this project's form.

    Any other config, and a linear merge that `from_passthrough` does not write, is returned as it
    is.
    """
    if document.get(METHOD) != LINEAR or document.get("parameters") != _PARAMETERS:
        return document
    try:
        found = _with_slices(dict(document), _passthrough)
    except (KeyError, TypeError, ValueError, AttributeError):
        return document
    del found["parameters"]
    return {**found, METHOD: "passthrough"}


def _passthrough(slices: Any) -> list[dict[str, Any]]:
    """Return slices in this project's form.

    Raises:
        Exception: They have another form.
    """
    return [{"sources": [_single(*part["sources"])]} for part in slices]


def _single(first: Document, second: Document | None = None) -> dict[str, Any]:
    """Return the sources of a slice as one."""
    parameters = dict(first.get("parameters", {}))
    weights = parameters.pop("weight", [])
    source = {key: value for key, value in first.items() if key != "parameters"}
    if second is None:
        plain = {"scale": weights} if weights else {}
        return {**source, **_parameters({**plain, **parameters})}
    (start, stop), (other, end) = source["layer_range"], second["layer_range"]
    if (stop - start, end - other) != (1, 1) or second["parameters"] != {"weight": weights}:
        raise ValueError("not a mean of two layers")
    named, alias = parse_model(source["model"], ""), parse_model(second["model"], "")
    if named not in (replace(alias, override_architecture=None), _at_no_revision(alias)):
        raise ValueError("not a mean of layers of one model")
    scales = [{**weight, "value": weight["value"] * 2} for weight in weights]
    changed = {"scale": scales} if scales != [{"value": 1.0}] else {}
    return {**source, "parameters": {**changed, MEAN: other, **parameters}}


def _at_no_revision(model: ModelRef) -> ModelRef | None:
    """Return a model at the default revision without it; None for any other model."""
    if model.model.revision != _DEFAULT_REVISION:
        return None
    return replace(model, model=replace(model.model, revision=None))
