"""Write the settings that make a trainer train exactly the layers to train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from mergekit_interleave.errors import RefusedError
from mergekit_interleave.training.settings import TrainerSettings
from mergekit_interleave.training.target import TrainingTarget
from mergekit_interleave.training.trainers import registry
from mergekit_interleave.training.trainers.registry import FULL, LORA, Trainer


def write(target: TrainingTarget, name: str, method: str | None = None) -> TrainerSettings:
    """Write the settings that make a trainer train exactly the new layers.

    If no method is given, the trainer's preferred one is used. If that one cannot select these
    layers, the other one is used, and a note gives the reason.

    Args:
        target: The model to train.
        name: The trainer's name on the command line.
        method: See `registry.find`.

    Raises:
        DirectiveError: There is no such trainer or method.
        RefusedError: The trainer cannot train exactly these layers.
    """
    trainer = registry.find(name, method)
    first, *others = [method] if method else trainer.methods
    try:
        return _write(target, trainer, first)
    except RefusedError as error:
        if not others:
            raise
        settings = _write(target, trainer, others[0])
        note = f"{error}; these settings train a LoRA instead"
        return replace(settings, notes=(note, *settings.notes))


def _write(target: TrainingTarget, trainer: Trainer, method: str) -> TrainerSettings:
    if method == FULL and target.is_quantized:
        raise RefusedError("the weights are quantized, so only a LoRA can be trained")
    settings = trainer.writer(method)(target)
    notes = (*settings.notes, *_notes(target, settings))
    return replace(settings, notes=notes, warnings=target.warnings, trainer=trainer.name)


def _notes(target: TrainingTarget, settings: TrainerSettings) -> Iterable[str]:
    if target.tied:
        yield (
            "the head and the embeddings of this model share one tensor, so both are trained: "
            f"{', '.join(target.also)}"
        )
    is_adapter = settings.method == LORA and not target.is_quantized
    if is_adapter and "merge_and_unload" not in settings.text:
        yield (
            "a trained LoRA is an adapter, not a model: before `verify --trained` and `card`, "
            "merge it with PEFT's merge_and_unload(), and save the result"
        )
    if settings.method == LORA and target.zeroed & target.adapted:
        yield (
            "some matrices of the new layers are zero: DoRA divides by them (NaN); PiSSA, LoftQ, "
            "IA3, OFT, BOFT and HRA multiply or factor them (no gradient); and a LoRA that leaves "
            "out the output projections gets no gradient"
        )
