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

EXAMPLE = "mk-interleave scan --space drops --out found --model org/name"


def scan(  # noqa: PLR0913 - one parameter for each flag
    candidates: Annotated[str | None, typer.Argument(metavar="[FILE]", show_default=False, help=
        "A file with one directive per line, to measure instead of a space.")] = None,
    *,
    space: Annotated[list[str] | None, typer.Option(metavar="SPACE", show_default=False,
        autocompletion=options.offering("blocks", "ranges", "layers", "drops", "windows"), help=
        "What is tried: blocks (each block of layers repeated), ranges (its layers repeated one by "
        "one), layers (each layer 2 to 8 times), drops (each block left out) or windows. May be "
        "given several times; blocks is the default.")] = None,
    model: Model = None,
    text_file: Annotated[str | None, typer.Option("--text", metavar="FILE", show_default=False,
        help="Score the text in this file; a text of the package is the default.")] = None,
    items: Annotated[str | None, typer.Option(metavar="FILE", show_default=False, help=
        'Score the answers in this file; each line is {"prompt": ..., "answer": ...} in JSON.'
        )] = None,
    tokens: Annotated[str, typer.Option(metavar="N", help=
        "The maximum number of tokens of the text.")] = "4096",
    out: Annotated[str | None, typer.Option(metavar="DIR", show_default=False, help=
        "Keep the results here. The same command resumes a scan that was stopped.")] = None,
    report: Annotated[str | None, typer.Option(metavar="DIR", show_default=False, help=
        "Say again what a scan found, without a model.")] = None,
    purpose: Annotated[str | None, typer.Option("--for", metavar="training", show_default=False,
        autocompletion=options.offering(TRAINING), help=
        "Measure no space: rank the layers, and say where to put new ones that will be trained.",
        )] = None,
    add: Annotated[str | None, typer.Option(metavar="K", show_default=False, help=
        "With --for training: the number of new layers. Default: a quarter of the layers.",
        )] = None,
    top: Annotated[str, typer.Option(metavar="K", help=
        "How many of the best layouts are tested on the held-out part.")] = "5",
    seed: Annotated[str, typer.Option(metavar="N", help="The seed of the random numbers.")] = "0",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help=
        "The dtype to compute in.")] = "float32",
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
    alone = {"FILE": candidates, "--space": space, "--report": report, "--workers": workers}
    alone |= {"--ray": ray, "--num-cpus": num_cpus, "--num-gpus": num_gpus}
    _check_purpose(purpose, add, alone)
    if report is not None:
        if candidates or space or model or text_file or items or out:
            raise DirectiveError("--report only reads what a scan found", hint=f"--report {report}")
        text.show_report(api.scanned(report), as_json=as_json)
        return
    measuring: dict[str, Any] = {
        "model": options.joined("model", model),
        "text": text_file,
        "items": items,
        "tokens": tokens,
        "out": out,
        "dtype": dtype,
        "device": device,
        "max_memory": max_memory,
        "trust_remote_code": trust_remote_code,
        "progress": progress_bar("layouts", "layout"),
    }
    if purpose is not None:
        text.show_report(api.scan_for_training(add=add, **measuring), as_json=as_json)
        return
    found = api.scan(
        candidates,
        space=space or (),
        top=top,
        seed=seed,
        workers=workers,
        ray=ray,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        **measuring,
    )
    text.show_report(found, as_json=as_json)


def _check_purpose(purpose: str | None, add: str | None, others: Mapping[str, object]) -> None:
    """Check the options that go with `--for training`, and that no others are given with it.

    Raises:
        DirectiveError: They do not fit.
    """
    if purpose is None:
        if add is not None:
            raise DirectiveError("--add has no effect here", hint="pass --for training")
        return
    if purpose != TRAINING:
        raise DirectiveError(f"--for: {purpose!r:.60} is unknown", hint=f"use {TRAINING}")
    for name, value in others.items():
        if value:
            raise DirectiveError(
                f"{name} cannot be combined with --for training", hint=f"leave {name} out"
            )
