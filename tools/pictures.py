"""Draw the layer map of each directive in examples/.

Usage: pictures.py [DIRECTORY]
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from mergekit_interleave.checkpoint.models import Models
from mergekit_interleave.directive.directive import load_file
from mergekit_interleave.output import svg
from mergekit_interleave.planning.resolve import resolve

EXAMPLES = Path(__file__).parent.parent / "examples"
DEPTHS = {
    "openchat-block-expansion": 32,
    "catppt-interwoven": 32,
    "miqu-120b": 80,
    "deep-miqu-103b": 80,
}
"""The number of layers of each example's models, so that no config is downloaded."""


def draw(example: str) -> str:
    """Draw the layers of an example."""
    directive = load_file(EXAMPLES / f"{example}.yml")
    wanted = dataclasses.replace(directive, layers=DEPTHS[example])
    layout = resolve(wanted, Models(cached_only=True)).layout
    zeroed = [layer.index for layer in layout.new_layers if layer.zeroed]
    return svg.picture(layout, zeroed, [str(model) for model in layout.models])


def main(folder: Path) -> None:
    """Write the picture of each example."""
    for example in DEPTHS:
        (folder / f"{example}.svg").write_text(draw(example), encoding="utf-8")


if __name__ == "__main__":
    main(Path(*sys.argv[1:]) if sys.argv[1:] else EXAMPLES)
