"""`mk-interleave verify`."""

from __future__ import annotations

from typing import Annotated

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import text
from mergekit_interleave.cli.options import AsJson, TrustRemoteCode

EXAMPLE = "mk-interleave verify deeper --against org/name --forward"


def verify(  # noqa: PLR0913 - one parameter for each flag
    out: Annotated[str, typer.Argument(metavar="OUT", show_default=False, help=
        "A model that `run` or mergekit-yaml wrote.")],
    *,
    against: Annotated[list[str] | None, typer.Option(metavar="BASE", help=
        "Its base, a directory or a Hub id; for several models repeat it, in the order of "
        "interleave.json. Without it OUT is compared with itself.")] = None,
    forward: Annotated[bool, typer.Option("--forward", help=
        "Load both models, and compare logits and greedy text.")] = False,
    trained: Annotated[bool, typer.Option("--trained", help=
        "Accept any values in new layers; all others must be the base's, to the bit.")] = False,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help=
        "The file that states the layout, if OUT does not: an interleave.json, a mergekit "
        "config or a directive.")] = None,
    max_memory: Annotated[str | None, typer.Option(metavar="SIZE", show_default=False, help=
        "The maximum memory for weights in --forward; the rest stays on disk.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help=
        "Read the tensors in a base's pickled weights, and nothing else.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Check that OUT is what its layout says: every tensor, byte for byte, and config.json."""
    report = api.verify(
        out,
        against=against,
        forward=forward,
        trained=trained,
        recipe=recipe,
        max_memory=max_memory,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    text.show_report(report, as_json=as_json)
    report.check()
