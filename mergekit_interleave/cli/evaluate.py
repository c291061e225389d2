"""Define the command `mk-interleave evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import options, text
from mergekit_interleave.cli._progress import progress_bar
from mergekit_interleave.cli.options import AsJson, Flags, NonIdentity, TrustRemoteCode

EXAMPLE = "mk-interleave evaluate deeper --against org/name --tasks offline"


@options.takes_words
def evaluate(  # noqa: PLR0913 - one parameter for each flag
    wanted: Annotated[str | None, typer.Argument(metavar="[MODEL|DIRECTIVE]", show_default=False,
        help="A grown model: its directory, a Hub id or a GGUF file. Or a directive, whose model "
        "is built in memory.")] = None,
    *,
    flags: Flags,
    allow_non_identity: NonIdentity = False,
    tasks: Annotated[list[str], typer.Option(metavar="NAME,...", show_default=False, help=
        "Tasks, groups or tags of lm-eval; offline stands for tasks that need no Hub.")],
    against: Annotated[str | None, typer.Option(metavar="BASE", show_default=False, help=
        "The base: a directory, a Hub id or a GGUF file. By default, the model that the directive "
        "grows or that MODEL records.")] = None,
    include_path: Annotated[list[str] | None, typer.Option(metavar="DIR", show_default=False, help=
        "A directory with tasks of your own. You can repeat this option.")] = None,
    limit: Annotated[str | None, typer.Option(metavar="N", show_default=False, help=
        "The number of items of each task, or the share of them if it is below 1.")] = None,
    num_fewshot: Annotated[str | None, typer.Option(metavar="N", show_default=False, help=
        "The number of examples before each question, if the task leaves it open.")] = None,
    batch_size: Annotated[str, typer.Option(metavar="N", help=
        "The number of sequences that are computed together.")] = "8",
    device: Annotated[str | None, typer.Option(metavar="DEVICE", show_default=False, help=
        "The device to compute on; a GPU if there is one.")] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", show_default=False, help=
        "The maximum memory for weights, such as 8GB; the rest stays on disk.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help=
        "Measure everything again, instead of using results of earlier calls.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Compare a grown model with its base on tasks of lm-eval, item by item, with intervals.

    The results are recorded in MODEL's interleave.json, card and .eval_results. An evaluation that
    was stopped goes on when the command is given again.
    """
    report = api.evaluate(
        options.opened(wanted),
        tasks=tasks,
        against=against,
        include_path=include_path or (),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        max_memory=max_memory,
        fresh=fresh,
        allow_non_identity=allow_non_identity,
        trust_remote_code=trust_remote_code,
        progress=progress_bar("requests", "req"),
        **options.words(flags),
    )
    if report.is_first:
        text.show_report(report, report.notes, as_json=as_json)
