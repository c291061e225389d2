"""Define the command `mk-interleave fix-config`."""

from __future__ import annotations

from typing import Annotated

import typer

import mergekit_interleave as api
from mergekit_interleave.cli import options, text
from mergekit_interleave.cli.options import AsJson, LegacyConfig, Model

EXAMPLE = "mk-interleave fix-config deeper"


def fix_config(
    directory: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help=
        "The directory that mergekit-yaml wrote.")],
    *,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help=
        "The YAML that DIR was made from. Default: mergekit_config.yml in DIR, which is missing "
        "if mergekit stopped early.")] = None,
    model: Model = None,
    legacy_config: LegacyConfig = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Fix the config.json that mergekit-yaml left broken or did not write."""
    report = api.fix_config(
        directory,
        recipe=recipe,
        model=options.joined("model", model),
        legacy_config=legacy_config,
    )
    text.show_report(report, as_json=as_json)
