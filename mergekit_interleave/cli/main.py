"""The command line: options in, one call, words out.

The rooms that import torch, transformers or mergekit are imported by the command that needs them.
Results go to standard output, words about them to standard error.
"""

from __future__ import annotations

import functools
import inspect
import io
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from mergekit_interleave._units import amount, parse_amount
from mergekit_interleave._version import __version__
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.directive import yaml_io
from mergekit_interleave.directive.growth import registry
from mergekit_interleave.directive.model_ref import parse_model
from mergekit_interleave.directive.scale import APPLY_TO, AUTO, GAINS, NONE, NORMS
from mergekit_interleave.errors import (
    CheckpointError,
    DirectiveError,
    InterleaveError,
    OutputError,
)

if TYPE_CHECKING:
    from mergekit_interleave.commands.plan import Plan


class _Plain:
    """Values stay as they were typed; the rooms that take them check them.

    typer builds a pydantic adapter for every option that is more than a flag, which takes as long
    as everything else that `gen` does at its start.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            param._runtime_param = _AsTyped()  # noqa: SLF001
            if param.metavar is None:
                param.display_type_rich = _no_type
        return params


def _no_type(ctx: Any) -> None:
    """A flag takes no value, so the help shows none."""


class _PlainCommand(_Plain, TyperCommand):
    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ARG002 - typer's signature
        arguments = (p.metavar or "" for p in self.params if p.param_type_name == "argument")
        return ["[OPTIONS]", *arguments]


class _PlainGroup(_Plain, TyperGroup):
    pass


class _AsTyped:
    """Stands where typer keeps its adapter."""

    def coerce(self, value: object, param: object, ctx: object) -> object:  # noqa: ARG002
        return list(value) if isinstance(value, tuple) else value


app = typer.Typer(
    name="mk-interleave",
    cls=_PlainGroup,
    help="Grow a language model deeper: one line in, mergekit YAML or the finished model out.",
    epilog="A directive is a file, - for standard input, or the words themselves: "
    "'model: org/name, interleave: every 4, zero: \\[o_proj, down_proj]'",
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Directive = Annotated[
    str | None,
    typer.Argument(
        metavar="[DIRECTIVE]",
        help="A file, - for standard input, or the directive itself. Flags win over it.",
        show_default=False,
    ),
]


def _growth(help_text: str, metavar: str, values: Sequence[str] = ()) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        help=help_text,
        metavar=metavar,
        rich_help_panel="What to grow",
        autocompletion=_offering(*values),
    )
    return option


def _offering(*values: str) -> Callable[[str], list[str]]:
    """What a shell offers for an option's value."""

    def begun(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return begun


NonIdentity = Annotated[
    bool,
    typer.Option(
        "--allow-non-identity",
        help="Accept names to zero that leave the new layers no identities.",
        rich_help_panel="What to grow",
    ),
]
_FLAGS = {
    **{flag.name: _growth(flag.help, flag.metavar) for flag in registry.flags().values()},
    "zero": _growth(
        "What new layers zero: auto, none, gains (or norms), or names: o_proj,down_proj.",
        "NAMES",
        (AUTO, NONE, GAINS, NORMS, "o_proj,down_proj"),
    ),
    "scale": _growth("What new layers are multiplied by: q_proj=0.84,k_proj=0.84.", "NAME=X,..."),
    "apply_to": _growth(
        "To which they apply: copies, first, last or all.",
        "WHICH",
        APPLY_TO,
    ),
    "model": typer.Option(help="The source model: a directory or a Hub id.", metavar="MODEL"),
    "layers": typer.Option(
        help="Its number of layers, where its config cannot be read.", metavar="N"
    ),
    "dtype": typer.Option(
        help="Convert the weights, such as bfloat16.",
        metavar="DTYPE",
        autocompletion=_offering(*directives.DTYPES),
    ),
}
"""What says the same as the keys of a directive."""

Model = Annotated[list[str] | None, _FLAGS["model"]]

Flags = Mapping[str, "list[str] | None"]


def _says_directive(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags that say what a directive says; it gets them as `flags`."""
    signature = inspect.signature(command, eval_str=True)
    said = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[list[str] | None, option],
        )
        for name, option in _FLAGS.items()
    ]
    own = [parameter for name, parameter in signature.parameters.items() if name != "flags"]
    first = [parameter for parameter in own if parameter.kind != inspect.Parameter.KEYWORD_ONLY]
    parameters = [*first, *said, *own[len(first) :]]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        flags = {name: given.pop(name) for name in _FLAGS}
        command(**given, flags=flags)

    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del called.__wrapped__  # or the signature would be looked for there
    return called


@app.callback(invoke_without_command=True)
def _global(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001 - `main` looks at it
) -> None:
    if version:
        print(f"mk-interleave {__version__}")  # noqa: T201
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())  # noqa: T201
        raise typer.Exit(2)


@app.command(cls=_PlainCommand, epilog="Example: mk-interleave gen --every 4 > cfg.yml")
@_says_directive
def gen(
    directive: Directive = None,
    *,
    flags: Flags,
    allow_non_identity: NonIdentity = False,
) -> None:
    """Write the mergekit YAML to standard output, ready for mergekit-yaml."""
    from mergekit_interleave.checkpoint.models import Models  # noqa: PLC0415
    from mergekit_interleave.planning import merge_stream, mergekit_support  # noqa: PLC0415
    from mergekit_interleave.planning.resolve import resolve  # noqa: PLC0415

    if sys.stdout is None:
        raise OutputError("standard output is closed")
    models = Models()
    text, where = ("", "") if directive is None else directives.read_text(directive, _stdin())
    if directive is not None and merge_stream.is_stream(text, where):
        if any(flags.values()):
            raise DirectiveError("flags speak of one document with a growth line")
        written = merge_stream.expand(text, where, models, allow_non_identity=allow_non_identity)
    else:
        wanted = _said(flags)
        if directive is not None:
            wanted = directives.parse(text, where).replaced_by(wanted)
        expansion = resolve(wanted, models, allow_non_identity=allow_non_identity)
        mergekit_support.check(expansion, models)
        written = merge_stream.named(expansion.recipe, expansion.directive.name)
    sys.stdout.write(written)


@app.command(
    cls=_PlainCommand,
    epilog="Example: mk-interleave run 'interleave: every 4' deeper --model org/name",
)
@_says_directive
def run(  # noqa: PLR0913 - one parameter for each flag
    words: Annotated[list[str], typer.Argument(metavar="[DIRECTIVE] OUT", show_default=False, help=
        "DIRECTIVE is a file (a directive or a mergekit passthrough YAML), - for standard input, "
        "or the directive itself; flags win over it. OUT is where the new model appears, whole "
        "or not at all.")],
    *,
    flags: Flags,
    allow_non_identity: NonIdentity = False,
    engine: Annotated[str, typer.Option(
        metavar="auto|mergekit|stream", help="What writes the weights.",
        autocompletion=_offering("auto", "mergekit", "stream"))] = "auto",
    out_shard_size: Annotated[str | None, typer.Option(
        metavar="SIZE", show_default=False, help="The most bytes of one shard, such as 5GB, 500MB "
        "or mergekit's 5B; 5GB, and by the stream engine where the base's are cut.")] = None,
    no_reflink: Annotated[bool, typer.Option("--no-reflink", help=
        "Let the stream engine copy every byte, even where the filesystem could share blocks with "
        "the base.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help=
        "Do not read back what was written.")] = False,
    force: Annotated[bool, typer.Option(
        "--force", help="Replace a model that stands at OUT, and nothing else.")] = False,
    base_model: Annotated[str | None, typer.Option(
        metavar="ORG/NAME", help="What to call a local source model in OUT.")] = None,
    cuda: Annotated[bool, typer.Option("--cuda", help=
        "Do arithmetic on the GPU.", rich_help_panel="mergekit's options")] = False,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help=
        "Do arithmetic on this device.", rich_help_panel="mergekit's options")] = None,
    low_cpu_memory: Annotated[bool, typer.Option("--low-cpu-memory", help=
        "Keep intermediate values on the device.", rich_help_panel="mergekit's options")] = False,
    lazy_unpickle: Annotated[bool, typer.Option("--lazy-unpickle", help=
        "Load pickles lazily, if at all.", rich_help_panel="mergekit's options")] = False,
    async_write: Annotated[bool, typer.Option("--async-write", help=
        "Write shards while the next are made.", rich_help_panel="mergekit's options")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help=
        "Read numbers out of pickled weights, and nothing else.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=
        "Run code that the model brings. Nothing is run without it.",
        rich_help_panel="mergekit's options")] = False,
    mergekit: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help=
        "Any other option of mergekit-yaml; may be given again.",
        rich_help_panel="mergekit's options")] = None,
) -> None:  # fmt: skip
    """Make the deeper model at OUT, with config, tokenizer and model card."""
    from mergekit_interleave.checkpoint.models import Models  # noqa: PLC0415
    from mergekit_interleave.commands import run as run_command  # noqa: PLC0415
    from mergekit_interleave.engines import writer as writers  # noqa: PLC0415
    from mergekit_interleave.output import manifest  # noqa: PLC0415
    from mergekit_interleave.planning.resolve import resolve  # noqa: PLC0415

    if engine not in writers.ENGINES:
        raise DirectiveError(
            f"--engine: {engine!r} is no engine", hint=f"use one of {', '.join(writers.ENGINES)}"
        )
    directive, out = _directive_and_out(words)
    given = {
        "cuda": cuda,
        "device": device,
        "low_cpu_memory": low_cpu_memory,
        "lazy_unpickle": lazy_unpickle,
        "async_write": async_write,
        "trust_remote_code": trust_remote_code,
    }
    mergekit_options = {name: value for name, value in given.items() if value}
    mergekit_options |= dict(map(_key_value, mergekit or []))
    wanted = _read(directive, flags)
    options = run_command.Options(
        weights=writers.WriteOptions(
            engine=engine,
            shard_size=None
            if out_shard_size is None
            else _size(out_shard_size, "--out-shard-size"),
            reflink=not no_reflink,
            mergekit=mergekit_options,
            bar=_bar,
        ),
        replace=force,
        base_model=base_model,
        verify=not no_verify,
        allow_pickle=allow_pickle,
        allow_non_identity=allow_non_identity,
    )
    cache_dir = mergekit_options.get("transformers_cache")
    models = Models(
        cache_dir=None if cache_dir is None else str(cache_dir),
        trust_remote_code=trust_remote_code,
    )
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _terminated)
    if sys.stderr is None or not sys.stderr.isatty():
        # Not every bar of mergekit's and the Hub client's listens to an option.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    expansion = resolve(wanted, models, strict=True, allow_non_identity=allow_non_identity)
    report = run_command.run(expansion, models, Path(out), options)
    new = len(report.layout.new_layers)
    traffic = report.outcome.traffic
    numbers = "" if report.parameters is None else f"{report.parameters:,} parameters, "
    size = "" if traffic.is_plain else f"{amount(report.written.nbytes)}: "
    print(  # noqa: T201
        f"{out}: {len(report.layout)} layers, {new} of them new; {numbers}{size}{traffic}"
    )
    print(  # noqa: T201
        f"layout {manifest.fingerprint(report.layout)}: only models of the same layout can be "
        "merged with this one"
    )
    if report.name is not None:
        print(f"suggested name: {report.name}")  # noqa: T201
    if report.outcome.streamable:
        hint = "--engine stream writes the same tensors, faster and in constant memory"
        print(f"hint: {hint}", file=sys.stderr)  # noqa: T201


@app.command(cls=_PlainCommand, epilog="Example: mk-interleave plan --every 4 --svg layers.svg")
@_says_directive
def plan(  # noqa: PLR0913 - one parameter for each flag
    directive: Directive = None,
    *,
    flags: Flags,
    allow_non_identity: NonIdentity = False,
    drawing: Annotated[str | None, typer.Option("--svg", metavar="FILE", show_default=False, help=
        "Draw the layer map there.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=
        "Run code that the model brings. Nothing is run without it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=
        "Say all of it as JSON.")] = False,
) -> None:  # fmt: skip
    """Say what `run` would make, and write nothing."""
    from mergekit_interleave.checkpoint.models import Models  # noqa: PLC0415
    from mergekit_interleave.commands import plan as plan_command  # noqa: PLC0415

    models = Models(trust_remote_code=trust_remote_code)
    found = plan_command.plan(
        _read(directive, flags), models, Path.cwd(), allow_non_identity=allow_non_identity
    )
    if drawing is not None:
        from mergekit_interleave.output import svg  # noqa: PLC0415

        picture = svg.picture(found.layout, found.identities, found.names)
        Path(drawing).write_text(picture, encoding="utf-8")
    if as_json:
        print(json.dumps(plan_command.as_json(found), indent=2))  # noqa: T201
    elif sys.stdout.isatty():
        _show(found)
    else:
        for name, words in plan_command.words(found):
            print(f"{name:<11} {_printable(words)}")  # noqa: T201


def _show(found: Plan) -> None:
    """A plan on a terminal: the layers as a picture, and a table."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from mergekit_interleave.commands import plan as plan_command  # noqa: PLC0415
    from mergekit_interleave.output import layer_map as layer_maps  # noqa: PLC0415

    console = Console(highlight=False)
    width = max(console.width, layer_maps.NARROWEST)
    plain = not (console.encoding or "").lower().startswith("utf")
    picture = layer_maps.strip(
        found.layout, found.identities, names=found.names, width=width, ascii_only=plain
    )
    for line in picture:
        console.print(Text.assemble(*line), no_wrap=True, crop=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    before = None
    for name, words in plan_command.words(found):
        style = "yellow" if name == "warning" else ""
        label = Text("" if name == before else name, style=style)
        table.add_row(label, Text(_printable(words), style=style))
        before = name
    console.print()
    console.print(table)


@app.command(
    cls=_PlainCommand, epilog="Example: mk-interleave verify deeper --against org/name --forward"
)
def verify(  # noqa: PLR0913 - one parameter for each flag
    out: Annotated[str, typer.Argument(metavar="OUT", show_default=False, help=
        "A model that `run` or mergekit-yaml has made.")],
    *,
    against: Annotated[list[str] | None, typer.Option(metavar="BASE", help=
        "What it was made of, a directory or a Hub id; of several models each, in the order of "
        "interleave.json. Without it OUT is compared with itself.")] = None,
    forward: Annotated[bool, typer.Option("--forward", help=
        "Load both, and compare logits and greedy text.")] = False,
    trained: Annotated[bool, typer.Option("--trained", help=
        "New layers may hold anything: all others must be the base's, to the bit.")] = False,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help=
        "What says the layers, where OUT does not: an interleave.json, a mergekit config or a "
        "directive.")] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", show_default=False, help=
        "The most memory for weights in --forward; the rest stays on disk.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help=
        "Read numbers out of a base's pickled weights, and nothing else.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=
        "Run code that the models bring. Nothing is run without it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=
        "Say all of it as JSON.")] = False,
) -> None:  # fmt: skip
    """Check that OUT is what its layout says: every tensor, byte for byte, and config.json."""
    from mergekit_interleave.checkpoint.models import Models  # noqa: PLC0415
    from mergekit_interleave.commands.record import record  # noqa: PLC0415
    from mergekit_interleave.verification import report as verification  # noqa: PLC0415

    if forward and not against:
        raise DirectiveError("--forward needs the base", hint="name it: --against MODEL")
    if trained and not against:
        raise DirectiveError(
            "--trained: without the base there is nothing to compare with",
            hint="name it: --against MODEL",
        )
    most_memory = None if max_memory is None else _size(max_memory, "--max-memory")
    place = Path(out)
    with ExitStack() as stack:
        scratch = None
        if allow_pickle:
            folder = tempfile.TemporaryDirectory(prefix="mk-interleave-")
            scratch = Path(stack.enter_context(folder))
        report = verification.verify(
            place,
            Models(
                trust_remote_code=trust_remote_code,
                unpickle_into=scratch,
            ),
            against=[parse_model(name, "--against") for name in against or ()],
            layout_from=None if recipe is None else Path(recipe),
            trained=trained,
        )
        if against:
            record(place, report)
        measured = None
        if forward and report.is_exact:
            measured = verification.measure(place, report, most_memory)
            record(place, report, measured)
    if as_json:
        print(json.dumps(verification.as_json(report, measured), indent=2))  # noqa: T201
    else:
        for line in verification.words(place, report, measured):
            print(_printable(line))  # noqa: T201
    verification.check(place, report, measured)


@app.command(cls=_PlainCommand, epilog="Example: mk-interleave explain deeper")
def explain(
    source: Annotated[str, typer.Argument(metavar="FILE", show_default=False, help=
        "A mergekit YAML, a model card or a model's directory that holds one, or - for standard "
        "input.")],
) -> None:  # fmt: skip
    """Write the shortest directive that expands to the same slices."""
    from mergekit_interleave.commands import explain as explain_command  # noqa: PLC0415

    sys.stdout.write(explain_command.explain(source, _stdin()))


@app.command(cls=_PlainCommand, epilog="Example: mk-interleave card deeper")
def card(
    directory: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=
        "A model that `run` or mergekit-yaml has made.")],
    *,
    force: Annotated[bool, typer.Option("--force", help=
        "Replace a card that someone has edited, or another tool has written.")] = False,
) -> None:  # fmt: skip
    """Write the model card and the layer map anew, from interleave.json and what it now holds."""
    from mergekit_interleave.commands import card as card_command  # noqa: PLC0415
    from mergekit_interleave.output.model_card import FILE, PICTURE  # noqa: PLC0415

    written = card_command.rewrite(Path(directory), force=force)
    for name in (FILE, PICTURE):
        print(f"{name}: written")  # noqa: T201
    print(f"suggested name: {written.name}")  # noqa: T201
    if not written.base_models:
        note = "no base_model, since its Hub id is not known; `run --base-model org/name` states it"
        print(f"note: {note}", file=sys.stderr)  # noqa: T201


@app.command(
    cls=_PlainCommand, epilog="Example: mk-interleave train deeper --for axolotl > train.yml"
)
def train(
    directory: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=
        "A model that `run` or mergekit-yaml has made.")],
    *,
    trainer: Annotated[str, typer.Option("--for", metavar="NAME", help=
        "What trains it: transformers, trl, peft, llamafactory, axolotl, ms-swift, unsloth, "
        "torchtune or litgpt.", autocompletion=_offering(
            "transformers", "trl", "peft", "llamafactory", "axolotl", "ms-swift", "unsloth",
            "torchtune", "litgpt"))],
    method: Annotated[str | None, typer.Option(metavar="full|lora", show_default=False, help=
        "Train the new layers themselves, or a LoRA of them; the former, where the trainer can.",
        autocompletion=_offering("full", "lora"))] = None,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help=
        "What says which layers are new, where DIR does not: an interleave.json or a mergekit "
        "config.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help=
        "Run code that the model brings. Nothing is run without it.")] = False,
) -> None:  # fmt: skip
    """Write a trainer's settings by which it trains the new layers, and nothing else."""
    from mergekit_interleave.checkpoint.models import Models  # noqa: PLC0415
    from mergekit_interleave.training import settings as trainer_settings  # noqa: PLC0415
    from mergekit_interleave.training import target as targets  # noqa: PLC0415

    trainer_settings.check(trainer, method)
    models = Models(trust_remote_code=trust_remote_code)
    file = None if recipe is None else Path(recipe)
    found = trainer_settings.settings(targets.read(Path(directory), models, file), trainer, method)
    sys.stdout.write(found.text)
    sys.stdout.flush()
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)  # noqa: T201


@app.command("fix-config", cls=_PlainCommand, epilog="Example: mk-interleave fix-config deeper")
def fix_config(
    directory: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=
        "What mergekit-yaml wrote.")],
    *,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help=
        "The YAML it was made from; mergekit_config.yml in DIR, unless mergekit stopped before "
        "it wrote that.")] = None,
    model: Model = None,
) -> None:  # fmt: skip
    """Mend the config.json that mergekit-yaml left broken, or did not write."""
    from mergekit_interleave.checkpoint.models import Models  # noqa: PLC0415
    from mergekit_interleave.commands import fix_config as fix_command  # noqa: PLC0415
    from mergekit_interleave.layout.mergekit_yaml import FILE  # noqa: PLC0415
    from mergekit_interleave.output import recorded_layout  # noqa: PLC0415
    from mergekit_interleave.planning.resolve import resolve  # noqa: PLC0415

    own = Path(directory, FILE)
    recorded_layout.check_directory(Path(directory))
    if recipe is None and not own.is_file():
        raise DirectiveError(
            f"{directory}: no {FILE} there, which would tell the layers",
            hint="name the YAML that it was made from: --recipe FILE",
        )
    models = Models()
    wanted = directives.load_file(Path(recipe or own)).replaced_by(_read(None, {"model": model}))
    try:
        expansion = resolve(wanted, models, strict=True)
    except CheckpointError as error:
        if model is None:
            error.hint = "the recipe's model is not there: --model DIR says where it is"
        raise
    mended = fix_command.mend(Path(directory), expansion, models)
    if mended.written:
        print(f"config.json: written, for {len(expansion.layout)} layers")  # noqa: T201
    for key, (old, new) in mended.changes.items() if not mended.written else ():
        print(f"config.json: {key}: {json.dumps(old)} -> {json.dumps(new)}")  # noqa: T201
    for name in mended.added:
        print(f"{name}: added")  # noqa: T201
    if not mended.changes and not mended.added:
        print(f"{directory}: its config.json is as it should be")  # noqa: T201


@app.command(cls=_PlainCommand, epilog="Example: mk-interleave schema > interleave.schema.json")
def schema() -> None:
    """Write the JSON Schema of a directive, by which editors complete and check it."""
    from mergekit_interleave.directive import json_schema  # noqa: PLC0415

    print(json.dumps(json_schema.schema(), indent=2))  # noqa: T201


def _directive_and_out(words: list[str]) -> tuple[str | None, str]:
    """The words of `run`: the last is always OUT."""
    *directive, out = words
    if len(directive) > 1:
        raise DirectiveError(f"expected [DIRECTIVE] OUT, found {len(words)} words", hint=_QUOTES)
    if not directive and (out == "-" or directives.is_inline(out) or os.path.isfile(out)):
        raise DirectiveError(
            f"no OUT: {out!r} is a directive", hint=f"mk-interleave run {out!r} OUT"
        )
    if not out:
        raise DirectiveError("OUT is empty")
    return (directive[0] if directive else None), out


_QUOTES = "a directive with spaces stands in quotes: 'interleave: every 4'"


def _read(source: str | None, flags: Flags) -> directives.Directive:
    """The directive that the arguments and flags say together; flags win."""
    if source is None:
        return _said(flags)
    return directives.load(source, _stdin()).replaced_by(_said(flags))


def _said(flags: Flags) -> directives.Directive:
    return directives.from_flags(**{name: _joined(name, said) for name, said in flags.items()})


def _stdin() -> IO[str]:
    return sys.stdin if sys.stdin is not None else io.StringIO()


def _joined(name: str, said: list[str] | None) -> str | None:
    """What a flag says; only lists may be said in several flags."""
    if not said:
        return None
    structured = any(map(yaml_io.is_structured, said))
    if len(said) > 1 and (structured or name not in ("stack", "drop", "zero", "scale")):
        raise DirectiveError(f"--{name.replace('_', '-')} is given twice", hint="keep one")
    return ",".join(said)


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise DirectiveError(f"--mergekit: expected KEY=VALUE, found {text!r}")
    return key.replace("-", "_"), value


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], object]]:
    """Bytes, rate and time left, on a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm  # noqa: PLC0415

    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update


def _printable(line: str) -> str:
    """A line in which names from a file cannot move the cursor, or have no letters at all."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "replace").decode(encoding)


def _size(text: str, flag: str) -> int:
    size = parse_amount(text)
    if size is None:
        raise DirectiveError(f"{flag}: {text!r} is no size", hint="for example 5B, 5GB or 500MB")
    if size < 1:
        raise DirectiveError(f"{flag}: must be at least 1 byte")
    return size


def _terminated(number: int, _: object) -> NoReturn:
    """Leave as from Ctrl-C, so that nothing stays beside OUT."""
    with suppress(OSError):  # the terminal may be gone
        os.write(2, b"error: terminated\n")  # print() may be what was interrupted
    sys.exit(128 + number)


_INTERRUPTED = 130


class _Words(logging.Handler):
    """Shows what the rooms log as `warning:` lines."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = "note" if record.levelno < logging.WARNING else record.levelname.lower()
        print(f"{kind}: {record.getMessage()}", file=sys.stderr)  # noqa: T201


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 refused or unusable, 2 wrong words, 130 Ctrl-C."""
    words = sys.argv[1:] if args is None else args
    if _names_a_shell(words):
        # typer takes a name only where it does not look which shell this is called from.
        os.environ["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    debug = "--debug" in words
    log = logging.getLogger("mergekit_interleave")
    log.handlers, log.propagate = [_Words()], False
    log.setLevel(logging.INFO)
    try:
        status = app(
            [word for word in words if word != "--debug"],
            prog_name="mk-interleave",
            standalone_mode=False,
        )
        if sys.stdout is not None:
            sys.stdout.flush()
        if status == _INTERRUPTED:  # typer's own answer to Ctrl-C
            _fail("interrupted", None, _INTERRUPTED)
        sys.exit(status if isinstance(status, int) else 0)
    except KeyboardInterrupt:
        _fail("interrupted", None, _INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # or Python complains once more while it shuts down
        sys.exit(141)
    except Exception as error:
        if debug and not isinstance(error, typer.TyperException):
            raise
        _fail(*_explain(error, words))


def _names_a_shell(words: list[str]) -> bool:
    return any(
        word in ("--show-completion", "--install-completion") and not shell.startswith("-")
        for word, shell in pairwise(words)
    )


def _explain(error: Exception, words: list[str]) -> tuple[str, str | None, int]:
    """What to say of an error, what to do about it, and the exit code."""
    match error:
        case InterleaveError():
            return str(error), error.hint, error.exit_code
        case typer.TyperException():
            return error.format_message(), _usage_hint(error, words), error.exit_code
        case OSError():
            place = error.filename or "standard output"
            return f"{place}: {error.strerror or error}", None, 1
    hint = "`mk-interleave --debug ...` shows where; please report it"
    return f"unexpected {type(error).__name__}: {error}", hint, 1


def _usage_hint(error: typer.TyperException, words: list[str]) -> str:
    if "extra argument" in error.format_message():
        return _QUOTES
    known = app.registered_commands
    commands = {command.name or getattr(command.callback, "__name__", "") for command in known}
    command = next((word for word in words if word in commands), None)
    return f"mk-interleave {command} --help" if command else "mk-interleave --help"


_LONGEST = 1000
"""Characters of an error: what is quoted there may be a whole file."""


def _fail(message: str, hint: str | None, status: int) -> NoReturn:
    """One `error:` line, at most one `hint:` line."""
    line = " ".join(message.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    print(f"error: {line}", file=sys.stderr)  # noqa: T201
    if hint:
        print(f"hint: {' '.join(hint.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(status)
