"""transformers: Python code that freezes a loaded model.

Full training needs no rule for names: the layers are reached as modules of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_interleave.training.settings import TrainerSettings, load_line, python_value
from mergekit_interleave.training.target import TrainingTarget
from mergekit_interleave.training.trainers.registry import FULL


def full(target: TrainingTarget) -> TrainerSettings:
    """Freeze the model, then unfreeze its new layers."""
    layers = "".join(f"    model.{stack}[index].requires_grad_(True)\n" for stack in target.stacks)
    text = (
        f"from transformers import {target.task.load}\n\n"
        f"{load_line(target)}"
        "model.requires_grad_(False)\n"
        f"for index in {python_value(target.new_layers)}:\n{layers}"
    )
    return TrainerSettings(text, FULL, tuple(_notes(target)))


def _notes(target: TrainingTarget) -> Iterator[str]:
    yield (
        "the same in one line: mergekit_interleave.freeze_original_layers(model), before an "
        "optimizer or Trainer is made"
    )
    if target.half_dtype:
        yield (
            f"the weights load as {target.half_dtype}, in which most steps of a usual learning "
            'rate are rounded away: dtype="float32" for what is trained, and bf16=True for the '
            "Trainer"
        )
