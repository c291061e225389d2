"""Read the arguments of the commands: directives in any form, keywords, models and sizes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple, TypeAlias, TypedDict, TypeVar, cast

from mergekit_interleave._units import parse_amount
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive.directive import Directive
from mergekit_interleave.directive.model_ref import ModelRef, parse_model
from mergekit_interleave.errors import DirectiveError

StrPath: TypeAlias = "str | os.PathLike[str]"

DirectiveLike: TypeAlias = "Directive | Mapping[str, object] | StrPath | IO[str]"
"""A directive: its text, a file's name, an open file, a mapping with its keys, or a `Directive`.

As on the command line, text that names an existing file stands for that file.
"""

ModelLike: TypeAlias = "StrPath | Mapping[str, object]"
"""A model: a directory, a Hub id (`org/name@revision`), or mergekit's mapping form."""

_INLINE = "the directive"
"""The name in error messages of a directive that is not in a file."""

_Number = TypeVar("_Number", int, float)

Ranges: TypeAlias = "str | Sequence[object] | Mapping[str, object]"


class Words(TypedDict, total=False):
    """Keywords that correspond to the keys of a directive and take precedence over it.

    Attributes:
        model: The source model: a directory or a Hub id.
        layers: The number of layers of a model whose config.json cannot be read.
        zero: The tensors that new layers zero: `auto`, `none`, `norms`, or names of tensors.
        scale: The factors for tensors of the new layers: one factor, or names with factors.
        apply_to: Which layers `zero` and `scale` apply to: `copies`, `first`, `last` or `all`.
        from_: What the weights of new layers are: `neighbours` for the means of the layers before
            and behind; the key `from`.
        dtype: The dtype to convert the weights to, such as `bfloat16`.
        every: Insert a new layer after every Nth layer.
        add: Insert K new layers, evenly spread.
        after: Insert a new layer after each of these layers: `"3,9,14"` or `[3, 9, 14]`.
        append: Append K copies of the last layer.
        repeat: Repeat a range of layers: `"8:24x2"`, `[8, 24]`, or a mapping.
        damped: With `repeat`: divide the update of each repeated layer by its number of
            occurrences.
        stack: Stack ranges one after another: `"0:24,8:32"` or `[[0, 24], [8, 32]]`.
        windows: Stack overlapping windows: `"16:8"` or `{"size": 16, "stride": 8}`.
        drop: Omit ranges of layers: `"23:28"` or `[23, 28]`.
    """

    model: ModelLike | None
    layers: int | str | None
    zero: str | Sequence[str] | None
    scale: float | str | Mapping[str, float | str] | Sequence[Mapping[str, object]] | None
    apply_to: str | None
    from_: str | None
    dtype: str | None
    every: int | str | None
    add: int | str | None
    after: int | str | Sequence[int] | None
    append: int | str | None
    repeat: Ranges | None
    damped: bool | None
    stack: Ranges | None
    windows: Ranges | None
    drop: Ranges | None


class Text(NamedTuple):
    """A text before parsing, such as a directive.

    Attributes:
        text: The text.
        where: The name of the text in error messages.
    """

    text: str
    where: str


def read(directive: DirectiveLike | None) -> Directive | Text | None:
    """Read the text of a directive, or convert a mapping to a directive.

    Raises:
        DirectiveError: The file cannot be read, or the mapping is not a directive.
    """
    if directive is None or isinstance(directive, Directive):
        return directive
    if isinstance(directive, Mapping):
        return directives.of_document(_plain(directive), _INLINE)
    return read_text(directive)


def read_text(source: StrPath | IO[str]) -> Text:
    """Read the text of a directive: from a file name, an open file, or the argument itself.

    Raises:
        DirectiveError: The file cannot be read, or does not exist.
    """
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if name == "-":
            raise DirectiveError(
                "'-' is not a file name", hint="pass sys.stdin to read standard input"
            )
        return Text(*directives.read_text(name, io.StringIO()))
    if not hasattr(source, "read"):
        raise DirectiveError(
            f"expected a directive, found {source!r:.80}",
            hint="pass its text, a mapping, a path, an open file or a Directive",
        )
    return Text(*directives.read_text("-", source))


def parse(source: Directive | Text | None, words: Words) -> Directive:
    """Parse a directive and apply the keywords, which take precedence.

    Args:
        source: The result of `read`.
        words: The keywords.

    Raises:
        DirectiveError: The text or a keyword is wrong, or two keywords are growth lines.
    """
    if isinstance(source, Text):
        source = directives.parse(*source)
    stated = directives.from_flags(**_flags(words))
    return stated if source is None else source.replaced_by(stated)


def parse_models(models: ModelLike | Sequence[ModelLike] | None, where: str) -> list[ModelRef]:
    """Parse one model or several.

    Raises:
        DirectiveError: A value does not name a model.
    """
    if models is None:
        return []
    if isinstance(models, str | os.PathLike | Mapping):
        models = [models]
    return [parse_model(_plain(model), where) for model in models]


def any_given(words: Words) -> bool:
    """Return whether any keyword is given."""
    return any(value is not None for value in words.values())


def parse_size(size: int | str | None, where: str) -> int | None:
    """Parse a size, such as 5GB, and return the number of bytes.

    Raises:
        DirectiveError: The value is not a size, or not positive.
    """
    if size is None:
        return None
    nbytes = parse_amount(size) if isinstance(size, str) else size
    if nbytes is None:
        raise DirectiveError(
            f"{where}: {size!r} is not a size", hint="for example 5B, 5GB or 500MB"
        )
    if nbytes < 1:
        raise DirectiveError(f"{where}: must be at least 1 byte")
    return nbytes


def _flags(words: Words) -> dict[str, str | None]:
    """Convert the keywords to the text of flags."""
    return {name: _flag(name, value) for name, value in words.items() if value is not None}


def _flag(name: str, value: object) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        return value
    value = _plain(value)
    if name == "model":  # a mapping is accepted unchanged
        return cast("str", value)
    if name == "zero" and isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value, default=str)  # JSON is YAML


def _plain(value: object) -> object:
    """Convert tuples to lists, mappings to dicts, and paths to text."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def parse_count(number: float | str, where: str, *, least: int = 1) -> int:
    """Convert the value of an option to a number of things.

    Raises:
        DirectiveError: It is no whole number, or below the least.
    """
    found = parse_number(number, where, int)
    if found < least:
        raise DirectiveError(f"{where} is {found}, not at least {least}")
    return found


def lines(text: str, where: str) -> list[Text]:
    """Return each line of a file as a directive, without empty lines and comments."""
    return [
        Text(line, f"{where}, line {number}")
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def parse_number(number: float | str, where: str, kind: type[_Number]) -> _Number:
    """Convert the value of an option, which the command line gives as text, to a number.

    Args:
        number: The value.
        where: The name of the option.
        kind: `int` or `float`.

    Raises:
        DirectiveError: It is no such number.
    """
    try:
        return kind(number)
    except (TypeError, ValueError) as error:
        whole = "a whole number" if kind is int else "a number"
        raise DirectiveError(f"{where}: {number!r:.60} is not {whole}") from error
