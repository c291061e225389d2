"""Options that several commands share, and the flags for the keys of a directive."""

from __future__ import annotations

import functools
import inspect
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Annotated, Any, cast

import typer

from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.directive import NEIGHBOURS
from mergekit_interleave.directive.growth import registry
from mergekit_interleave.directive.growth.repeat import DAMPED
from mergekit_interleave.directive.scale import APPLY_TO, AUTO, GAINS, NONE, NORMS
from mergekit_interleave.errors import DirectiveError

if TYPE_CHECKING:
    from mergekit_interleave.commands.inputs import Words

WITH_DIRECTIVE = ("gen", "plan", "run", "evaluate")
"""The commands that take a directive."""

QUOTES = "quote a directive that contains spaces: 'interleave: every 4'"

Directive = Annotated[
    str | None,
    typer.Argument(
        metavar="[DIRECTIVE]",
        help="A file, - for standard input, or the directive itself. Flags override it.",
        show_default=False,
    ),
]


def offering(*values: str) -> Callable[[str], list[str]]:
    """Return a completion function that offers these values."""

    def matching(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return matching


def _growth(help_text: str, metavar: str, values: Sequence[str] = ()) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        help=help_text,
        metavar=metavar,
        rich_help_panel="What to grow",
        autocompletion=offering(*values),
    )
    return option


NonIdentity = Annotated[
    bool,
    typer.Option(
        "--allow-non-identity",
        help="Accept a --zero list with which the new layers are not identities.",
        rich_help_panel="What to grow",
    ),
]
_FLAGS = {
    **{flag.name: _growth(flag.help, flag.metavar) for flag in registry.flags().values()},
    "zero": _growth(
        "What to zero in new layers: auto, none, norms, or names such as o_proj,down_proj.",
        "NAMES",
        (AUTO, NONE, NORMS, GAINS, "o_proj,down_proj"),
    ),
    "scale": _growth(
        "Multiply tensors of new layers, such as q_proj=0.84,k_proj=0.84.", "NAME=X,..."
    ),
    "apply_to": _growth(
        "The occurrences of a repeated layer that --zero and --scale apply to: copies, first, last "
        "or all.",
        "WHICH",
        APPLY_TO,
    ),
    "from_": typer.Option(
        "--from",
        help="With --every, --add or --after: `neighbours` makes each new layer the mean of the "
        "layers before and behind it, instead of a copy.",
        metavar=NEIGHBOURS,
        rich_help_panel="What to grow",
        autocompletion=offering(NEIGHBOURS),
    ),
    DAMPED: typer.Option(
        f"--{DAMPED}",
        help="With --repeat: each of K occurrences of a layer, also the original, adds only 1/K of "
        "its update.",
        rich_help_panel="What to grow",
    ),
    "model": typer.Option(
        help="The source model: a directory or a Hub id, org/name or org/name@revision.",
        metavar="MODEL",
    ),
    "layers": typer.Option(
        help="The number of layers, if the config.json of the model cannot be read.", metavar="N"
    ),
    "dtype": typer.Option(
        help="Convert the weights, for example to bfloat16.",
        metavar="DTYPE",
        autocompletion=offering(*directives.DTYPES),
    ),
}
"""The flags for the keys of a directive."""

_REPEATABLE = {
    "zero",
    "scale",
    *(flag.name for flag in registry.flags().values() if flag.repeatable),
}
"""The flags that may be given several times; their values are joined into one list."""

Model = Annotated[list[str] | None, _FLAGS["model"]]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code from the models. By default, none is run."
    ),
]
LegacyConfig = Annotated[
    bool,
    typer.Option(
        "--legacy-config",
        help="Also write what transformers 4 reads (such as rope_theta) beside what 5 reads.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]

Flags = Mapping[str, "list[str] | bool | None"]


def takes_words(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags of a directive to a command, which receives their values as `flags`."""
    signature = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name == DAMPED else None,
            annotation=Annotated[bool if name == DAMPED else list[str] | None, option],
        )
        for name, option in _FLAGS.items()
    ]
    others = [parameter for name, parameter in signature.parameters.items() if name != "flags"]
    first = [parameter for parameter in others if parameter.kind != inspect.Parameter.KEYWORD_ONLY]
    parameters = [*first, *added, *others[len(first) :]]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        flags = {name: given.pop(name) for name in _FLAGS}
        command(**given, flags=flags)

    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del called.__wrapped__  # otherwise `inspect` reads the signature from there
    return called


def words(flags: Flags) -> Words:
    """Convert the flags to keywords of the Python API."""
    found: dict[str, object] = {
        name: joined(name, given) if isinstance(given, list) else given or None
        for name, given in flags.items()
    }
    return cast("Words", found)


def joined(name: str, values: list[str] | None) -> str | None:
    """Join the values of a flag. Only the flags in `_REPEATABLE` may be given several times."""
    if not values:
        return None
    structured = any(map(yaml_io.is_structured, values))
    if len(values) > 1 and (structured or name not in _REPEATABLE):
        flag = name.rstrip("_").replace("_", "-")
        raise DirectiveError(f"--{flag} is given twice", hint="keep one")
    return ",".join(values)


def opened(source: str | None) -> str | IO[str] | None:
    """Convert an argument for the Python API: `-` becomes standard input."""
    if source != "-":
        return source
    return sys.stdin if sys.stdin is not None else io.StringIO()
