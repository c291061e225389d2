"""Define the command `mk-interleave sample`."""

from __future__ import annotations

from typing import Annotated

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import options, text
from mergekit_interleave.cli._progress import progress_bar
from mergekit_interleave.cli.options import AsJson, Flags, NonIdentity, TrustRemoteCode

EXAMPLE = "mk-interleave sample 'repeat: 2:5' 'repeat: 3:6' --prompt 'The sea' --model org/name"


@options.takes_words
def sample(  # noqa: PLR0913 - one parameter for each flag
    directives: Annotated[list[str] | None, typer.Argument(metavar="[DIRECTIVE]...", help=
        "Directives, or files with one directive or one per line. Flags override them.",
        show_default=False)] = None,
    *,
    flags: Flags,
    allow_non_identity: NonIdentity = False,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", show_default=False, help=
        "What each model continues. May be given several times.")] = None,
    text_file: Annotated[str | None, typer.Option("--text", metavar="FILE", show_default=False,
        help="Measure the perplexity on the text in this file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help=
        "Apply the chat template to each prompt.")] = False,
    max_new_tokens: Annotated[str, typer.Option(metavar="N", help=
        "The maximum number of tokens that follow a prompt.")] = "64",
    seed: Annotated[str, typer.Option(metavar="N", help="The seed of the random numbers.")] = "0",
    temperature: Annotated[str, typer.Option(metavar="T", help=
        "The temperature; 0 takes the most likely token.")] = "0",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Let the base and the deeper models speak side by side; nothing is written."""
    report = api.sample(
        *map(options.opened, directives or ()),
        prompt=prompt or (),
        text=text_file,
        chat=chat,
        max_new_tokens=max_new_tokens,
        seed=seed,
        temperature=temperature,
        allow_non_identity=allow_non_identity,
        trust_remote_code=trust_remote_code,
        progress=progress_bar("tokens", "tok"),
        **options.words(flags),
    )
    text.show_report(report, as_json=as_json)
