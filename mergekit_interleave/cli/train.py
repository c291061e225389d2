"""Define the command `mk-interleave train`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import options, text
from mergekit_interleave.cli.options import AsJson, TrustRemoteCode
from mergekit_interleave.training.trainers import registry

EXAMPLE = "mk-interleave train deeper --for axolotl > train.yml"


def train(  # noqa: PLR0913 - one parameter for each flag
    directory: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=
        "A model that `run` or mergekit-yaml wrote.")],
    *,
    trainer: Annotated[str, typer.Option("--for", metavar="NAME", help=
        f"The trainer: {registry.in_words()}.",
        autocompletion=options.offering(*registry.usable()))],
    method: Annotated[str | None, typer.Option(metavar="full|lora", show_default=False, help=
        "Train the new layers themselves, or a LoRA of them. Default: full if the trainer "
        "supports it, else lora.", autocompletion=options.offering(*registry.METHODS))] = None,
    layers: Annotated[str, typer.Option(metavar="WHICH", help=
        "The layers to train: new, seams (those at both sides of each merge seam), or a range such "
        "as 8:24; several are separated by commas.",
        autocompletion=options.offering("new", "seams"))] = "new",
    also: Annotated[list[str] | None, typer.Option(metavar="NAME", show_default=False, help=
        "Train this outside the layers too: lm_head or embed_tokens. You can repeat this option.",
        autocompletion=options.offering("lm_head", "embed_tokens"))] = None,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help=
        "The file that records which layers are new, if DIR has none: an interleave.json, a "
        "mergekit config, or the directory of a model that has one of them.")] = None,
    since: Annotated[str | None, typer.Option(metavar="BASE", show_default=False, help=
        "Of a model that was grown several times, train all layers that this earlier base does not "
        "have. Default: the layers that the last growth added.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Print the settings with which a trainer trains the new layers, or others that you name."""
    settings = api.train(
        directory,
        trainer=trainer,
        method=method,
        layers=layers,
        also=also or (),
        recipe=recipe,
        since=since,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        text.show_json(settings.as_dict())
        return
    text.tell("warning", settings.warnings)
    text.write(settings.text)
    sys.stdout.flush()
    text.tell("note", settings.notes)
