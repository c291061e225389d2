"""Would the class that loads the result build each layer as it built that layer's source?

A config can state a layout that the class does not build: one kind of layer where the weights are
of another, or a tensor that only the first or last layer has. Both models are built without memory
and compared, layer by layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_interleave.checkpoint import Checkpoint
from mergekit_interleave.errors import RefusedError
from mergekit_interleave.layout import Layout

_LayerKey = tuple[str, int]


def check(base: Checkpoint, layout: Layout, out: Path) -> None:
    """Compare the layers of the two models.

    Args:
        base: The only source model.
        layout: The layers of the result.
        out: A directory that holds the new config.json.

    Raises:
        RefusedError: A layer would be built unlike its source.
    """
    before, after = _layers(base.path), _layers(out)
    stacks = {stack for stack, index in before if index == base.depth - 1}
    for layer in layout.layers:
        for stack in stacks:
            ours = after.get((stack, layer.index), {})
            theirs = before.get((stack, layer.source), {})
            if ours != theirs:
                tensor = min(name for name, _ in ours.items() ^ theirs.items())
                raise RefusedError(
                    f"no config.json can say this layout: the new layer {layer.index} would be "
                    f"built unlike layer {layer.source}, which it is copied from, in {tensor}"
                )


def _layers(path: Path) -> Mapping[_LayerKey, Mapping[str, tuple[int, ...]]]:
    """The shapes of the tensors of each layer of each stack, as the class builds them."""
    import torch  # noqa: PLC0415 - seconds
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    layers: dict[_LayerKey, dict[str, tuple[int, ...]]] = {}
    try:
        config: Any = AutoConfig.from_pretrained(str(path))
        with torch.device("meta"):
            tensors = AutoModelForCausalLM.from_config(config).state_dict()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RefusedError(f"transformers cannot build the model: {reason[:300]}") from error
    for name, tensor in tensors.items():
        match = re.match(r"([^\d]+?)\.(\d+)\.(.+)", name)
        if match:
            layers.setdefault((match[1], int(match[2])), {})[match[3]] = tuple(tensor.shape)
    return layers
