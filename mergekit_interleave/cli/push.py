"""Define the command `mk-interleave push`."""

from __future__ import annotations

from typing import Annotated

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import text
from mergekit_interleave.cli._progress import show_bars_on_terminals_only
from mergekit_interleave.cli.options import AsJson, TrustRemoteCode

EXAMPLE = "mk-interleave push deeper org/name --dry-run"


def push(  # noqa: PLR0913 - one parameter for each flag
    directory: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=
        "A model that `verify` accepts: a directory, or a GGUF file with its model card.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", show_default=False, help=
        "The repository; it is created if it does not exist.")],
    *,
    private: Annotated[bool, typer.Option("--private", help=
        "Create a private repository; one that exists and is public is refused.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", show_default=False, help=
        "Send to this branch, not to main; it is created if it does not exist.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=
        "Verify the model and forecast the bytes, and send nothing; needs no token.")] = False,
    against: Annotated[list[str] | None, typer.Option(metavar="BASE", show_default=False, help=
        "The base to compare with, as in `verify`.")] = None,
    trained: Annotated[bool, typer.Option("--trained", help=
        "Accept any values in new layers, as in `verify`.")] = False,
    layers: Annotated[str | None, typer.Option(metavar="WHICH", show_default=False, help=
        "With --trained: other layers that were trained, as in `verify`.")] = None,
    also: Annotated[list[str] | None, typer.Option(metavar="NAME", show_default=False, help=
        "With --trained: a module outside the layers that was trained, as in `verify`.")] = None,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", show_default=False, help=
        "The file that records the layout, if DIR has none, as in `verify`.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help=
        "Read the tensors of a base from pickled weights, and nothing else.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Verify DIR, show what will be sent, and send it to the Hugging Face Hub in one commit.

    huggingface_hub sends it, with its token and settings. To resume, repeat the command: what the
    Hub's storage holds is not sent again.
    """
    show_bars_on_terminals_only()

    def announce(report: api.PushReport) -> None:
        if not as_json:
            text.show_report(report, as_json=False)

    report = api.push(
        directory,
        repo,
        against=against,
        trained=trained,
        layers=layers,
        also=also or (),
        recipe=recipe,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        private=private,
        revision=revision,
        dry_run=dry_run,
        progress=announce,
    )
    if as_json or dry_run:
        text.show_report(report, as_json=as_json)
    else:
        text.show(f"sent: {report.url}")
