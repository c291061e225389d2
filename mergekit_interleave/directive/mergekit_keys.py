"""The keys of a mergekit config that have an effect on a passthrough merge.

mergekit 0.1.5 ignores every key that it does not know, in every mapping of a config. People use
such keys to define YAML anchors, and copy parameters of other merge methods. They are left out,
with one warning. What mergekit refuses is refused here or by `layout.mergekit_yaml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_interleave.directive.model_ref import parse_model, with_revision
from mergekit_interleave.errors import DirectiveError, nearest

EXPLICIT_KEYS = ("slices", "models", "modules")
"""The keys of a mergekit config that list every layer; each takes the place of a growth line."""

METHOD = "merge_method"

MERGEKIT_KEYS = (
    METHOD,
    "base_model",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "parameters",
)

FILL, GAIN, MEAN = "fill", "gain", "mean_with"
"""Parameters of a source that only this project uses; mergekit ignores them."""

_PATH: dict[str, Any] = {"path": {}, "revision": {}}
_MODEL = {"model": _PATH, "lora": _PATH, "override_architecture": {}, "revision": {}}
_PARAMETERS: dict[str, Any] = {"scale": {"filter": {}, "value": {}}}
_ENTRY = {"model": _MODEL, "revision": {}, "parameters": _PARAMETERS}
_SOURCE = {**_ENTRY, "layer_range": {}, "parameters": {**_PARAMETERS, FILL: {}, GAIN: {}, MEAN: {}}}
_SLICES = {"sources": _SOURCE, "parameters": _PARAMETERS}
_MODULE = {"slices": _SLICES, "models": _ENTRY, "parameters": _PARAMETERS}
_TOKEN = {"source": {**_MODEL, "kind": {}, "token": {}, "token_id": {}}, "force": {}}
_ANY = "*"  # stands for any key

_CONFIG: dict[str, Any] = {
    **{key: {} for key in MERGEKIT_KEYS},
    "base_model": _MODEL,
    "tokenizer_source": _MODEL,
    "tokenizer": {"source": _MODEL, "tokens": {_ANY: _TOKEN}, "pad_to_multiple_of": {}},
    "parameters": _PARAMETERS,
    "slices": _SLICES,
    "models": _ENTRY,
    "modules": {_ANY: _MODULE},
    "name": {},
}
"""The keys with an effect, each with those of the mapping, or of the list of mappings, under it.
An empty mapping stands for a value whose own keys are not checked here."""


@dataclass
class _Found:
    """What was left out or rewritten, each under the name for the warning."""

    ignored: dict[str, None] = field(default_factory=dict)
    revisions: dict[str, None] = field(default_factory=dict)

    def warnings(self) -> tuple[str, ...]:
        """Return one warning for all ignored keys, and one for revisions beside a model."""
        told = []
        if self.ignored:
            one = len(self.ignored) == 1
            keys, they = ("this key", "it has") if one else ("these keys", "they have")
            told.append(f"{_list(self.ignored)}: mergekit ignores {keys}, so {they} no effect")
        if self.revisions:
            told.append(
                f"{_list(self.revisions)}: mergekit-yaml itself ignores `revision` beside `model`; "
                "here the model is read at that revision"
            )
        return tuple(told)


def _list(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


_SHOWN = 10
_TYPO = 0.75
"""The similarity to a known key above which an ignored key is probably a typo."""


def effective(document: Mapping[Any, object]) -> tuple[dict[str, object], tuple[str, ...]]:
    """Leave out the keys of a mergekit config that have no effect on a passthrough merge.

    Args:
        document: A whole config, or only mergekit's own keys of a directive.

    Returns:
        The config without these keys, with `revision:` joined to its `model:`, and the warnings.

    Raises:
        DirectiveError: mergekit would refuse a parameter, even one that passthrough does not use.
    """
    found = _Found()
    stated = {k: v for k, v in document.items() if v is not None or k not in _CONFIG or k == METHOD}
    return _kept(stated, _CONFIG, "", found), found.warnings()


def _kept(value: Mapping[Any, object], known: Mapping[str, Any], where: str, found: _Found) -> Any:
    kept: dict[str, object] = {}
    for key, entry in value.items():
        place = f"{where}.{key}" if where else str(key)
        inner = known.get(key, known.get(_ANY)) if isinstance(key, str) else None
        if inner is None:
            if known is _PARAMETERS or FILL in known:
                _check_setting(entry, place)
            guess = nearest(str(key), [k for k in known if k not in EXPLICIT_KEYS], _TYPO)
            found.ignored[f"{place} (did you mean `{guess}`?)" if guess else place] = None
        else:
            kept[key] = _inside(entry, inner, place, found)
            if key == "parameters" and kept[key] == {}:
                del kept[key]
    if "revision" in kept and known is not _PATH:
        found.revisions[f"{where}.revision"] = None
        if known is not _MODEL:  # a model's own mapping is parsed with its revision
            model = parse_model(kept.get("model"), f"{where}.model")
            revision = kept.pop("revision")
            kept["model"] = with_revision(model, revision, f"{where}.revision").to_yaml()
    return kept


def _inside(value: object, known: Mapping[str, Any], place: str, found: _Found) -> object:
    """Return a value without the ignored keys of its mapping, or of each mapping in its list."""
    if not known:
        return value
    if isinstance(value, Mapping):
        return _kept(value, known, place, found)
    if isinstance(value, list):
        return [_inside(entry, known, f"{place}[]", found) for entry in value]
    return value


def _check_setting(value: object, where: str) -> None:
    """Check a parameter as mergekit does: a value, a list of values, or conditions with values.

    Raises:
        DirectiveError: mergekit would refuse it.
    """
    entries = value if isinstance(value, list) else [value]
    conditions = [entry for entry in entries if isinstance(entry, Mapping)]
    values = [entry.get("value") for entry in conditions] if conditions else [value]
    mixed = bool(conditions) and len(conditions) < len(entries)
    if mixed or not all(map(_is_value, values)):
        raise DirectiveError(
            f"{where}: expected a value, a list of values or conditions, found {value!r:.80}",
            hint="leave it out: a passthrough merge has no parameter except `scale`",
        )


def _is_value(value: object) -> bool:
    entries = value if isinstance(value, list) else [value]
    return all(isinstance(entry, bool | int | float | str) for entry in entries)
