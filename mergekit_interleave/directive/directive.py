"""Parse a file, inline text or flags into one validated `Directive`.

A directive is a mergekit config in which one growth line replaces `slices:`. mergekit's own keys
are passed on unchanged; any other unknown key is an error. A mergekit passthrough config is a
directive too: its growth is its explicit slices.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from string import ascii_lowercase
from typing import IO, Any

from mergekit_interleave import _dtypes
from mergekit_interleave.directive import linear, mergekit_keys, yaml_io
from mergekit_interleave.directive.growth import (
    After,
    Every,
    ExplicitSlices,
    Growth,
    Repeat,
    Spread,
    registry,
    windows,
)
from mergekit_interleave.directive.growth.base import Named, positive
from mergekit_interleave.directive.growth.repeat import DAMPED
from mergekit_interleave.directive.mergekit_keys import EXPLICIT_KEYS, MERGEKIT_KEYS, METHOD
from mergekit_interleave.directive.model_ref import (
    ModelRef,
    is_directory_or_file,
    parse_model,
    with_revision,
)
from mergekit_interleave.directive.scale import (
    APPLY_TO,
    NONE,
    Scales,
    Zero,
    check_disjoint,
    parse_scale,
    parse_scale_flag,
    parse_zero,
    scale_document,
    zero_document,
)
from mergekit_interleave.errors import DirectiveError, check_keys, nearest

DTYPES = tuple(_dtypes.NAMED)
"""The dtypes that weights can be converted to; mergekit's int64 would destroy them."""

_INLINE = "the directive"
_STDIN = "standard input"
_EVERY_4 = "interleave: every 4"
_SHORTEST = f"the shortest directive is `{_EVERY_4}`"

NAME = "name"
"""mergekit-multi's name for the result of a document; only streams use it."""

FROM, NEIGHBOURS = "from", "neighbours"

OWN_KEYS = ("model", "revision", "models", "layers", "zero", "scale", "apply_to", FROM)
"""This project's own keys, except the growth lines."""


@dataclass(frozen=True)
class Directive:
    """A validated directive, checked as far as possible without the model.

    Attributes:
        growth: The growth line, if there is one.
        model: The source model, if it is named.
        models: The source models by their short names.
        layers: The stated depth, for a model whose config cannot be read.
        zero: What to zero in the new layers; None means the default of the growth line.
        scale: The factors for the tensors of the new layers.
        apply_to: Which of several equal layers `zero` and `scale` apply to; None means the copies.
        mergekit: mergekit's own keys, in the order of the document.
        name: mergekit-multi's name for the result.
        from_: What the weights of the new layers are taken from: `neighbours`, or None for copies.
        damped: Whether the growth line of the directive that this one is joined to is damped.
        warnings: Warnings for the user, one sentence each; ignored in comparisons.
    """

    growth: Growth | None = None
    model: ModelRef | None = None
    models: Mapping[str, ModelRef] = field(default_factory=dict)
    layers: int | None = None
    zero: Zero | None = None
    scale: Scales | None = None
    apply_to: str | None = None
    mergekit: Mapping[str, object] = field(default_factory=dict)
    name: str | None = None
    from_: str | None = None
    damped: bool = False
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def zero_rule(self) -> Zero:
        """The rule for zeroing: `zero` if it is stated, else the default of the growth line."""
        if self.zero is not None:
            return self.zero
        return NONE if self.growth is None else self.growth.default_zero

    @property
    def needs_model(self) -> bool:
        """Whether some layers come from `model`."""
        return self.growth is None or self.growth.needs_model

    def check(self) -> None:
        """Reject keys that would have no effect.

        Raises:
            DirectiveError: A model is not used, or `apply_to` is set without `zero` or `scale`.
        """
        used = () if self.growth is None else self.growth.models
        if self.models and not used and self.growth is not None:
            raise DirectiveError(
                "models: this growth line takes only one model",
                hint="name it with `model:`; only `layout:` takes several",
            )
        for name, model in self.models.items():
            if model not in used and model != self.model:
                raise DirectiveError(
                    f"models: no step uses {name}",
                    hint="`layout:` takes layers of several models",
                )
        if self.apply_to is not None and self.zero_rule == NONE and not self.scale:
            raise DirectiveError(
                "apply_to: has no effect without `zero` or `scale`",
                hint="for example `scale: {q_proj: 0.84}`",
            )
        check_disjoint(self.zero, self.scale or ())
        if self.growth is not None and self.growth.damping > 1:
            self._check_damped()
        if self.from_ is not None and not isinstance(self.growth, Every | Spread | After):
            raise DirectiveError(
                f"{FROM}: only the new layers of `interleave` have a layer before and one behind",
                hint="for example `interleave: every 5, from: neighbours`",
            )

    def _check_damped(self) -> None:
        stated = {
            "zero": self.zero not in (None, NONE),
            "scale": self.scale is not None,
            "apply_to": self.apply_to is not None,
        }
        for key, is_stated in stated.items():
            if is_stated:
                raise DirectiveError(
                    f"{key}: cannot be combined with `damped`, which sets the factors itself",
                    hint=f"leave out `damped` or `{key}`; `scale` with `apply_to: all` sets any "
                    "other factors",
                )

    def replaced_by(self, flags: Directive) -> Directive:
        """Return this directive, with the values that `flags` states taking precedence."""
        changes = {
            name: getattr(flags, name)
            for name in ("growth", "model", "layers", "zero", "scale", "apply_to", "from_")
            if getattr(flags, name) is not None
        }
        if flags.damped:
            changes["growth"] = None if self.growth is None else _damped(self.growth)
            changes["damped"] = self.growth is None
        if flags.growth is not None:
            changes["models"] = flags.models
            if self.growth is not None and not (self.model or flags.model):
                changes["model"] = _sole_model(self.growth)
        return dataclasses.replace(
            self,
            mergekit={**self.mergekit, **flags.mergekit},
            warnings=(*self.warnings, *flags.warnings),
            **changes,
        )

    def _models_by_short_name(self) -> dict[str, ModelRef]:
        """Return every model by short name, or no models if none of them has one.

        If one model has a short name, the full name of another would be ambiguous.
        """
        models = dict(self.models)
        if not models:
            return models
        used = [*(() if self.growth is None else self.growth.models)]
        used += [] if self.model is None else [self.model]
        free = (name for i in count() for name in (f"m{i}",) if name not in self.models)
        for model in used:
            if model not in models.values():
                models[next(free)] = model
        return models

    def to_document(
        self, name: Callable[[ModelRef], object] = ModelRef.to_yaml
    ) -> dict[str, object]:
        """Return the directive as a YAML document, with explicit slices unchanged.

        Args:
            name: Returns the name to write for a model.
        """
        models = self._models_by_short_name()
        short = {model: key for key, model in models.items()}

        def called(model: ModelRef) -> object:
            return short[model] if model in short else name(model)

        document: dict[str, object] = {} if self.name is None else {NAME: self.name}
        if self.model is not None:
            document["model"] = called(self.model)
        if models:
            document["models"] = {key: name(model) for key, model in models.items()}
        if self.layers is not None:
            document["layers"] = self.layers
        if self.growth is not None:
            document |= self.growth.to_document(called)
        if self.zero is not None:
            document["zero"] = zero_document(self.zero)
        if self.scale is not None:
            document["scale"] = scale_document(self.scale)
        if self.from_ is not None:
            document[FROM] = self.from_
        if self.apply_to is not None:
            document["apply_to"] = self.apply_to
        return {**document, **self.mergekit}


def _sole_model(growth: Growth) -> ModelRef | None:
    """Return the only model that a growth line names, for a growth flag that replaces the line.

    Raises:
        DirectiveError: The growth line names several models.
    """
    models = growth.models
    if len(models) > 1:
        where = "the mergekit config" if isinstance(growth, ExplicitSlices) else "the layout"
        raise DirectiveError(
            f"a growth line that replaces others needs one model, and {where} names {len(models)}",
            hint="name the model with `model` (--model)",
        )
    return next(iter(models), None)


def load(source: str, stdin: IO[str]) -> Directive:
    """Read a directive from a file, from standard input (`-`) or from inline text.

    Raises:
        DirectiveError: There is no such file, or its content is not a directive.
    """
    return parse(*read_text(source, stdin))


def read_text(source: str, stdin: IO[str]) -> tuple[str, str]:
    """Return the text of a directive and its name in error messages.

    An existing file takes precedence over inline text. Text without `: ` is taken as a file name.

    Raises:
        DirectiveError: There is no such file.
    """
    if source == "-":
        return _read(stdin.read, _STDIN), _STDIN
    if not source.strip():
        raise DirectiveError("the directive is empty", hint=_SHORTEST)
    path = Path(source)
    if _is_file(path):
        return _read_file(path), source
    if is_inline(source):
        return source, _INLINE
    if path.is_dir():
        raise DirectiveError(
            f"{source}: is a directory, not a directive",
            hint=f"pass it as the model: --model {source}",
        )
    right = corrected(source)
    if right is None:
        raise DirectiveError(f"{source}: no such file")
    raise DirectiveError(
        f"{source!r} is neither a file nor a directive",
        hint=f"an inline directive needs a colon and a space after each key: '{right}'",
    )


def corrected(text: str) -> str | None:
    """Return a valid directive for a text that lacks a colon or a space.

    Return None if the text is the name of a file.
    """
    match = re.match(r"\s*(\w+)(?:\s+|[:=])(.+)", text)
    if match is not None and match[1] in known_keys():
        value = match[2].lstrip(":= ")
        meant = (f"{match[1]}: {value}", f"{match[1]}: {re.sub('[-_=]', ' ', value)}")
        return next(filter(_is_valid, meant), _EVERY_4)
    return _EVERY_4 if re.search(r":\S", text) and not Path(text).suffix else None


def _is_valid(text: str) -> bool:
    """Whether a text is a directive."""
    try:
        parse(text, _INLINE)
    except DirectiveError:
        return False
    return True


def is_inline(text: str) -> bool:
    """Whether a text is an inline directive rather than a file name."""
    return bool(re.search(r":(\s|$)", text)) or text.lstrip().startswith("{")


def is_directive_file(name: str) -> bool:
    """Whether a file is meant as a directive: it is one, or it is YAML or JSON by its name."""
    try:
        load_file(Path(name))
    except DirectiveError:
        return Path(name).suffix in {".yml", ".yaml", ".json"}
    return True


def load_file(path: Path) -> Directive:
    """Read a directive from a file.

    Raises:
        DirectiveError: The file cannot be read, or its content is not a directive.
    """
    return parse(_read_file(path), str(path))


def _read_file(path: Path) -> str:
    def read() -> str:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read(_LONGEST + 1)

    text = _read(read, str(path))
    if len(text) > _LONGEST:
        raise DirectiveError(f"{path}: file too large (limit {_LONGEST:,} characters)")
    return text


_LONGEST = 2**24
"""The maximum length of a file in characters; several thousand slices take a tenth of that."""


def _is_file(path: Path) -> bool:
    """Whether `path` exists and is not a directory; False if it is not a valid path."""
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):
        return False


def _read(read: Callable[[], str], name: str) -> str:
    try:
        return read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DirectiveError(f"{name}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise DirectiveError(f"{name}: {error.strerror or error}") from error


def parse(text: str, where: str) -> Directive:
    """Parse one directive document, or the one-line form `key: value, key: value`.

    Args:
        text: YAML.
        where: The name of the text in error messages.

    Raises:
        DirectiveError: The text is not a directive.
    """
    return of_document(yaml_io.read(text, where, known_keys()), where)


def of_document(document: object, where: str) -> Directive:
    """Build a directive from a parsed document of any type.

    Args:
        document: The document.
        where: The name of the document in error messages.

    Raises:
        DirectiveError: The document is not a directive.
    """
    if not isinstance(document, dict):
        raise DirectiveError(
            f"{where}: expected `key: value` lines, found {_kind(document)}",
            hint=_SHORTEST,
        )
    try:
        return from_document(document)
    except DirectiveError as error:
        if where == _INLINE:
            raise
        hint = _other_file(document) or error.hint
        raise DirectiveError(f"{where}: {error}", hint=hint) from error


def _other_file(document: Mapping[Any, object]) -> str | None:
    """Return a hint if a document is another file of a model."""
    if "model_type" in document:
        return "this is the config.json of a model: name the model's directory instead"
    if {"fingerprint", "layers", "directive"} <= document.keys():
        return "this is the interleave.json of a model: name the mergekit_config.yml beside it"
    return None


def from_document(document: Mapping[Any, object]) -> Directive:
    """Build a directive from a mapping that was read from YAML.

    Raises:
        DirectiveError: A key or value is wrong, or there are two growth lines.
    """
    lines = [key for key in registry.LINES if key in document]
    if METHOD in document and any(document.get(key) for key in ("slices", "modules")):
        lines = []  # mergekit ignores any key that it does not know, even one of ours
    # `models:` is mergekit's list of whole models; beside a growth line it is short names.
    explicit = [key for key in EXPLICIT_KEYS if document.get(key) is not None]
    explicit = [key for key in explicit if document[key]] or explicit[:1]
    if lines or isinstance(document.get("models"), Mapping):
        explicit = [key for key in explicit if key != "models"]
    if len(lines + explicit) > 1:
        two = (lines + explicit)[:2]
        raise DirectiveError(
            f"two growth lines: `{two[0]}` and `{two[1]}`", hint="keep one of them"
        )
    if explicit:
        return _mergekit_config(linear.as_passthrough(document), explicit[0])
    _check_known(document, known_keys())
    for key, value in document.items():
        if value is None and key in known_keys():
            raise DirectiveError(f"{key}: has no value")
    directive = _grown(document, lines[0] if lines else None)
    if directive.growth is not None:
        directive.check()
    return directive


def _mergekit_config(document: Mapping[Any, object], key: str) -> Directive:
    """Parse a mergekit config, whose layers are under `key`.

    A document with `merge_method` is a config whatever else it has, because mergekit requires that
    key. Without it, one of our keys beside `slices` is a mistake.
    """
    own = [name for name in OWN_KEYS if name in document and name not in EXPLICIT_KEYS]
    if own and METHOD not in document:
        raise DirectiveError(
            f"`{own[0]}` cannot be combined with `{key}`, which already sets it per layer",
            hint=f"leave `{own[0]}` out",
        )
    if isinstance(document.get("models"), Mapping) and key != "models":
        raise DirectiveError(
            f"`models` cannot be combined with `{key}`, which already sets it per layer",
            hint="leave `models` out",
        )
    others = {*EXPLICIT_KEYS} - {key}  # mergekit accepts them if they are empty
    stated = {name: value for name, value in document.items() if name not in others}
    kept, warnings = mergekit_keys.effective(stated)
    return Directive(
        growth=ExplicitSlices({key: kept[key]}),
        mergekit=_mergekit_keys(kept, parse_model),
        name=_name(kept),
        warnings=warnings,
    )


def _grown(document: Mapping[Any, object], line: str | None) -> Directive:
    """Parse a document that is not a mergekit config, after its keys have been checked."""
    models = _short_names(document["models"], "models") if "models" in document else {}
    found = {model.identity: model for model in models.values()}

    def named(value: object, where: str) -> ModelRef:
        if isinstance(value, str) and value in models:
            return models[value]
        model = parse_model(value, where)
        if models and isinstance(value, str) and not _may_be_a_model(value):
            raise DirectiveError(
                f"{where}: {value} is not a short name in `models`",
                hint=f"the short names are {', '.join(models)}",
            )
        # Different spellings of one directory are the same model.
        return found.setdefault(model.identity, model)

    own = {key: value for key, value in document.items() if key in MERGEKIT_KEYS}
    keys, warnings = mergekit_keys.effective(own) if own else ({}, ())
    return Directive(
        growth=None if line is None else registry.LINES[line].read(document[line], line, named),
        model=_model(document, named),
        models=models,
        layers=parse_layers(document["layers"], "layers") if "layers" in document else None,
        zero=parse_zero(document["zero"], "zero") if "zero" in document else None,
        scale=parse_scale(document["scale"], "scale") if "scale" in document else None,
        apply_to=_apply_to(document["apply_to"], "apply_to") if "apply_to" in document else None,
        from_=_from(document[FROM], FROM) if FROM in document else None,
        mergekit=_mergekit_keys(keys, named),
        name=_name(document),
        warnings=warnings,
    )


def _model(document: Mapping[Any, object], named: Named) -> ModelRef | None:
    """Read `model` and the `revision` beside it."""
    model = named(document["model"], "model") if "model" in document else None
    if "revision" not in document:
        return model
    if model is None:
        raise DirectiveError(
            "revision: there is no `model` beside it",
            hint="write the revision with the model: `model: org/name@revision`",
        )
    return with_revision(model, document["revision"], "revision")


def _may_be_a_model(name: str) -> bool:
    return "/" in name or is_directory_or_file(name)


def _name(document: Mapping[Any, object]) -> str | None:
    name = document.get(NAME)
    if name is not None and (not isinstance(name, str | int) or isinstance(name, bool)):
        raise DirectiveError(f"{NAME}: expected a name, found {name!r:.80}")
    return None if name is None else str(name)


def known_keys() -> tuple[str, ...]:
    """Return all keys of directives and of mergekit configs."""
    return (*registry.LINES, *OWN_KEYS, *MERGEKIT_KEYS, *EXPLICIT_KEYS, NAME)


def _check_known(document: Mapping[Any, object], known: Collection[str]) -> None:
    """Check the keys of a document that is not a mergekit config."""
    flags = registry.flags()
    for key in document:
        if key in ("times", "as", DAMPED) and "repeat" in document:
            example = {"times": "times: 3", "as": "as: block", DAMPED: "damped: true"}[key]
            raise DirectiveError(
                f"unknown key '{key}'", hint=f"write `repeat: {{layers: [8, 24], {example}}}`"
            )
        if key not in known and key in flags and flags[key].in_yaml:
            raise DirectiveError(f"unknown key '{key}'", hint=f"write `{flags[key].in_yaml}`")
        check_keys([key], known)


def _short_names(value: object, where: str) -> dict[str, ModelRef]:
    """Read `models`: a mapping from short names to models, or a list, named a, b, c, ..."""
    if isinstance(value, list) and 0 < len(value) <= len(ascii_lowercase):
        value = dict(zip(ascii_lowercase, value, strict=False))
    if not isinstance(value, Mapping) or not value:
        raise DirectiveError(
            f"{where}: expected a mapping from short names to models, found {value!r:.200}",
            hint="for example `models: {a: org/one, b: org/two}`",
        )
    models: dict[str, ModelRef] = {}
    for name, model in value.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^\s:,]+", name):
            raise DirectiveError(
                f"{where}: {name!r:.80} is not a valid short name",
                hint="use a word without spaces, colons and commas, such as a or big",
            )
        if name == windows.KEY:
            raise DirectiveError(
                f"{where}: the short name `{name}` is reserved", hint="choose another short name"
            )
        found = parse_model(model, f"{where}.{name}")
        same = (known for known in models.values() if known.identity == found.identity)
        models[name] = next(same, found)
    return models


def _apply_to(value: object, where: str) -> str:
    if value not in APPLY_TO:
        close = nearest(str(value), APPLY_TO)
        raise DirectiveError(
            f"{where}: expected one of {', '.join(APPLY_TO)}, found {value!r:.80}",
            hint=f"did you mean {close}?" if close else None,
        )
    return str(value)


def _from(value: object, where: str) -> str:
    if value not in (NEIGHBOURS, "neighbors"):
        raise DirectiveError(f"{where}: expected `{NEIGHBOURS}`, found {value!r:.80}")
    return NEIGHBOURS


def from_flags(**flags: str | None) -> Directive:
    """Parse command-line flags, or Python keywords of the same names.

    Args:
        flags: The values by name: `OWN_FLAGS` and the growth flags of the registry.

    Raises:
        DirectiveError: A value is wrong, or there are two growth lines.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    check_keys(given, (*registry.flags(), *OWN_FLAGS))
    lines = [name for name in registry.flags() if name in given]
    if len(lines) > 1:
        raise DirectiveError(
            f"two growth lines: `{lines[0]}` and `{lines[1]}`",
            hint=f"keep either --{lines[0]} or --{lines[1]}",
        )
    read: dict[str, Callable[[str, str], object]] = {
        "model": parse_model,
        "layers": parse_layers,
        "zero": parse_zero,
        "scale": parse_scale_flag,
        "apply_to": _apply_to,
        "from_": _from,
    }
    stated = {
        name: reader(given[name], name.rstrip("_"))
        for name, reader in read.items()
        if name in given
    }
    damped = _is_damped(given.get(DAMPED, "false"), DAMPED)
    growth = registry.from_flag(lines[0], given[lines[0]]) if lines else None
    return Directive(
        growth=_damped(growth) if damped and growth is not None else growth,
        damped=damped and growth is None,
        mergekit={"dtype": _dtype(given["dtype"], "dtype")} if "dtype" in given else {},
        **stated,  # type: ignore[arg-type]
    )


def _is_damped(value: str, where: str) -> bool:
    if value not in ("true", "false"):
        raise DirectiveError(f"{where}: expected true or false, found {value!r:.80}")
    return value == "true"


def _damped(growth: Growth) -> Growth:
    if not isinstance(growth, Repeat):
        raise DirectiveError(
            f"{DAMPED}: only `repeat` can be damped",
            hint="for example `repeat: {layers: [12, 16], damped: true}`",
        )
    return dataclasses.replace(growth, damped=True)


OWN_FLAGS = ("model", "layers", "zero", "scale", "apply_to", "from_", "dtype", DAMPED)
"""The flags that correspond to a key of a directive, except the growth flags."""


def parse_layers(value: object, where: str) -> int:
    """Read a depth: the number of layers of a model.

    Raises:
        DirectiveError: The value is not a positive whole number.
    """
    return positive(value, where)


def _dtype(value: object, where: str) -> str:
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPES:
        guess = _dtypes.ALIASES.get(str(name)) or nearest(str(name), DTYPES)
        raise DirectiveError(
            f"{where}: weights cannot be converted to {value!r}",
            hint=f"did you mean {guess}?" if guess else f"use one of {', '.join(DTYPES)}",
        )
    return str(value)


def _mergekit_keys(document: Mapping[str, object], named: Named) -> dict[str, object]:
    keys = {key: value for key, value in document.items() if key in MERGEKIT_KEYS}
    if isinstance(keys.get("base_model"), str):
        keys["base_model"] = named(keys["base_model"], "base_model").to_yaml()
    if isinstance(keys.get("tokenizer_source"), str) and keys["tokenizer_source"] not in (
        "union",
        "base",
    ):
        source = named(keys["tokenizer_source"], "tokenizer_source")
        keys["tokenizer_source"] = source.to_yaml()
    method = keys.pop("merge_method", "passthrough")
    if method != "passthrough":
        typo = nearest(str(method), ["passthrough"]) or "passthrough".startswith(str(method))
        raise DirectiveError(
            f"merge_method: {method!r} is not supported; only passthrough keeps layers unchanged",
            hint="did you mean `passthrough`?"
            if typo
            else "run that merge with mergekit-yaml first and then grow its result",
        )
    for key in ("dtype", "out_dtype"):
        if key in keys:
            _dtype(keys[key], key)
    return keys


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}
    return names.get(type(value), repr(value))
