"""A reference to a model: a directory or a Hub id, with an optional revision or LoRA.

The forms are those of mergekit: `path`, `org/name@revision`, `base+adapter`, or the mapping
`{model: {path: ..., revision: ...}, lora: ...}`. The mapping `{model: ..., revision: ...}` is
understood, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from mergekit_interleave.errors import DirectiveError, check_keys

YamlMapping: TypeAlias = "dict[str, object]"


@dataclass(frozen=True)
class ModelPath:
    """A directory, or a Hub id with an optional revision."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path

    @property
    def is_plain(self) -> bool:
        """Whether mergekit reads `str(self)` back as the same path and revision."""
        return not any(mark in part for part in (self.path, self.revision or "") for mark in "+@")

    def to_mapping(self) -> YamlMapping:
        """Return the mapping form, which is never ambiguous."""
        mapping: YamlMapping = {"path": self.path}
        if self.revision:
            mapping["revision"] = self.revision
        return mapping


@dataclass(frozen=True)
class ModelRef:
    """A source model, as written. Two revisions are two models."""

    model: ModelPath
    lora: ModelPath | None = None
    override_architecture: str | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)

    @property
    def identity(self) -> object:
        """A key that is equal for different spellings of one model."""
        local = is_directory_or_file(self.path)  # a directory has no revision
        path = os.path.realpath(self.path) if local else self.path
        revision = None if local else self.model.revision
        return path, revision, self.lora, self.override_architecture

    @property
    def path(self) -> str:
        """The directory or Hub id, without revision or LoRA."""
        return self.model.path

    def to_yaml(self) -> str | YamlMapping:
        """Return the string form if mergekit reads it correctly, else the mapping form."""
        plain = self.model.is_plain and (self.lora is None or self.lora.is_plain)
        if plain and self.override_architecture is None:
            return str(self)
        mapping: YamlMapping = {"model": self.model.to_mapping()}
        if self.lora is not None:
            mapping["lora"] = self.lora.to_mapping()
        if self.override_architecture is not None:
            mapping["override_architecture"] = self.override_architecture
        return mapping


def parse_model(value: object, where: str) -> ModelRef:
    """Read a model from YAML or a flag.

    If the string is an existing path, it is used as a path, even if it contains `+` or `@`. Any
    other string is read as mergekit reads it.

    Args:
        value: A string or mergekit's mapping form.
        where: The key or flag, to be named in errors.

    Raises:
        DirectiveError: The value has neither form.
    """
    if isinstance(value, str) and value.strip():
        return _parse_string(value, where)
    if isinstance(value, Mapping):
        return _parse_mapping(value, where)
    raise DirectiveError(
        f"{where}: expected a model directory or Hub id, found {value!r}",
        hint=f"write `{where}: org/name` or `{where}: path/to/model`",
    )


def with_revision(model: ModelRef, revision: object, where: str) -> ModelRef:
    """Return a model at the revision that is stated beside it.

    Args:
        model: The model.
        revision: A branch, a tag or a commit.
        where: The key of the revision, to be named in errors.

    Raises:
        DirectiveError: The revision is not a name, or the model states another one.
    """
    if isinstance(revision, bool) or not isinstance(revision, str | int):
        raise DirectiveError(f"{where}: expected a branch, a tag or a commit, found {revision!r}")
    stated = model.model.revision
    if stated not in (None, str(revision)):
        raise DirectiveError(
            f"{where}: {revision} is stated, but the model is written as {model}",
            hint=f"leave `revision` out, or write the model as {model.path}",
        )
    return replace(model, model=replace(model.model, revision=str(revision)))


def is_directory_or_file(path: str) -> bool:
    """Whether the name of a model is an existing path."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises for an invalid path


def _parse_string(text: str, where: str) -> ModelRef:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DirectiveError(f"{where}: {text!r} is not valid UTF-8 text") from error
    if is_directory_or_file(text):
        return ModelRef(ModelPath(text))
    base, plus, adapter = text.partition("+")
    if "+" in adapter:
        raise DirectiveError(
            f"{where}: {text!r} has more than one `+` and is not an existing directory"
        )
    model = _parse_path(base, where)
    return ModelRef(model, _parse_path(adapter, where) if plus else None)


def _parse_path(value: object, where: str) -> ModelPath:
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        check_keys(value, ("path", "revision"), where)
        _check_no_url(str(value["path"]), where)
        revision = value.get("revision")
        return ModelPath(str(value["path"]), None if revision is None else str(revision))
    if not isinstance(value, str) or not value:
        raise DirectiveError(f"{where}: expected a model directory or Hub id, found {value!r}")
    _check_no_url(value, where)
    path, at, revision = value.partition("@")
    if not path or (at and not revision) or "@" in revision:
        raise DirectiveError(f"{where}: {value!r} does not have the form org/name@revision")
    return ModelPath(path, revision or None)


_URL = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://(?:models/)?)"
    r"([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/([^/?#]+))?"
)
"""The address of a model on the Hub, with its id and revision."""


def _check_no_url(value: str, where: str) -> None:
    """Check that the name of a model is no URL.

    Raises:
        DirectiveError: It is one; the hint names the Hub id in it.
    """
    found = _URL.match(value)
    if found is not None:
        name = "@".join(filter(None, found.groups()))
        raise DirectiveError(f"{where}: {value!r} is a URL", hint=f"write the Hub id: {name}")
    if re.match(r"\w+://", value):
        raise DirectiveError(
            f"{where}: {value!r} is a URL", hint="download the model and name its directory"
        )


def _parse_mapping(value: Mapping[object, object], where: str) -> ModelRef:
    check_keys(value, ("model", "revision", "lora", "override_architecture"), where)
    if "model" not in value:
        raise DirectiveError(f"{where}: the mapping has no `model`")
    lora = value.get("lora")
    architecture = value.get("override_architecture")
    if architecture is not None and not isinstance(architecture, str):
        raise DirectiveError(f"{where}.override_architecture: expected a class name")
    model = ModelRef(
        _parse_path(value["model"], f"{where}.model"),
        None if lora is None else _parse_path(lora, f"{where}.lora"),
        architecture,
    )
    if "revision" not in value:
        return model
    return with_revision(model, value["revision"], f"{where}.revision")
