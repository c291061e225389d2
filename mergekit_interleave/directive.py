"""The user's words: a file, inline text and flags all become one validated `Directive`.

A directive document is a mergekit config in which one growth line stands for `slices:`. Keys
that are mergekit's own pass through untouched; any other unknown key is an error. A mergekit
passthrough config is a directive too: its growth is the slices it spells out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

from mergekit_interleave import yamltext
from mergekit_interleave.errors import DirectiveError, check_keys, nearest
from mergekit_interleave.reference import ModelRef, parse_model


@dataclass(frozen=True)
class Every:
    """`interleave: every n`: a new layer after every nth layer; a last partial group gets none."""

    n: int


@dataclass(frozen=True)
class Spread:
    """`interleave: k layers`: k new layers, evenly spread."""

    count: int


@dataclass(frozen=True)
class Append:
    """`append: k`: k new copies of the last layer at the end."""

    count: int


@dataclass(frozen=True)
class Repeat:
    """`repeat: [start, stop]`: the layers of the half-open range `times` times in all.

    Side by side, or, `as_block`, the range as a whole again and again.
    """

    start: int
    stop: int
    times: int = 2
    as_block: bool = False


@dataclass(frozen=True)
class Stack:
    """`stack: [[start, stop], ...]`: half-open ranges one after another."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Spelled:
    """A mergekit config: its `slices:`, `models:` or `modules:`, as written."""

    document: Mapping[str, object]


Growth: TypeAlias = Every | Spread | Append | Repeat | Stack | Spelled

AUTO = "auto"
NONE = "none"
GAINS = "gains"
Zero: TypeAlias = "str | tuple[str, ...]"
"""`auto`, `none`, `gains`, or the name filters of the tensors to zero."""

DTYPES = ("float16", "bfloat16", "float32", "float64")
"""What mergekit can convert weights to. (It also takes int64, which would destroy them.)"""

_INLINE = "the directive"
_SHORTEST = "the shortest directive is `interleave: every 4`"

MERGEKIT_KEYS = (
    "merge_method",
    "base_model",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "parameters",
)
_OWN_KEYS = ("model", "layers", "zero")
_SPELLED_KEYS = ("slices", "models", "modules")


@dataclass(frozen=True)
class Directive:
    """What the user asked for, valid as far as can be told without the model.

    Attributes:
        growth: The growth line, if one was given.
        model: The source model, if it was named.
        layers: The depth the user states, for a model whose config cannot be read.
        zero: What to zero in the new layers; None leaves it to the growth line.
        mergekit: mergekit's own keys, in the order they were written.
    """

    growth: Growth | None = None
    model: ModelRef | None = None
    layers: int | None = None
    zero: Zero | None = None
    mergekit: Mapping[str, object] = field(default_factory=dict)

    @property
    def zero_rule(self) -> Zero:
        """What to zero: as written, else `auto` where a plain copy would change the model."""
        if self.zero is not None:
            return self.zero
        return AUTO if isinstance(self.growth, Every | Spread | Append) else NONE

    def replaced_by(self, flags: Directive) -> Directive:
        """This directive with everything that `flags` states in its place."""
        changes = {
            name: getattr(flags, name)
            for name in ("growth", "model", "layers", "zero")
            if getattr(flags, name) is not None
        }
        if isinstance(self.growth, Spelled) and flags.growth is not None and not flags.model:
            changes["model"] = _sole_model(self.growth)
        return dataclasses.replace(self, mergekit={**self.mergekit, **flags.mergekit}, **changes)

    def to_document(
        self, name: Callable[[ModelRef], object] = ModelRef.to_yaml
    ) -> dict[str, object]:
        """The directive as a YAML document; one that spells its slices out has no shorter form.

        Args:
            name: What to call the model.
        """
        document: dict[str, object] = {} if self.model is None else {"model": name(self.model)}
        if self.layers is not None:
            document["layers"] = self.layers
        match self.growth:
            case Every(n):
                document["interleave"] = f"every {n}"
            case Spread(count):
                document["interleave"] = f"{count} layers"
            case Append(count):
                document["append"] = count
            case Repeat(start, stop, times, as_block):
                bounds = [start, stop]
                how = {"layers": bounds, "times": times, "as": "block" if as_block else "layers"}
                document["repeat"] = bounds if (times, as_block) == (2, False) else how
            case Stack(ranges):
                document["stack"] = [list(bounds) for bounds in ranges]
            case Spelled(written):
                document.update(written)
        if self.zero is not None:
            document["zero"] = list(self.zero) if isinstance(self.zero, tuple) else self.zero
        return {**document, **self.mergekit}


def _sole_model(spelled: Spelled) -> ModelRef:
    """The one model that a mergekit config names, for a growth flag in place of its slices."""
    found: dict[object, ModelRef] = {}

    def look(value: object) -> None:
        if isinstance(value, list):
            for entry in value:
                look(entry)
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                if key == "model":
                    model = parse_model(entry, "model")
                    found.setdefault(model.identity, model)
                elif key != "parameters":
                    look(entry)

    look(spelled.document)
    if len(found) != 1:
        raise DirectiveError(
            f"a growth flag needs one model, and the mergekit config names {len(found)}",
            hint="name it: --model",
        )
    return next(iter(found.values()))


def load(source: str, stdin: IO[str]) -> Directive:
    """Read a directive from a file, from standard input (`-`) or from the text itself.

    An existing file wins over inline text; text without `: ` is taken for a file name.

    Raises:
        DirectiveError: There is no such file, or what it holds is no directive.
    """
    if source == "-":
        return parse(_read(stdin.read, "standard input"), "standard input")
    if not source.strip():
        raise DirectiveError("the directive is empty", hint=_SHORTEST)
    path = Path(source)
    if _is_file(path):
        return load_file(path)
    if is_inline(source):
        return parse(source, _INLINE)
    if path.is_dir():
        raise DirectiveError(
            f"{source}: is a directory, not a directive", hint=f"use `--model {source}`"
        )
    raise DirectiveError(
        f"{source}: no such file",
        hint="a directive given inline has a space after each colon: 'interleave: every 4'",
    )


def is_inline(text: str) -> bool:
    """Whether a word on the command line is a directive rather than a file's name."""
    return bool(re.search(r":(\s|$)", text)) or text.lstrip().startswith("{")


def load_file(path: Path) -> Directive:
    """Read a directive from a file.

    Raises:
        DirectiveError: It cannot be read, or what it holds is no directive.
    """

    def read() -> str:
        with path.open(encoding="utf-8") as file:
            return file.read(_LONGEST + 1)

    text = _read(read, str(path))
    if len(text) > _LONGEST:
        raise DirectiveError(f"{path}: longer than any directive")
    return parse(text, str(path))


_LONGEST = 2**24
"""Characters of a directive: a merge of some thousand slices has a tenth of that."""


def _is_file(path: Path) -> bool:
    """Whether `path` can be read as a file; text too long to be a name is no file."""
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):
        return False


def _read(read: Callable[[], str], name: str) -> str:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise DirectiveError(f"{name}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise DirectiveError(f"{name}: {error.strerror or error}") from error


def parse(text: str, where: str) -> Directive:
    """Read one directive document, or the one-line form `key: value, key: value`.

    Args:
        text: YAML.
        where: What to call the text in errors.

    Raises:
        DirectiveError: The text is no directive.
    """
    document = yamltext.read(text, where)
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
        hint = "that is a model's config.json: use --model" if "model_type" in document else None
        raise DirectiveError(f"{where}: {error}", hint=hint or error.hint) from error


def from_document(document: Mapping[Any, object]) -> Directive:
    """Validate a document that was read from YAML.

    Raises:
        DirectiveError: A key or value is not one of a directive, or there are two growth lines.
    """
    spelled = [key for key in _SPELLED_KEYS if key in document]
    known = (*_GROWTH, *_OWN_KEYS, *MERGEKIT_KEYS)
    check_keys([key for key in document if key not in _SPELLED_KEYS], known)
    for key, value in document.items():
        if value is None:
            raise DirectiveError(f"{key}: has no value")
        if spelled and key in _OWN_KEYS:
            raise DirectiveError(
                f"`{key}` has no place beside `{spelled[0]}`, which says it for every layer"
            )
    growth_keys = (*_GROWTH, *_SPELLED_KEYS)
    given = [key for key in growth_keys if key in document]
    if len(given) > 1:
        raise DirectiveError(f"two growth lines: `{given[0]}` and `{given[1]}`", hint="keep one")
    growth: Growth | None = None
    if spelled:
        growth = Spelled({spelled[0]: document[spelled[0]]})
    elif given:
        growth = _GROWTH[given[0]](document[given[0]], given[0])
    return Directive(
        growth=growth,
        model=parse_model(document["model"], "model") if "model" in document else None,
        layers=parse_layers(document["layers"], "layers") if "layers" in document else None,
        zero=parse_zero(document["zero"], "zero") if "zero" in document else None,
        mergekit=_mergekit_keys(document),
    )


def from_flags(  # noqa: PLR0913 - one parameter for each flag
    *,
    model: str | None = None,
    layers: str | None = None,
    every: str | None = None,
    add: str | None = None,
    append: str | None = None,
    repeat: str | None = None,
    stack: str | None = None,
    zero: str | None = None,
    dtype: str | None = None,
) -> Directive:
    """Read the command line's flags; they say the same things as the document's keys.

    Raises:
        DirectiveError: A flag's value is wrong, or there are two growth flags.
    """
    growths: list[tuple[str, str, Callable[[object, str], Growth]]] = [
        (flag, value, reader)
        for flag, value, reader in (
            ("--every", every, lambda v, w: Every(_positive(v, w))),
            ("--add", add, lambda v, w: Spread(_positive(v, w))),
            ("--append", append, _append),
            ("--repeat", repeat, _repeat),
            ("--stack", stack, _stack),
        )
        if value is not None
    ]
    if len(growths) > 1:
        raise DirectiveError(f"two growth flags: {growths[0][0]} and {growths[1][0]}")
    return Directive(
        growth=growths[0][2](growths[0][1], growths[0][0]) if growths else None,
        model=None if model is None else parse_model(model, "--model"),
        layers=None if layers is None else parse_layers(layers, "--layers"),
        zero=None if zero is None else parse_zero(zero, "--zero"),
        mergekit={} if dtype is None else {"dtype": _dtype(dtype, "--dtype")},
    )


# Values. Each reader takes the value as YAML or a flag gave it, and the name to blame.


def _interleave(value: object, where: str) -> Growth:
    match str(value).split() if isinstance(value, str) else None:
        case ["every", n] | ["every", n, "layers" | "layer"]:
            return Every(_positive(re.sub(r"(?<=\d)(st|nd|rd|th)$", "", n), f"{where}: every {n}"))
        case [count, "layers" | "layer"]:
            return Spread(_positive(count, f"{where}: {count} layers"))
    raise DirectiveError(
        f"{where}: expected `every N` or `K layers`, found {value!r}",
        hint="`interleave: every 4` adds a layer after every 4th, `interleave: 8 layers` adds 8",
    )


def _append(value: object, where: str) -> Growth:
    return Append(_positive(value, where))


_REPEAT = re.compile(r"(?P<start>\d+):(?P<stop>\d+)(x(?P<times>\d+))?(@(?P<form>layers|block))?")


def _repeat(value: object, where: str) -> Growth:
    times: object = 2
    form: object = "layers"
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = yamltext.read(value, where)
    if isinstance(value, str):
        match = _REPEAT.fullmatch(value.replace(" ", ""))
        if match is None:
            raise DirectiveError(
                f"{where}: expected START:STOP, found {value!r}",
                hint="for example 8:24, 8:24x3 or 8:24x3@block",
            )
        bounds: object = [match["start"], match["stop"]]
        times = match["times"] or times
        form = match["form"] or form
    elif isinstance(value, Mapping):
        check_keys(value, ("layers", "times", "as"), where)
        bounds = value.get("layers")
        times = value.get("times", times)
        form = value.get("as", form)
    else:
        bounds = value
    start, stop = _range(bounds, where)
    count = _positive(times, f"{where}.times")
    if count < 2:  # noqa: PLR2004 - once is no repetition
        raise DirectiveError(f"{where}.times: {count} adds nothing; the total is at least 2")
    if form not in ("layers", "block"):
        raise DirectiveError(f"{where}.as: expected `layers` or `block`, found {form!r}")
    return Repeat(start, stop, count, form == "block")


def _stack(value: object, where: str) -> Growth:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = yamltext.read(value, where)
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list) or not value:
        raise DirectiveError(
            f"{where}: expected a list of ranges, found {_kind(value)}",
            hint="for example `stack: [[0, 24], [8, 32]]` or `--stack 0:24,8:32`",
        )
    return Stack(tuple(_range(part, f"{where}[{i}]") for i, part in enumerate(value)))


_GROWTH: dict[str, Callable[[object, str], Growth]] = {
    "interleave": _interleave,
    "append": _append,
    "repeat": _repeat,
    "stack": _stack,
}


def parse_zero(value: object, where: str) -> Zero:
    """Read `auto`, `none`, or names: a YAML list, or text with commas.

    Raises:
        DirectiveError: The value is none of these.
    """
    if isinstance(value, str) and value.strip().lower() in (AUTO, NONE, GAINS):
        return value.strip().lower()
    names = value.strip("[] ").split(",") if isinstance(value, str) else value
    if isinstance(names, list) and names and all(isinstance(n, str) and n.strip() for n in names):
        stripped = tuple(name.strip() for name in names)
        for word in (AUTO, NONE, GAINS):
            if word in stripped:
                raise DirectiveError(f"{where}: `{word}` stands alone, without names")
        if len(set(stripped)) < len(stripped):
            raise DirectiveError(f"{where}: a name stands there twice")
        return stripped
    raise DirectiveError(
        f"{where}: expected `auto`, `none` or a list of names, found {value!r}",
        hint="for example `zero: [o_proj, down_proj]`, or `zero: none` for plain copies",
    )


def parse_layers(value: object, where: str) -> int:
    """Read a depth.

    Raises:
        DirectiveError: The value is no positive whole number.
    """
    return _positive(value, where)


def _range(value: object, where: str) -> tuple[int, int]:
    if isinstance(value, str):
        value = value.split(":")
    if not isinstance(value, list) or len(value) != 2:  # noqa: PLR2004 - start and stop
        raise DirectiveError(f"{where}: expected a range [START, STOP], found {value!r}")
    start, stop = (_whole(bound, where) for bound in value)
    if start < 0:
        raise DirectiveError(f"{where}: [{start}, {stop}] starts below layer 0")
    if stop <= start:
        what = "is empty" if stop == start else "is reversed"
        raise DirectiveError(
            f"{where}: [{start}, {stop}] {what}",
            hint="ranges are half-open: [8, 24] is layers 8 to 23",
        )
    return start, stop


def _positive(value: object, where: str) -> int:
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
    raise DirectiveError(f"{where}: expected a whole number, found {value!r}")


def _dtype(value: object, where: str) -> str:
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPES:
        close = {
            "bf16": "bfloat16",
            "fp16": "float16",
            "half": "float16",
            "fp32": "float32",
            "float": "float32",
        }
        guess = close.get(str(name)) or nearest(str(name), DTYPES)
        raise DirectiveError(
            f"{where}: {value!r} is no dtype that weights can be written in",
            hint=f"did you mean {guess}?" if guess else f"use one of {', '.join(DTYPES)}",
        )
    return str(value)


def _mergekit_keys(document: Mapping[Any, object]) -> dict[str, object]:
    keys = {key: value for key, value in document.items() if key in MERGEKIT_KEYS}
    method = keys.pop("merge_method", "passthrough")
    if method != "passthrough":
        typo = nearest(str(method), ["passthrough"]) or "passthrough".startswith(str(method))
        raise DirectiveError(
            f"merge_method: {method!r} is not passthrough, which alone keeps layers as they are",
            hint="did you mean `passthrough`?"
            if typo
            else "run the blend with mergekit-yaml first, then expand its result",
        )
    for key in ("dtype", "out_dtype"):
        if key in keys:
            _dtype(keys[key], key)
    return keys


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing"}
    return names.get(type(value), repr(value))
