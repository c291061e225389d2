"""Convert a layout to PEFT's `layer_replication`, which stacks layers that share their weights.

PEFT copies layers of a loaded model unchanged, and gives every copy a LoRA of its own. It changes
no key of config.json except the number of layers. `peft.tuners.tuners_utils.replicate_layers`
(0.21) finds the layers of a model at `model.layers` only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.layout import mergekit_yaml
from mergekit_interleave.layout.layout import Layout
from mergekit_interleave.planning import mergekit_support
from mergekit_interleave.planning.resolve import Expansion

_BY_RUN = "`mk-interleave run` writes the model itself"


def lora_config(expansion: Expansion) -> dict[str, object]:
    """Return the arguments of PEFT's `LoraConfig` for a layout.

    Args:
        expansion: The directive and its layout.

    Raises:
        RefusedError: PEFT would build other layers.
    """
    keys = expansion.directive.mergekit
    layout = mergekit_yaml.effective(expansion.layout, keys)
    reason = _reason_against(expansion, layout)
    if reason is not None:
        raise RefusedError(f"PEFT's layer_replication cannot {reason}", hint=_BY_RUN)
    if any(part.scales or part.constants for part in layout.slices):
        index = next(layer.index for layer in layout.layers if layer.edit)
        raise RefusedError(
            f"PEFT's layer_replication copies layers unchanged, but layer {index} is zeroed or "
            "scaled",
            hint=f"{_BY_RUN}; --zero none makes plain copies",
        )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear",
        "layer_replication": [list(bounds) for bounds in _joined(layout)],
    }


def _reason_against(expansion: Expansion, layout: Layout) -> str | None:
    """Return what PEFT cannot do, as words that follow `cannot`; None if it can."""
    if len(layout.models) > 1:
        return f"stack layers of {len(layout.models)} models"
    if layout.models[0].lora is not None:
        return "merge a LoRA into the model first"
    if mergekit_yaml.changes_tokenizer(expansion.directive.mergekit):
        return "change the tokenizer"
    first = expansion.first
    if first is None:
        return None
    family = first.require_family()
    if not re.fullmatch(r"(model\.)*layers", family.layer_prefix):
        return (
            f"find the layers of model type {first.model_type}, which are at {family.layer_prefix}"
        )
    placed = mergekit_support.placed_keys(expansion)
    changed = [key for key, value in placed.items() if first.layer_config.get(key) != value]
    return f"change {', '.join(changed)} in config.json" if changed else None


def _joined(layout: Layout) -> Iterator[tuple[int, int]]:
    """Yield the ranges, with consecutive ones joined."""
    start, stop = layout.slices[0].start, layout.slices[0].stop
    for part in layout.slices[1:]:
        if part.start == stop:
            stop = part.stop
            continue
        yield start, stop
        start, stop = part.start, part.stop
    yield start, stop
