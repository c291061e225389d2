"""Write Python code that freezes a model loaded by transformers.

No rule for names is needed, because the code accesses the layers as modules of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_interleave.training.settings import (
    TrainerSettings,
    load_line,
    precision_key,
    python_literal,
    python_value,
)
from mergekit_interleave.training.target import TrainingTarget
from mergekit_interleave.training.trainers.registry import FULL


def full(target: TrainingTarget) -> TrainerSettings:
    """Write code that freezes the model, and then unfreezes what is to be trained."""
    layers = "".join(f"    model.{stack}[index].requires_grad_(True)\n" for stack in target.stacks)
    text = (
        f"from transformers import {target.task.load}\n\n"
        f"{load_line(target)}"
        "model.requires_grad_(False)\n"
        f"for index in {python_value(target.layers)}:\n{layers}"
        + "".join(f"model.{module}.requires_grad_(True)\n" for module in target.also)
    )
    return TrainerSettings(text, FULL, tuple(_notes(target)))


def _notes(target: TrainingTarget) -> Iterator[str]:
    since = "" if target.since is None else f", since={python_literal(target.since)}"
    if target.only_new:
        yield (
            f"mergekit_interleave.freeze_original_layers(model{since}) does the same in one line; "
            "call it before you create an optimizer or a Trainer"
        )
    for key in precision_key(target):
        yield (
            f"{target.half_dtype}, in which the weights are stored, is too coarse for most updates "
            f"at usual learning rates; pass {key}=True to Trainer to compute in 16 bits"
        )
