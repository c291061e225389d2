"""Write the lines of plain PyTorch that train only certain layers of a loaded model."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from mergekit_interleave.architectures.family import Family


def freeze_lines(layers: Sequence[int], family: Family | None) -> str | None:
    """Return Python code for a loaded `model`, which imports only the standard library.

    Args:
        layers: The indices of the layers to train.
        family: The family of the model.

    Returns:
        The code; None if the names of the parameters in memory are not known to contain the index
        of a layer as those of the checkpoint do.
    """
    if family is None or family.is_unknown or family.refused or family.parallel_prefixes:
        return None
    stack = family.layer_prefix.rpartition(".")[2]
    # In a composite, the layers of a tower may have the same name.
    within = r"(?:language|text)_model\.(?:\w+\.)?" if family.composite else ""
    indices = textwrap.fill(
        f"layers = {{{', '.join(map(str, layers))}}}", 88, subsequent_indent="    "
    )
    return (
        f"import re\n\n{indices}\n"
        "for name, parameter in model.named_parameters():\n"
        rf'    found = re.search(r"(?:^|\.){within}{stack}\.(\d+)\.", name)'
        "\n    parameter.requires_grad_(bool(found) and int(found[1]) in layers)\n"
    )
