"""Write Python code that adds a LoRA to a loaded model with PEFT; see `peft_rules`."""

from __future__ import annotations

from pathlib import Path

from mergekit_interleave.training import lora_target
from mergekit_interleave.training.settings import (
    TrainerSettings,
    load_line,
    lora_arguments,
    lora_notes,
    python_literal,
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
        f"model = get_peft_model(model, config)\n{_merge(target)}"
    )
    return TrainerSettings(text, LORA, tuple(lora_notes(chosen)))


def _merge(target: TrainingTarget) -> str:
    """Return comments with the step after training; a LoRA of integers stays an adapter."""
    if target.is_quantized:
        return ""
    merged = python_literal(f"{Path(target.directory).name}-trained")
    return f"\n# After training:\n# model.merge_and_unload().save_pretrained({merged})\n"
