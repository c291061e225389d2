"""Write ms-swift's command-line arguments for full training or for a LoRA."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from mergekit_interleave.training import lora_target
from mergekit_interleave.training.settings import (
    TrainerSettings,
    check_selection,
    lora_notes,
    shell_text,
)
from mergekit_interleave.training.target import TrainingTarget
from mergekit_interleave.training.trainers.registry import FULL, LORA


def trained_parameters(parameters: Iterable[str], prefixes: Collection[str]) -> set[str]:
    """Return the parameters that ms-swift trains by `trainable_parameters`, a list of prefixes."""
    return {name for name in parameters if name.startswith(tuple(prefixes))}


def full(target: TrainingTarget) -> TrainerSettings:
    """Write arguments for full training, with one prefix for each new layer in each stack."""
    prefixes = [f"{stack}.{index}." for stack in target.stacks for index in target.new_layers]
    check_selection(target, trained_parameters(target.parameters, prefixes), "ms-swift")
    text = shell_text(
        {
            "--model": [target.directory],
            "--tuner_type": ["full"],
            "--freeze_parameters_ratio": ["1"],
            "--trainable_parameters": prefixes,
        }
    )
    return TrainerSettings(text, FULL, (_MODEL_TYPE,))


def lora(target: TrainingTarget) -> TrainerSettings:
    """Write PEFT's settings; a regular expression has a separate option."""
    chosen = lora_target.choose(
        target, lora_target.by_regex(target), lora_target.by_endings(target)
    )
    modules: tuple[str, Sequence[str]] = ("--target_modules", chosen.modules)
    if isinstance(chosen.modules, str):
        modules = ("--target_regex", [chosen.modules])
    text = shell_text(
        {
            "--model": [target.directory],
            "--tuner_type": ["lora"],
            modules[0]: modules[1],
            "--target_parameters": chosen.parameters,
            "--modules_to_save": chosen.saved,
            "--lora_dropout": ["0"] if chosen.parameters else [],
        }
    )
    return TrainerSettings(text, LORA, (*lora_notes(chosen), _MODEL_TYPE))


_MODEL_TYPE = (
    "if ms-swift cannot determine the model type, because several of its types share a class, add "
    "--model_type with the type of the base"
)
