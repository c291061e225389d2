"""Assign the layers of two loaded toy models to one, as a reference for what `run` writes.

Nothing here uses the plan of this project: layers are moved in Python, and the config's lists of
layers are joined by their length.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import toys

from mergekit_interleave.architectures import family as families
from mergekit_interleave.checkpoint import computation
from mergekit_interleave.errors import RefusedError


def by_hand(first: Any, last: Any, steps: str) -> Any:
    """Assign the layers of two loaded models to one, with the head of the last.

    Args:
        first: The model of the first step, which is changed.
        last: The model of the last step, which is changed.
        steps: The steps, such as `a 0:5, b 3:8`.
    """
    ranges = [[*map(int, step.split()[1].split(":"))] for step in steps.split(",")]
    of_first, of_last = (slice(*bounds) for bounds in ranges)
    total = sum(stop - start for start, stop in ranges)
    head = _used_after(first)
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if name in head:
                parameter.copy_(last.get_parameter(name))
    modules = dict(last.named_modules())
    for name in [n for n, m in first.named_modules() if any(m is s for s in layer_lists(first))]:
        parent, _, child = name.rpartition(".")
        chosen = [*first.get_submodule(name)[of_first], *modules[name][of_last]]
        holder = first.get_submodule(parent)
        _assign(holder, child, chosen)
        if hasattr(holder, "cross_attention_layers"):  # indices of layers that text alone skips
            listed = holder.cross_attention_layers
            indices = [*range(toys.DEPTH)]
            moved = enumerate([*indices[of_first], *indices[of_last]])
            holder.cross_attention_layers = [i for i, old in moved if old in listed]
    config = first.config.get_text_config()
    for key, value in {**vars(config)}.items():
        if isinstance(value, list | tuple) and len(value) == toys.DEPTH:
            object.__setattr__(config, key, [*value[of_first], *value[of_last]])
        elif value == toys.DEPTH and key in families.depth_keys():
            object.__setattr__(config, key, total)
    return first


def _assign(holder: Any, name: str, layers: list[Any]) -> None:
    """Give a module other layers, with new indices."""
    setattr(holder, name, torch.nn.ModuleList(layers))
    for key in [key for key, value in vars(holder).items() if value == toys.DEPTH]:
        setattr(holder, key, len(layers))
    for index, layer in enumerate(layers):
        modules = [m for m in layer.modules() if getattr(m, "layer_idx", None) is not None]
        old = sorted({module.layer_idx for module in modules})  # one for each cache in the layer
        for module in modules:
            module.layer_idx = index * len(old) + old.index(module.layer_idx)


def _used_after(model: Any) -> set[str]:
    """Return the parameters in memory that a class uses after its layers."""
    try:
        found = computation.record(copy.deepcopy(model.config), toys.DEPTH)
    except RefusedError:
        family = families.family_of_config(model.config.to_dict())
        names = family.after_layers if family else ()
        return {*names} & {name for name, _ in model.named_parameters()}
    return {name for name, use in found.first_use.items() if use > 0}


def layer_lists(model: Any, depth: int = toys.DEPTH) -> list[Any]:
    """Return the layer lists of the module that the model calls its decoder."""
    decoder, inner = model, model.get_decoder()
    while inner is not decoder and hasattr(inner, "get_decoder"):  # in some types, this is the head
        decoder, inner = inner, inner.get_decoder()
    lists = [m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList)]
    return [layers for layers in lists if len(layers) == depth]
