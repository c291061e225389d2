"""Write Python code that adds a LoRA to a loaded model with PEFT; see `peft_rules`."""

from __future__ import annotations

from mergekit_interleave.training import lora_target
from mergekit_interleave.training.settings import (
    TrainerSettings,
    load_line,
    lora_arguments,
    lora_notes,
)
from mergekit_interleave.training.target import TrainingTarget
from mergekit_interleave.training.trainers.registry import LORA


def lora(target: TrainingTarget) -> TrainerSettings:
    """Write code that creates a `LoraConfig` and applies it to the model."""
    chosen = lora_target.choose(
        target, lora_target.by_layers(target), lora_target.by_endings(target)
    )
    task = '    task_type="CAUSAL_LM",\n' if target.task.tag == "text-generation" else ""
    text = (
        "from peft import LoraConfig, get_peft_model\n"
        f"from transformers import {target.task.load}\n\n"
        f"{load_line(target)}"
        f"config = LoraConfig(\n{task}{lora_arguments(chosen)})\n"
        "model = get_peft_model(model, config)\n"
    )
    return TrainerSettings(text, LORA, tuple(lora_notes(chosen)))
