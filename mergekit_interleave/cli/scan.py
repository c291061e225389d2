"""Define the command `mk-interleave scan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import options, text
from mergekit_interleave.cli._progress import progress_bar
from mergekit_interleave.cli.options import AsJson, Model, TrustRemoteCode
from mergekit_interleave.errors import DirectiveError

TRAINING = "training"

EXAMPLE = "mk-interleave scan --space drops --text book.txt --out found --model org/name"


def scan(  # noqa: PLR0913 - one parameter for each flag
    candidates: Annotated[str | None, typer.Argument(metavar="[FILE]", show_default=False, help=
        "A file with one directive per line, to measure instead of a space.")] = None,
    *,
    space: Annotated[list[str] | None, typer.Option(metavar="SPACE", show_default=False,
        autocompletion=options.offering("blocks", "ranges", "layers", "damped-blocks",
        "damped-ranges", "damped-layers", "drops", "windows"), help=
        "What is tried: blocks (each block of layers repeated), ranges (its layers repeated one by "
        "one), layers (each layer 2 to 8 times), damped-blocks, damped-ranges, damped-layers (the "
        "same with divided updates), drops (each block left out) or windows. May be given several "
        "times; blocks is the default.")] = None,
    combine: Annotated[str | None, typer.Option(metavar="K", show_default=False, help=
        "Then repeat 2 to K blocks together: each round adds one to the best of the last.")] = None,
    model: Model = None,
    text_file: Annotated[str | None, typer.Option("--text", metavar="FILE", show_default=False,
        help="Score the text in this file; by default, one that comes with this tool.")] = None,
    items: Annotated[str | None, typer.Option(metavar="FILE", show_default=False, help=
        'Score the answers in this file; each line is {"prompt": ..., "answer": ...} in JSON.'
        )] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N", show_default=False, help=
        "The maximum number of tokens of the text; 4096 is the default.")] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", show_default=False, help=
        "Keep the results here. The same command resumes a scan that was stopped.")] = None,
    report: Annotated[str | None, typer.Option(metavar="DIR", show_default=False, help=
        "Print the report of a scan again, without a model.")] = None,
    purpose: Annotated[str | None, typer.Option("--for", metavar="training", show_default=False,
        autocompletion=options.offering(TRAINING), help=
        "Measure no space: rank the layers, and say where to put new ones that will be trained.",
        )] = None,
    add: Annotated[str | None, typer.Option(metavar="K", show_default=False, help=
        "With --for training: the number of new layers; a quarter of the layers is the default.",
        )] = None,
    top: Annotated[str | None, typer.Option(metavar="K", show_default=False, help=
        "How many of the best layouts the report lists; 5 is the default.")] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", show_default=False, help=
        "The seed of the random numbers; 0 is the default.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", show_default=False, help=
        "The dtype to compute in; float32 is the default.")] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", show_default=False, help=
        "The device to compute on; a GPU if there is one.")] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", show_default=False, help=
        "The maximum memory for weights and states, such as 8GB; each worker may use as much. If "
        "weights need more, only the layer at work is in memory.")] = None,
    workers: Annotated[str | None, typer.Option(metavar="N", show_default=False, help=
        "Measure in this number of processes, each of which loads the model. With --ray, the "
        "number of actors; as many as there is room for is the default.")] = None,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", show_default=False, help=
        "Measure on the Ray cluster at this address; `local` starts one on this machine.")] = None,
    num_cpus: Annotated[str | None, typer.Option(metavar="N", show_default=False, help=
        "The CPUs for each actor of Ray; 1 is the default.")] = None,
    num_gpus: Annotated[str | None, typer.Option(metavar="N", show_default=False, help=
        "The GPUs for each actor of Ray; 0 is the default.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure many layouts of one model, and say which of them help; `best.yml` is for `run`."""
    every = {
        "model": options.joined("model", model),
        "text": text_file,
        "items": items,
        "tokens": tokens,
        "out": out,
        "dtype": dtype,
        "device": device,
        "max_memory": max_memory,
    }
    searching = {
        "candidates": candidates,
        "space": space,
        "combine": combine,
        "top": top,
        "seed": seed,
        "workers": workers,
        "ray": ray,
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
    }
    training = {"add": add}
    if report is not None:
        others = {**every, **searching, **training, "for": purpose}
        _check_none(others, "--report")
        text.show_report(api.scanned(report), as_json=as_json)
        return
    always: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "progress": progress_bar("layouts", "layout"),
    }
    if purpose is None:
        if add is not None:
            raise DirectiveError("--add has no effect here", hint="pass --for training")
        found = api.scan(**_given(every), **_given(searching), **always)
        text.show_report(found, as_json=as_json)
        return
    if purpose != TRAINING:
        raise DirectiveError(f"--for: {purpose!r:.60} is unknown", hint=f"use {TRAINING}")
    _check_none(searching, "--for training")
    ranked = api.scan_for_training(**_given(every), **_given(training), **always)
    text.show_report(ranked, as_json=as_json)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, by parameter of the API."""
    return {name: value for name, value in options.items() if value not in (None, [])}


def _check_none(others: Mapping[str, Any], flag: str) -> None:
    """Check that no options are given that would have no effect beside a flag.

    Raises:
        DirectiveError: One is.
    """
    for name in _given(others):
        shown = "FILE" if name == "candidates" else f"--{name.replace('_', '-')}"
        raise DirectiveError(f"{shown} has no effect with {flag}", hint=f"leave {shown} out")
