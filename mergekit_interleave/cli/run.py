"""Define the command `mk-interleave run`."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import options, text
from mergekit_interleave.cli._progress import progress_bar, show_bars_on_terminals_only
from mergekit_interleave.cli.options import (
    AsJson,
    Flags,
    LegacyConfig,
    NonIdentity,
    TrustRemoteCode,
)
from mergekit_interleave.directive import directive as directives
from mergekit_interleave.engines import registry as engines
from mergekit_interleave.errors import DirectiveError, OutputError

EXAMPLE = "mk-interleave run 'interleave: every 4' deeper --model org/name"

_MERGEKIT = "mergekit's options"


@options.takes_words
def run(  # noqa: PLR0913 - one parameter for each flag
    words: Annotated[list[str], typer.Argument(metavar="[DIRECTIVE] OUT", show_default=False, help=
        "DIRECTIVE is a file (a directive or a mergekit passthrough YAML), - for standard input, "
        "or the directive itself; flags override it. OUT is the directory to create for the new "
        "model, or the GGUF file if the model is one. It appears only when it is complete.")],
    *,
    flags: Flags,
    allow_non_identity: NonIdentity = False,
    engine: Annotated[str | None, typer.Option(
        metavar="|".join(engines.names()), show_default=False,
        help=f"The engine that writes the weights. Default: ${engines.VARIABLE}, or else "
        f"{engines.AUTO}: mergekit wherever it can.",
        autocompletion=options.offering(*engines.names()))] = None,
    out_shard_size: Annotated[str | None, typer.Option(
        metavar="SIZE", show_default=False, help="The maximum size of a shard, such as 5GB, 500MB "
        "or mergekit's 5B. Default: 5GB; the stream engine keeps the base's shards.")] = None,
    no_reflink: Annotated[bool, typer.Option("--no-reflink", help=
        "Let the stream engine copy every byte, even if the filesystem can share disk blocks with "
        "the base.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help=
        "Do not read the written weights back to compare them with the base.")] = False,
    force: Annotated[bool, typer.Option(
        "--force", help="Replace a model at OUT that run or mergekit wrote; nothing else is "
        "replaced.")] = False,
    base_model: Annotated[str | None, typer.Option(
        metavar="ORG/NAME", help="The Hub id of a local source model, for the model card and the "
        "recipe in OUT.")] = None,
    repo: Annotated[str | None, typer.Option(
        metavar="ME/NAME", help="The Hub id under which you will publish the model, for the model "
        "card.")] = None,
    legacy_config: LegacyConfig = False,
    cuda: Annotated[bool, typer.Option("--cuda", help=
        "Do arithmetic on the GPU.", rich_help_panel=_MERGEKIT)] = False,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help=
        "Do arithmetic on this device, such as cpu or cuda:1.", rich_help_panel=_MERGEKIT)] = None,
    low_cpu_memory: Annotated[bool, typer.Option("--low-cpu-memory", help=
        "Keep intermediate values on the device.", rich_help_panel=_MERGEKIT)] = False,
    lazy_unpickle: Annotated[bool, typer.Option("--lazy-unpickle", help=
        "Load pickles lazily.", rich_help_panel=_MERGEKIT)] = False,
    async_write: Annotated[bool, typer.Option("--async-write", help=
        "Write shards in the background.", rich_help_panel=_MERGEKIT)] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help=
        "Read the tensors in pickled weights, and nothing else.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    mergekit: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help=
        "Another option of mergekit-yaml. May be given several times.",
        rich_help_panel=_MERGEKIT)] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write the deeper model to OUT, with config, tokenizer and model card."""
    directive, out = _directive_and_out(words)
    stated = options.words(flags)
    others = dict(map(_key_value, mergekit or []))
    _clean_up_on_signals()
    show_bars_on_terminals_only()
    report = api.run(
        options.opened(directive),
        out,
        engine=engine,
        out_shard_size=out_shard_size,
        reflink=not no_reflink,
        verify=not no_verify,
        force=force,
        base_model=base_model,
        repo=repo,
        legacy_config=legacy_config,
        allow_pickle=allow_pickle,
        allow_non_identity=allow_non_identity,
        trust_remote_code=trust_remote_code,
        cuda=cuda,
        device=device,
        low_cpu_memory=low_cpu_memory,
        lazy_unpickle=lazy_unpickle,
        async_write=async_write,
        mergekit=others,
        progress=progress_bar("weights", "B", unit_scale=True),
        **stated,
    )
    text.show_report(report, report.notes, as_json=as_json)
    text.tell("hint", [report.hint])


def _directive_and_out(words: list[str]) -> tuple[str | None, str]:
    """Split the arguments of `run`; the last one is always OUT."""
    *directive, out = words
    if len(directive) > 1:
        raise DirectiveError(
            f"expected [DIRECTIVE] OUT, found {len(words)} arguments", hint=options.QUOTES
        )
    if not directive:
        _check_out(out)
    return (directive[0] if directive else None), out


def _check_out(out: str) -> None:
    """Refuse a directive in place of OUT."""
    is_file = os.path.isfile(out)
    # An existing directory is OUT, whatever its name looks like. Path.is_dir may raise.
    is_out = os.path.isdir(out)  # noqa: PTH112
    if out.lower().endswith(".gguf"):
        return
    if is_file and not directives.is_directive_file(out):
        raise OutputError(f"OUT: {out!r} is an existing file", hint="name another OUT")
    right = None if is_file or is_out else directives.corrected(out)
    if is_file or out == "-" or right is not None or directives.is_inline(out):
        kind = "an existing file" if is_file else "a directive"
        raise DirectiveError(
            f"OUT is missing: {out!r} is {kind}", hint=f"mk-interleave run {right or out!r} OUT"
        )


def _key_value(text_given: str) -> tuple[str, str]:
    key, equals, value = text_given.partition("=")
    if not key or not equals:
        raise DirectiveError(f"--mergekit: expected KEY=VALUE, found {text_given!r}")
    return key.replace("-", "_"), value


def _clean_up_on_signals() -> None:
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # nohup starts programs that ignore SIGHUP, and a run must go on then.
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminated)


def _terminated(number: int, _: object) -> NoReturn:
    """Exit as after Ctrl-C, so that the staging directory is removed."""
    with suppress(OSError):  # the terminal may be gone
        os.write(2, b"error: terminated\n")  # print() may be the call that was interrupted
    sys.exit(128 + number)
