"""Write axolotl's YAML for full training or for a LoRA.

The rule restates axolotl's source of 2026-07-24 (utils/freeze.py).

axolotl loads the weights in the dtype that it computes in: `bf16` and `fp16` choose it, and float32
is what remains. Its default, `bf16: auto`, would round other weights than bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from mergekit_interleave.training import lora_target
from mergekit_interleave.training.settings import (
    TrainerSettings,
    check_selection,
    dropout,
    lora_notes,
    model_keys,
    yaml_text,
)
from mergekit_interleave.training.target import TrainingTarget
from mergekit_interleave.training.trainers.registry import FULL, LORA


def trained_parameters(parameters: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """Return the parameters that axolotl trains by `unfrozen_parameters`.

    A pattern is matched from the start of a name. Its dots match only dots, except in `.+`.
    """
    regexes = [re.compile(re.sub(r"\.(?!\+)", r"\\.", pattern)) for pattern in patterns]
    return {name for name in parameters if any(regex.match(name) for regex in regexes)}


def full(target: TrainingTarget) -> TrainerSettings:
    """Write settings for full training, with one pattern per stack of layers or other module."""
    patterns = [f"{stack}.{_any_of(target.layers)}." for stack in target.stacks]
    patterns += [f"{module}." for module in target.also]
    check_selection(target, trained_parameters(target.parameters, patterns), "axolotl")
    text = yaml_text(
        {
            **model_keys(target, "base_model"),
            **_PRECISION["float32"],  # 16 bits are too few for most updates
            "unfrozen_parameters": patterns,
        }
    )
    return TrainerSettings(text, FULL)


def _any_of(layers: Sequence[int]) -> str:
    """Return a regular expression that matches any of some indices."""
    return str(layers[0]) if len(layers) == 1 else f"({'|'.join(map(str, layers))})"


def lora(target: TrainingTarget) -> TrainerSettings:
    """Write PEFT's settings under axolotl's names."""
    chosen = lora_target.choose(
        target, lora_target.by_layers(target), lora_target.by_endings(target)
    )
    text = yaml_text(
        {
            **model_keys(target, "base_model"),
            **_PRECISION.get(target.exact_dtype or "", {}),
            "adapter": "lora",
            "lora_r": _RANK,
            "lora_alpha": 2 * _RANK,
            "lora_target_modules": [*chosen.modules],
            "peft_layers_to_transform": [*(chosen.layers or ())],
            "peft_layers_pattern": [chosen.pattern] if chosen.pattern else None,
            "lora_target_parameters": [*chosen.parameters],
            "lora_modules_to_save": [*chosen.modules_to_save],
            "lora_dropout": dropout(chosen),
        }
    )
    return TrainerSettings(text, LORA, tuple(lora_notes(chosen)))


_PRECISION: Mapping[str, Mapping[str, object]] = {
    "float32": {"bf16": False, "tf32": "auto"},
    "float16": {"bf16": False, "fp16": True},
}
"""The keys that load the weights in each dtype; bfloat16 is the default."""

_RANK = 16
"""If no rank is set, axolotl passes None to PEFT, which does not accept None."""
