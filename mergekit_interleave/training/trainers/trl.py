"""Write TRL's Python code for full training, or YAML for a LoRA with its command line.

TRL passes its LoRA settings on to PEFT, but treats a single entry in `lora_target_modules` as a
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
    precision_key,
    yaml_text,
)
from mergekit_interleave.training.target import TrainingTarget
from mergekit_interleave.training.trainers import transformers
from mergekit_interleave.training.trainers.registry import LORA


def full(target: TrainingTarget) -> TrainerSettings:
    """Write the code for transformers; TRL's trainers accept the loaded model."""
    settings = transformers.full(target)
    comment = "# Pass the model itself, not its path: SFTTrainer(model=model, ...)"
    return replace(settings, text=f"{settings.text}\n{comment}\n")


def lora(target: TrainingTarget) -> TrainerSettings:
    """Write PEFT's settings under TRL's names."""
    chosen = lora_target.choose(
        target, lora_target.by_regex(target), lora_target.by_endings(target)
    )
    modules = [chosen.modules] if isinstance(chosen.modules, str) else [*chosen.modules]
    if len(modules) == 1 and not isinstance(chosen.modules, str):
        modules *= 2  # a single entry would be a regular expression
    text = yaml_text(
        {
            **model_keys(target, "model_name_or_path"),
            "dtype": "float32" if target.loads_too_coarse else None,
            **precision_key(target),
            "use_peft": True,
            "lora_target_modules": modules,
            "lora_target_parameters": [*chosen.parameters],
            "lora_modules_to_save": [*chosen.modules_to_save],
            "lora_dropout": dropout(chosen),
        }
    )
    return TrainerSettings(text, LORA, tuple(lora_notes(chosen)))
