"""Check a layout for tools that load one model and repeat its layers unchanged."""

from __future__ import annotations

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.layout import layout as layouts
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Slice
from mergekit_interleave.planning.resolve import Expansion

BY_RUN = "`mk-interleave run` writes the model itself"


def ranges(expansion: Expansion, tool: str) -> list[Slice]:
    """Return the ranges of layers that a tool repeats, with consecutive ones joined.

    Args:
        expansion: The directive and its layout.
        tool: The name of the tool and its setting, for the message.

    Raises:
        RefusedError: The layout is more than unchanged layers of one model.
    """
    keys = expansion.directive.mergekit
    layout = mergekit_yaml.effective(expansion.layout, keys)
    reason = None
    if len(layout.models) > 1:
        reason = f"stack layers of {len(layout.models)} models"
    elif layout.models[0].lora is not None:
        reason = "merge a LoRA into the model first"
    elif mergekit_yaml.changes_tokenizer(keys):
        reason = "change the tokenizer"
    elif stated := [key for key in ("dtype", "out_dtype") if key in keys]:
        reason = f"convert the weights, as `{stated[0]}` asks"
    if reason is not None:
        raise RefusedError(f"{tool} cannot {reason}", hint=BY_RUN)
    edited = next((layer for layer in layout.layers if layer.edit), None)
    if edited is not None:
        mean = edited.mean_with is not None
        what = "zeroed" if edited.edit.zeroes else "a mean" if mean else "scaled"
        plain = "--zero none makes plain copies" if edited.edit.zeroes else "or leave the scale out"
        raise RefusedError(
            f"{tool} copies layers unchanged, but layer {edited.index} is {what}",
            hint=f"{BY_RUN}; {plain}",
        )
    return layouts.joined(layout.slices)
