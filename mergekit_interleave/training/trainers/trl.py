"""TRL: Python code for full training, YAML for a LoRA by its command line.

It passes its LoRA settings on to PEFT, but takes `lora_target_modules` with a single entry for a
regular expression.
"""

from __future__ import annotations

from dataclasses import replace

from mergekit_interleave.training import lora_target
from mergekit_interleave.training.settings import (
    TrainerSettings,
    dropout,
    lora_notes,
    model_keys,
    yaml_text,
)
from mergekit_interleave.training.target import TrainingTarget
from mergekit_interleave.training.trainers import transformers
from mergekit_interleave.training.trainers.registry import LORA


def full(target: TrainingTarget) -> TrainerSettings:
    """The code for transformers, whose model TRL takes as an object."""
    found = transformers.full(target)
    hint = "# SFTTrainer(model=model, ...): this object, not the name of its directory."
    return replace(found, text=f"{found.text}\n{hint}\n")


def lora(target: TrainingTarget) -> TrainerSettings:
    """PEFT's settings under TRL's names for them."""
    chosen = lora_target.choose(
        target, lora_target.by_regex(target), lora_target.by_endings(target)
    )
    modules = [chosen.modules] if isinstance(chosen.modules, str) else [*chosen.modules]
    if len(modules) == 1 and not isinstance(chosen.modules, str):
        modules *= 2  # one entry alone would be a regular expression
    text = yaml_text(
        {
            **model_keys(target, "model_name_or_path"),
            "use_peft": True,
            "lora_target_modules": modules,
            "lora_target_parameters": [*chosen.parameters],
            "lora_modules_to_save": [*chosen.saved],
            "lora_dropout": dropout(chosen),
        }
    )
    return TrainerSettings(text, LORA, tuple(lora_notes(chosen)))
