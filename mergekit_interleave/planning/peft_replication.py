"""Convert a layout to PEFT's `layer_replication`, which stacks layers that share their weights.

PEFT copies layers of a loaded model unchanged, and gives every copy a LoRA of its own. It changes
no key of config.json except the number of layers. `peft.tuners.tuners_utils.replicate_layers`
(0.21) finds the layers of a model at `model.layers` only.
"""

from __future__ import annotations

import json
import re

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.planning import mergekit_support, plain_layers
from mergekit_interleave.planning.resolve import Expansion

_TOOL = "PEFT's layer_replication"


def lora_config(expansion: Expansion) -> str:
    """Return the arguments of PEFT's `LoraConfig` for a layout, as JSON.

    Args:
        expansion: The directive and its layout.

    Raises:
        RefusedError: PEFT would build other layers.
    """
    ranges = plain_layers.ranges(expansion, _TOOL)
    mergekit_support.placed_keys(expansion)  # refuses what no config.json can represent
    reason = _reason_against(expansion)
    if reason is not None:
        raise RefusedError(f"{_TOOL} cannot {reason}", hint=plain_layers.BY_RUN)
    arguments = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear",
        "layer_replication": [[part.start, part.stop] for part in ranges],
    }
    lines = (f'  "{name}": {json.dumps(value)}' for name, value in arguments.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _reason_against(expansion: Expansion) -> str | None:
    """Return what PEFT cannot do, as words that follow `cannot`; None if it can."""
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
