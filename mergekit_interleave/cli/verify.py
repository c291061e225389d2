"""Define the command `mk-interleave verify`."""

from __future__ import annotations

from typing import Annotated

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import text
from mergekit_interleave.cli.options import AsJson, TrustRemoteCode

EXAMPLE = "mk-interleave verify deeper --against org/name --forward"


def verify(  # noqa: PLR0913 - one parameter for each flag
    out: Annotated[str, typer.Argument(metavar="OUT", show_default=False, help=
        "A model that `run` or mergekit-yaml wrote, or a GGUF file that `run` wrote.")],
    *,
    against: Annotated[list[str] | None, typer.Option(metavar="BASE", help=
        "The base: a directory, a Hub id or a GGUF file. With several sources, give the option "
        "once for each, in the order of interleave.json. By default, OUT is compared with "
        "itself.")] = None,
    forward: Annotated[bool, typer.Option("--forward", help=
        "Load both models, and compare logits and greedy text; GGUF files in llama.cpp.")] = False,
    trained: Annotated[bool, typer.Option("--trained", help=
        "Accept any values in new layers; all other tensors must equal the base's, bit for bit.",
        )] = False,
    layers: Annotated[str | None, typer.Option(metavar="WHICH", show_default=False, help=
        "With --trained: accept any values in these layers, too: seams or a range such as 8:24.",
        )] = None,
    also: Annotated[list[str] | None, typer.Option(metavar="NAME", show_default=False, help=
        "With --trained: accept any values in this module outside the layers, too, such as "
        "lm_head. You can repeat this option.")] = None,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help=
        "The file that records the layout, if OUT has none: an interleave.json, a mergekit config, "
        "a directive, or the directory of a model that has one of them.")] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", show_default=False, help=
        "The maximum memory for weights with --forward; the rest stays on disk.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help=
        "Read the tensors of a base from pickled weights, and nothing else.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Check that OUT matches its layout: every tensor, byte for byte, and config.json.

    With --against, the result is recorded in OUT's interleave.json, if it has one, and in its card.
    """
    report = api.verify(
        out,
        against=against,
        forward=forward,
        trained=trained,
        layers=layers,
        also=also or (),
        recipe=recipe,
        max_memory=max_memory,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    text.show_report(report, as_json=as_json)
    report.check()
